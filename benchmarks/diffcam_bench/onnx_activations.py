"""An activation of a PyTorch model that is known by its values alone, and its float64 maps.

An ONNX file names values that no module returns, as the result of a `relu` that a model calls as a
function. Such a value is found among the results of all functions that the model calls.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffcam_bench.families import differentiated_maps
from diffcam_fast.layout import Layout
from diffcam_fast.running import find_logits

# Of the largest magnitude; a layer before or behind differs by far more.
_SAME = 1e-3


def same(values: np.ndarray, tensor: object) -> bool:
    """Whether a tensor holds these values, but for the rounding of float32."""
    if not isinstance(tensor, Tensor) or tensor.shape != values.shape:
        return False
    expected = torch.from_numpy(values)
    far = (tensor.detach().to(expected) - expected).abs().max()
    return bool(far <= _SAME * expected.abs().max())


def returned(model: nn.Module, layer: str, images: Tensor) -> Tensor:
    """The output of a module, before anything is written into it in place."""
    kept: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(
        lambda module, args, output: kept.append(output.clone())
    )
    try:
        with torch.no_grad():
            model(images)
    finally:
        handle.remove()
    return kept[-1]


class _Watched(TorchFunctionMode):
    """Numbers the functions that a model calls, and hands each result on through `see`."""

    def __init__(self, see: Callable[[int, Any], Any]) -> None:
        super().__init__()
        self._see = see
        self._number = -1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._number += 1
        number = self._number
        return self._see(number, func(*args, **(kwargs or {})))


def call_that_makes(model: nn.Module, images: Tensor, values: np.ndarray) -> int | None:
    """The number of the first function call whose result has these values; None: there is none."""
    found: list[int] = []

    def see(number: int, result: Any) -> Any:
        if not found and same(values, result):
            found.append(number)
        return result

    leaf = images.clone().requires_grad_()
    # Recorded by autograd, as in what follows: attention takes another path without.
    with torch.enable_grad(), _Watched(see):
        model(leaf)
    return found[0] if found else None


def float64_maps(
    model: nn.Module, images: Tensor, targets: Tensor, call: int, channel_axis: int
) -> Tensor:
    """Signed DiffGradCAM maps (N, T, h, w) by autograd, of the result of a function call.

    Args:
        model: float64, in evaluation mode.
        images: (N, C, H, W) float64.
        targets: (N, T) int64.
        call: as `call_that_makes` counts.
        channel_axis: of the result.
    """
    kept: list[Tensor] = []

    def see(number: int, result: Any) -> Any:
        if number != call:
            return result
        kept.append(result)
        # Whatever is written in place behind the layer hits the clone.
        return result.clone()

    leaf = images.clone().requires_grad_()
    with torch.enable_grad():
        with _Watched(see):
            output = model(leaf)
        logits = find_logits(output).flatten(1)
        return differentiated_maps(logits, kept[0], targets, Layout(channel_axis))
