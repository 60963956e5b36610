"""What environment variables decide; no other module of the project reads any."""

import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

_CHOICES = ("auto", "triton", "reference")


def uses_kernels(*operands: Tensor | None) -> bool:
    """Whether Triton kernels compute an operator, or its definition in PyTorch.

    `DIFFCAM_KERNELS` decides: `auto` (the default) takes the kernels on CUDA where Triton is
    installed, `triton` everywhere (in host memory they need Triton's interpreter,
    `TRITON_INTERPRET=1`), `reference` nowhere. float64 is always left to the definitions: the
    kernels accumulate in float32.

    Args:
        operands: of the operator; None is one that was not given.

    Raises:
        ValueError: `DIFFCAM_KERNELS` has another value.
    """
    choice = os.environ.get("DIFFCAM_KERNELS", "auto")
    if choice not in _CHOICES:
        raise ValueError(f"DIFFCAM_KERNELS is {choice!r}; it takes {', '.join(_CHOICES)}")
    tensors = [t for t in operands if t is not None]
    if choice == "reference" or any(t.dtype == torch.float64 for t in tensors):
        return False
    return choice == "triton" or (tensors[0].device.type == "cuda" and _triton_is_there())


def cache_folder() -> Path:
    """Where exported models are kept: `DIFFCAM_CACHE`, or `diffcam-fast` in the user's cache."""
    given = os.environ.get("DIFFCAM_CACHE")
    if given:
        return Path(given).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "diffcam-fast"


@cache
def _triton_is_there() -> bool:
    return find_spec("triton") is not None
