"""From logits to the gradient of the score, or to the channel weights of a pooled linear head."""

import torch
from torch import Tensor

from diffcam_kernels import reference as ref
from diffcam_kernels.ops.checks import (
    outside_autocast,
    require,
    require_floating,
    require_one_device,
)
from diffcam_kernels.settings import uses_kernels


@torch.library.custom_op("diffcam::contrast_gradient", mutates_args=())
@outside_autocast
def contrast_gradient(
    logits: Tensor,
    targets: Tensor | None,
    temperature: float | None,
    reference: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """d = e_c - q; see `diffcam_kernels.reference.contrast_gradient`.

    Args:
        logits: (N, K).
        targets: (N, T) int64 in [0, K); None: the predicted class, T = 1.
        temperature: T in [0, inf]; None: no contrast.
        reference: (N, T, K) bool, the classes to contrast with.
        weights: (N, K), q itself.

    Returns:
        d (N, T, K), the targets (N, T) int64, and the scores S = z_c - sum_j q_j z_j (N, T);
        float32 (float64 for float64 logits).

    Raises:
        ValueError: an operand has the wrong shape, dtype or device, or the temperature is negative.
    """
    _check_logits(logits)
    check_contrast(tuple(logits.shape), targets, temperature, reference, weights)
    require_one_device(logits=logits, targets=targets, reference=reference, weights=weights)
    if uses_kernels(logits):
        from diffcam_kernels.gpu import contrast as gpu

        return gpu.contrast_gradient(logits, targets, temperature, reference, weights)
    return _contrast(logits, targets, temperature, reference, weights)


@contrast_gradient.register_fake
def _(
    logits: Tensor,
    targets: Tensor | None,
    temperature: float | None,
    reference: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    chosen, scores = _like_targets(logits, targets)
    return scores.new_empty((*chosen.shape, logits.shape[1])), chosen, scores


@torch.library.custom_op("diffcam::contrast_channel_weights", mutates_args=())
@outside_autocast
def contrast_channel_weights(
    logits: Tensor,
    weight: Tensor,
    cells: int,
    targets: Tensor | None,
    temperature: float | None,
    reference: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """w = d W / P of a pooled linear head, on CUDA without writing d for one row of few classes;
    see `diffcam_kernels.reference.channel_weights`.

    Args:
        logits: (N, K).
        weight: W, (K, C).
        cells: P = h w.
        targets: as in `contrast_gradient`.
        temperature: as in `contrast_gradient`.
        reference: as in `contrast_gradient`.
        weights: as in `contrast_gradient`.

    Returns:
        w (N, T, C), the targets (N, T) int64 and the scores (N, T); float32 (float64 if an operand
        is).

    Raises:
        ValueError: as for `contrast_gradient`, W does not fit, or `cells` is not positive.
    """
    _check_logits(logits)
    check_contrast(tuple(logits.shape), targets, temperature, reference, weights)
    require(
        weight.ndim == 2 and weight.shape[0] == logits.shape[1],
        f"weight must be (K, C) with K = {logits.shape[1]}, got {tuple(weight.shape)}",
    )
    require(cells > 0, f"cells must be positive, got {cells}")
    require_floating(weight=weight)
    require_one_device(
        logits=logits, weight=weight, targets=targets, reference=reference, weights=weights
    )
    if uses_kernels(logits, weight):
        from diffcam_kernels.gpu import channel_weights as gpu

        return gpu.contrast_channel_weights(
            logits, weight, cells, targets, temperature, reference, weights
        )
    d, chosen, scores = _contrast(logits, targets, temperature, reference, weights)
    return ref.channel_weights(d, weight, cells), chosen, scores


@contrast_channel_weights.register_fake
def _(
    logits: Tensor,
    weight: Tensor,
    cells: int,
    targets: Tensor | None,
    temperature: float | None,
    reference: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    chosen, scores = _like_targets(logits, targets)
    dtype = ref.accumulate_dtype(logits, weight)
    return scores.new_empty((*chosen.shape, weight.shape[1]), dtype=dtype), chosen, scores


def check_contrast(
    shape: tuple[int, ...],
    targets: Tensor | None,
    temperature: float | None,
    reference: Tensor | None,
    weights: Tensor | None,
) -> None:
    """Raises ValueError unless the operands of a contrast fit each other and logits (N, K)."""
    n, k = shape
    require(
        k > 1 or (temperature is None and k == 1),
        f"a contrast needs at least two classes, got {k}; grad_cam explains a single logit",
    )
    if targets is not None:
        require(
            targets.ndim == 2 and targets.shape[0] == n and targets.dtype == torch.int64,
            f"targets must be (N, T) int64 with N = {n}, got {tuple(targets.shape)} "
            f"{targets.dtype}",
        )
        # On a GPU the kernels give NaN for what is no class: to raise would be to wait for it.
        if targets.device.type == "cpu":
            require(
                bool(((targets >= 0) & (targets < k)).all()),
                f"targets must be from 0 to {k - 1}, got {targets.tolist()}",
            )
    require(
        temperature is None or temperature >= 0,
        "temperature must be 0 (the best other class), positive, or inf (their mean); got "
        f"{temperature}",
    )
    if reference is not None:
        full = (n, 1 if targets is None else targets.shape[1], k)
        require(
            tuple(reference.shape) == full and reference.dtype == torch.bool,
            f"reference must be {full} bool, got {tuple(reference.shape)} {reference.dtype}",
        )
    if weights is not None:
        require_floating(weights=weights)
        require(
            tuple(weights.shape) == (n, k),
            f"weights must be {(n, k)} as the logits, got {tuple(weights.shape)}",
        )


def _check_logits(logits: Tensor) -> None:
    require(logits.ndim == 2, f"logits must be (N, K), got {tuple(logits.shape)}")
    require_floating(logits=logits)


def _contrast(
    logits: Tensor,
    targets: Tensor | None,
    temperature: float | None,
    reference: Tensor | None,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    # An operator may not return what it was given.
    chosen = (
        ref.predicted(logits)
        if targets is None
        else targets.clone(memory_format=torch.contiguous_format)
    )
    d = ref.contrast_gradient(logits, chosen, temperature, reference, weights)
    return d, chosen, ref.contrast_score(logits, d)


def _like_targets(logits: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor]:
    """Targets and scores of these shapes, of no value."""
    shape = (logits.shape[0], 1) if targets is None else tuple(targets.shape)
    scores = logits.new_empty(shape, dtype=ref.accumulate_dtype(logits))
    return logits.new_empty(shape, dtype=torch.int64), scores
