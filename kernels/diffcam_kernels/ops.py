"""Custom operators `torch.ops.diffcam.*`: the one call site of the engine, whatever the device.

Each checks its operands, allocates, and dispatches by device. Fake implementations let
`torch.compile`, `torch.export` and CUDA graphs see through them. Every device runs the definitions
in `reference` today; a kernel replaces one with `register_kernel("cuda")` and no caller changes.

Targets are taken as valid here: reading them back to check their range would stop a GPU, so whoever
accepts them from a user checks them there.
"""

import torch
from torch import Tensor

from diffcam_kernels import reference as ref


@torch.library.custom_op("diffcam::contrast_gradient", mutates_args=())
def contrast_gradient(
    logits: Tensor,
    targets: Tensor,
    temperature: float | None,
    reference: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """d = e_c - q, (N, T, K); see `diffcam_kernels.reference.contrast_gradient`.

    Raises:
        ValueError: an operand has the wrong shape or dtype, or the temperature is negative.
    """
    _require(logits.ndim == 2, f"logits must be (N, K), got {tuple(logits.shape)}")
    _require(
        logits.shape[1] > 1 or temperature is None,
        "a contrast needs at least two classes, got 1; grad_cam explains a single logit",
    )
    _require(logits.is_floating_point(), f"logits must be floating point, got {logits.dtype}")
    _require(
        targets.ndim == 2 and targets.shape[0] == logits.shape[0] and targets.dtype == torch.int64,
        f"targets must be (N, T) int64 with N = {logits.shape[0]}, got {tuple(targets.shape)} "
        f"{targets.dtype}",
    )
    _require(
        temperature is None or temperature >= 0,
        "temperature must be 0 (the best other class), positive, or inf (their mean); got "
        f"{temperature}",
    )
    shape = (*targets.shape, logits.shape[1])
    if reference is not None:
        _require(
            tuple(reference.shape) == shape and reference.dtype == torch.bool,
            f"reference must be {shape} bool, got {tuple(reference.shape)} {reference.dtype}",
        )
    if weights is not None:
        _require(
            weights.shape == logits.shape,
            f"weights must be {tuple(logits.shape)} as the logits, got {tuple(weights.shape)}",
        )
    return ref.contrast_gradient(logits, targets, temperature, reference, weights)


@contrast_gradient.register_fake
def _(
    logits: Tensor,
    targets: Tensor,
    temperature: float | None,
    reference: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    return logits.new_empty((*targets.shape, logits.shape[1]), dtype=ref.accumulate_dtype(logits))


@torch.library.custom_op("diffcam::channel_weights", mutates_args=())
def channel_weights(gradient: Tensor, weight: Tensor, cells: int) -> Tensor:
    """w = d W / P, (N, T, C); see `diffcam_kernels.reference.channel_weights`.

    Raises:
        ValueError: the shapes do not fit, or `cells` is not positive.
    """
    _require(
        gradient.ndim == 3 and weight.ndim == 2 and gradient.shape[2] == weight.shape[0],
        f"need d (N, T, K) and W (K, C), got {tuple(gradient.shape)} and {tuple(weight.shape)}",
    )
    _require(cells > 0, f"cells must be positive, got {cells}")
    return ref.channel_weights(gradient, weight, cells)


@channel_weights.register_fake
def _(gradient: Tensor, weight: Tensor, cells: int) -> Tensor:
    return gradient.new_empty((*gradient.shape[:2], weight.shape[1]))


@torch.library.custom_op("diffcam::pooled_cam", mutates_args=())
def pooled_cam(activations: Tensor, weights: Tensor, relu: bool) -> Tensor:
    """M = sum_k w_k A_k, (N, T, h, w); see `diffcam_kernels.reference.pooled_cam`.

    Raises:
        ValueError: the shapes do not fit.
    """
    _require(
        activations.ndim == 4
        and weights.ndim == 3
        and _sizes(activations) == (weights.shape[0], weights.shape[2]),
        f"need A (N, C, h, w) and w (N, T, C), got {tuple(activations.shape)} and "
        f"{tuple(weights.shape)}",
    )
    return ref.pooled_cam(activations, weights, relu)


@pooled_cam.register_fake
def _(activations: Tensor, weights: Tensor, relu: bool) -> Tensor:
    shape = (*weights.shape[:2], *activations.shape[2:])
    return activations.new_empty(shape, dtype=ref.accumulate_dtype(activations, weights))


@torch.library.custom_op("diffcam::gradient_cam", mutates_args=())
def gradient_cam(activations: Tensor, gradients: Tensor, reduction: str, relu: bool) -> Tensor:
    """The map of a gradient method, (N, T, h, w); see `diffcam_kernels.reference.gradient_cam`.

    Raises:
        ValueError: the shapes do not fit, or the reduction is unknown.
    """
    _require(
        activations.ndim == 4
        and gradients.ndim == 5
        and activations.shape == gradients.shape[:1] + gradients.shape[2:],
        f"need A (N, C, h, w) and G (N, T, C, h, w), got {tuple(activations.shape)} and "
        f"{tuple(gradients.shape)}",
    )
    _require(
        reduction in ref.REDUCTIONS,
        f"unknown reduction {reduction!r}; there are {', '.join(ref.REDUCTIONS)}",
    )
    return ref.gradient_cam(activations, gradients, reduction, relu).contiguous()


@gradient_cam.register_fake
def _(activations: Tensor, gradients: Tensor, reduction: str, relu: bool) -> Tensor:
    shape = (*gradients.shape[:2], *activations.shape[2:])
    return activations.new_empty(shape, dtype=ref.accumulate_dtype(activations, gradients))


@torch.library.custom_op("diffcam::heatmap", mutates_args=())
def heatmap(maps: Tensor, height: int, width: int) -> Tensor:
    """Maps as pictures in [0, 1], (N, T, H, W); see `diffcam_kernels.reference.heatmap`.

    Raises:
        ValueError: the maps are not (N, T, h, w), or the size is not positive.
    """
    _require(maps.ndim == 4, f"maps must be (N, T, h, w), got {tuple(maps.shape)}")
    _require(height > 0 and width > 0, f"size must be positive, got {(height, width)}")
    return ref.heatmap(maps, height, width)


@heatmap.register_fake
def _(maps: Tensor, height: int, width: int) -> Tensor:
    return maps.new_empty((*maps.shape[:2], height, width), dtype=ref.accumulate_dtype(maps))


def _sizes(activations: Tensor) -> tuple[int, int]:
    return activations.shape[0], activations.shape[1]


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
