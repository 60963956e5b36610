"""Running somebody's model without leaving a trace in it."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


class OutputError(TypeError):
    """A model returns no logits."""


def unwrap(model: nn.Module) -> nn.Module:
    """The plain module inside `torch.compile`, `DataParallel` and `DistributedDataParallel`
    wrappers.

    A compiled forward calls no hooks, and a replica is another module than the one that was given.
    """
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        inner = model.module if isinstance(model, wrappers) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


@dataclass
class _Evaluating:
    """What the first of the current users of a model found, for the last one to put back."""

    users: int
    training: list[nn.Module]
    compiled: dict[nn.Module, Any]


_evaluating: WeakKeyDictionary[nn.Module, _Evaluating] = WeakKeyDictionary()
_lock = threading.Lock()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and uncompiled; the last of several threads restores it.

    `Module.compile` leaves a module's class as it is and sets one attribute, which is taken away
    here: a compiled forward calls no hooks. The compiler's own switch would turn every model of
    every thread.
    """
    with _lock:
        state = _evaluating.get(model)
        if state is None:
            modules = list(model.modules())
            state = _Evaluating(
                users=0,
                training=[m for m in modules if m.training],
                compiled={m: m._compiled_call_impl for m in modules if m._compiled_call_impl},
            )
            _evaluating[model] = state
            for module in state.training:
                module.training = False
            for module in state.compiled:
                module._compiled_call_impl = None
        state.users += 1
    try:
        yield
    finally:
        with _lock:
            state.users -= 1
            if state.users == 0:
                del _evaluating[model]
                for module in state.training:
                    module.training = True
                for module, call in state.compiled.items():
                    module._compiled_call_impl = call


def pick_logits(output: Any, *, probabilities: bool = False) -> Tensor:
    """The logits (N, K) in what a classifier returns.

    Args:
        output: a tensor (N, K) or (N, K, 1, 1), an object or mapping with `logits`, a mapping or
            sequence whose first such tensor is taken.
        probabilities: the tensor holds a softmax; its logarithm has the same differences as the
            logits.

    Raises:
        OutputError: nothing of the kind is there.
    """
    found = _find_logits(output)
    if found is None:
        raise OutputError(
            f"the model must return logits (N, K), or something that holds them as `logits`; "
            f"it returned {_describe(output)}"
        )
    logits = found.flatten(1)
    return logits.clamp_min(torch.finfo(logits.dtype).tiny).log() if probabilities else logits


def _find_logits(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        flat = output.ndim == 2 or (output.ndim == 4 and output.shape[2:] == (1, 1))
        return output if flat and output.is_floating_point() else None
    if isinstance(output, Mapping):
        parts = [output["logits"]] if "logits" in output else list(output.values())
    elif isinstance(getattr(output, "logits", None), Tensor):
        parts = [output.logits]
    elif isinstance(output, Sequence) and not isinstance(output, str):
        parts = list(output)
    else:
        return None
    return next((found for part in parts if (found := _find_logits(part)) is not None), None)


def _describe(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor {tuple(output.shape)} {output.dtype}"
    return f"a {type(output).__name__}"


def tensor_named(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of this dotted name, as it is now."""
    owner, _, attribute = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(owner), attribute)
    return tensor
