"""Maps of all methods."""

import torch
from torch import Tensor

from diffcam_kernels import reference as ref
from diffcam_kernels.ops.checks import (
    outside_autocast,
    require,
    require_floating,
    require_one_device,
)
from diffcam_kernels.ops.contrast import check_contrast
from diffcam_kernels.settings import uses_kernels


@torch.library.custom_op("diffcam::pooled_cam", mutates_args=())
@outside_autocast
def pooled_cam(activations: Tensor, weights: Tensor, relu: bool) -> Tensor:
    """M = sum_k w_k A_k, (N, T, h, w); see `diffcam_kernels.reference.pooled_cam`.

    Raises:
        ValueError: the shapes or devices do not fit.
    """
    require(
        activations.ndim == 4
        and weights.ndim == 3
        and activations.shape[:2] == (weights.shape[0], weights.shape[2]),
        f"need A (N, C, h, w) and w (N, T, C), got {tuple(activations.shape)} and "
        f"{tuple(weights.shape)}",
    )
    require_floating(activations=activations, weights=weights)
    require_one_device(activations=activations, weights=weights)
    if uses_kernels(activations, weights):
        from diffcam_kernels.gpu import pooled as gpu

        return gpu.pooled_cam(activations, weights, relu)
    return ref.pooled_cam(activations, weights, relu)


@pooled_cam.register_fake
def _(activations: Tensor, weights: Tensor, relu: bool) -> Tensor:
    shape = (*weights.shape[:2], *activations.shape[2:])
    return activations.new_empty(shape, dtype=ref.accumulate_dtype(activations, weights))


@torch.library.custom_op("diffcam::head_cam", mutates_args=())
@outside_autocast
def head_cam(
    activations: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor | None,
    temperature: float | None,
    relu: bool,
    reference: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All of a pooled linear head, from A to maps, logits, targets and scores; see
    `diffcam_kernels.reference.head_cam`.

    Raises:
        ValueError: an operand has the wrong shape, dtype or device, or the temperature is negative.
    """
    require(
        activations.ndim == 4 and weight.ndim == 2 and activations.shape[1] == weight.shape[1],
        f"need A (N, C, h, w) and W (K, C), got {tuple(activations.shape)} and "
        f"{tuple(weight.shape)}",
    )
    if bias is not None:
        require(
            tuple(bias.shape) == (len(weight),),
            f"bias must be (K,) with K = {len(weight)}, got {tuple(bias.shape)}",
        )
    require_floating(activations=activations, weight=weight, bias=bias)
    check_contrast((len(activations), len(weight)), targets, temperature, reference, weights)
    require_one_device(
        activations=activations,
        weight=weight,
        bias=bias,
        targets=targets,
        reference=reference,
        weights=weights,
    )
    if uses_kernels(activations, weight):
        from diffcam_kernels.gpu import head as gpu

        return gpu.head_cam(
            activations, weight, bias, targets, temperature, relu, reference, weights
        )
    maps, logits, chosen, scores = ref.head_cam(
        activations, weight, bias, targets, temperature, relu, reference, weights
    )
    # An operator may not return what it was given.
    return (
        maps,
        logits,
        chosen if targets is None else chosen.clone(memory_format=torch.contiguous_format),
        scores,
    )


@head_cam.register_fake
def _(
    activations: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor | None,
    temperature: float | None,
    relu: bool,
    reference: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, _, height, width = activations.shape
    t = 1 if targets is None else targets.shape[1]
    maps = activations.new_empty(
        (n, t, height, width), dtype=ref.accumulate_dtype(activations, weight)
    )
    logits = maps.new_empty((n, weight.shape[0]))
    return maps, logits, maps.new_empty((n, t), dtype=torch.int64), maps.new_empty((n, t))


@torch.library.custom_op("diffcam::gradient_cam", mutates_args=())
@outside_autocast
def gradient_cam(activations: Tensor, gradients: Tensor, reduction: str, relu: bool) -> Tensor:
    """The map of a gradient method, (N, T, h, w); see `diffcam_kernels.reference.gradient_cam`.

    Raises:
        ValueError: the shapes or devices do not fit, or the reduction is unknown.
    """
    require(
        activations.ndim == 4
        and gradients.ndim == 5
        and activations.shape == gradients.shape[:1] + gradients.shape[2:],
        f"need A (N, C, h, w) and G (N, T, C, h, w), got {tuple(activations.shape)} and "
        f"{tuple(gradients.shape)}",
    )
    require(
        reduction in ref.REDUCTIONS,
        f"unknown reduction {reduction!r}; there are {', '.join(ref.REDUCTIONS)}",
    )
    require_floating(activations=activations, gradients=gradients)
    require_one_device(activations=activations, gradients=gradients)
    if uses_kernels(activations, gradients):
        from diffcam_kernels.gpu import gradient as gpu

        return gpu.gradient_cam(activations, gradients, reduction, relu)
    return ref.gradient_cam(activations, gradients, reduction, relu).contiguous()


@gradient_cam.register_fake
def _(activations: Tensor, gradients: Tensor, reduction: str, relu: bool) -> Tensor:
    shape = (*gradients.shape[:2], *activations.shape[2:])
    return activations.new_empty(shape, dtype=ref.accumulate_dtype(activations, gradients))


@torch.library.custom_op("diffcam::eigen_cam", mutates_args=())
@outside_autocast
def eigen_cam(activations: Tensor, center: bool) -> Tensor:
    """The first principal component of each image, (N, h, w); see
    `diffcam_kernels.reference.eigen_cam`.

    Raises:
        ValueError: the activations are not (N, C, h, w).
    """
    require(activations.ndim == 4, f"A must be (N, C, h, w), got {tuple(activations.shape)}")
    require_floating(activations=activations)
    if uses_kernels(activations):
        from diffcam_kernels.gpu import eigen as gpu

        return gpu.eigen_cam(activations, center)
    return ref.eigen_cam(activations, center)


@eigen_cam.register_fake
def _(activations: Tensor, center: bool) -> Tensor:
    shape = (activations.shape[0], *activations.shape[2:])
    return activations.new_empty(shape, dtype=ref.accumulate_dtype(activations))
