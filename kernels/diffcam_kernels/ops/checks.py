"""What operators ask of their operands."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def outside_autocast(operator: Callable[P, R]) -> Callable[P, R]:
    """An operator computes in the dtypes it was written for, whatever mode its caller is in."""

    @functools.wraps(operator)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        operands = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        with torch.autocast(operands[0].device.type, enabled=False):
            return operator(*args, **kwargs)

    return run


def require(holds: bool, message: str) -> None:
    """Raises ValueError with this message unless something holds."""
    if not holds:
        raise ValueError(message)


def require_one_device(**operands: Tensor | None) -> None:
    """Raises ValueError unless all operands lie on one device."""
    devices = {name: t.device for name, t in operands.items() if t is not None}
    if len(set(devices.values())) > 1:
        found = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"operands must be on one device, got {found}; move them with .to()")


def require_floating(**operands: Tensor | None) -> None:
    """Raises ValueError unless all operands are floating point."""
    for name, operand in operands.items():
        if operand is not None and not operand.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {operand.dtype}")
