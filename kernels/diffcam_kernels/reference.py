"""The definition of every operator, in plain PyTorch.

Kernels and exported graphs are held against these functions. They accumulate in float32, or in
float64 where an operand is float64, whatever the dtype of the inputs; they are written to be read,
not to be fast.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulate_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if an operand is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def contrast_weights(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    reference: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """The blend q of the other classes that a target is contrasted with.

    q = softmax over j != c of z_j / T, and q_c = 0. T = infinity is the plain mean, T = 0 the one
    best other class (exact ties: the lowest index). A logit of -inf takes no part, in the mean
    neither. NaN logits give NaN.

    Args:
        logits: (N, K).
        targets: (N, T), int64 in [0, K).
        temperature: T in [0, inf], in units of the logits.
        reference: (N, T, K) bool, the classes to contrast with; None: all but the target.
        weights: (N, K), q itself; the temperature is not used then.

    Returns:
        (N, T, K), each row sums to 1.
    """
    z = logits.to(accumulate_dtype(logits))
    if weights is not None:
        return weights.to(z.dtype)[:, None, :].expand(-1, targets.shape[1], -1)
    others = z[:, None, :].repeat(1, targets.shape[1], 1)
    others.scatter_(2, targets[:, :, None], -math.inf)
    if reference is not None:
        others = others.masked_fill(~reference, -math.inf)
    # Past the range of the dtype a temperature is its limit.
    if temperature > torch.finfo(z.dtype).max:
        taken = others > -math.inf
        q = taken.to(z.dtype) / taken.sum(dim=2, keepdim=True)
    elif temperature < torch.finfo(z.dtype).tiny:
        q = F.one_hot(others.argmax(dim=2), z.shape[1]).to(z.dtype)
    else:
        # The maximum goes first: z / T overflows for a small T.
        q = torch.softmax((others - others.amax(dim=2, keepdim=True)) / temperature, dim=2)
    return torch.where(z.isnan().any(dim=1)[:, None, None], math.nan, q)


def contrast_gradient(
    logits: Tensor,
    targets: Tensor,
    temperature: float | None,
    reference: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """d = dS/dz = e_c - q of the score S = z_c - sum_j q_j z_j with q held fixed.

    Args:
        logits: (N, K).
        targets: (N, T), int64 in [0, K).
        temperature: as in `contrast_weights`; None: no contrast, S = z_c and d = e_c.
        reference: as in `contrast_weights`.
        weights: as in `contrast_weights`.

    Returns:
        (N, T, K) float32 (float64 for float64 logits).
    """
    d = F.one_hot(targets, logits.shape[1]).to(accumulate_dtype(logits))
    if temperature is None and weights is None:
        return d
    return d - contrast_weights(
        logits, targets, math.inf if temperature is None else temperature, reference, weights
    )


def contrast_score(logits: Tensor, gradient: Tensor) -> Tensor:
    """S = sum_k d_k z_k (N, T), from the logits (N, K) and d (N, T, K); classes with d = 0 take no
    part.
    """
    z = logits.to(gradient.dtype)[:, None, :]
    return torch.where(gradient == 0, 0.0, gradient * z).sum(dim=2)


def channel_weights(gradient: Tensor, weight: Tensor, cells: int) -> Tensor:
    """Channel weights of a pooled linear head, w = d W / P.

    With z = W mean(A) + b the gradient dS/dA is this vector at every cell: nothing needs a backward
    pass.

    Args:
        gradient: d, (N, T, K).
        weight: W, (K, C).
        cells: P = h w.

    Returns:
        (N, T, C) in the dtype of d.
    """
    return gradient @ weight.to(gradient.dtype) / cells


def pooled_cam(activations: Tensor, weights: Tensor, relu: bool) -> Tensor:
    """M = sum_k w_k A_k, the map of a head whose gradient is constant over space.

    Args:
        activations: A, (N, C, h, w).
        weights: w, (N, T, C).
        relu: clip negative cells to 0.

    Returns:
        (N, T, h, w) float32 (float64 if an operand is), in units of S per cell.
    """
    dtype = accumulate_dtype(activations, weights)
    maps = torch.bmm(weights.to(dtype), activations.to(dtype).flatten(2))
    return _rectify(maps.view(*maps.shape[:2], *activations.shape[2:]), relu)


def _grad_cam(a: Tensor, g: Tensor) -> Tensor:
    """alpha_k = mean_ij G; sum_k alpha_k A_k (arXiv 1610.02391)."""
    return torch.einsum("ntc,nchw->nthw", g.mean(dim=(3, 4)), a)


def _hires_cam(a: Tensor, g: Tensor) -> Tensor:
    """sum_k G_k A_k, cell by cell (arXiv 2011.08891)."""
    return torch.einsum("ntchw,nchw->nthw", g, a)


REDUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "grad_cam": _grad_cam,
    "hires_cam": _hires_cam,
}
"""Name of a gradient method -> its map before ReLU, from A (N, C, h, w) and G (N, T, C, h, w)."""


def gradient_cam(activations: Tensor, gradients: Tensor, reduction: str, relu: bool) -> Tensor:
    """The map of a gradient method from activations and gradients.

    Args:
        activations: A, (N, C, h, w).
        gradients: G, (N, T, C, h, w).
        reduction: a key of `REDUCTIONS`.
        relu: clip negative cells to 0.

    Returns:
        (N, T, h, w) float32 (float64 if an operand is), in units of S per cell.
    """
    dtype = accumulate_dtype(activations, gradients)
    return _rectify(REDUCTIONS[reduction](activations.to(dtype), gradients.to(dtype)), relu)


def heatmap(maps: Tensor, height: int, width: int) -> Tensor:
    """Min-max of each map to [0, 1], then bilinear upsampling (align_corners=False).

    A constant map gives zeros exactly; NaN gives NaN.

    Args:
        maps: (N, T, h, w).
        height: H of the result, in pixels.
        width: W of the result, in pixels.

    Returns:
        (N, T, H, W) float32 (float64 for float64 maps) in [0, 1].
    """
    m = maps.to(accumulate_dtype(maps))
    if m.numel() == 0:
        return m.new_zeros((*m.shape[:2], height, width))
    low, high = m.amin(dim=(2, 3), keepdim=True), m.amax(dim=(2, 3), keepdim=True)
    unit = (m - low) / torch.where(high == low, 1.0, high - low)
    resized = F.interpolate(unit, size=(height, width), mode="bilinear", align_corners=False)
    # Interpolation weights may sum to one unit in the last place above 1.
    return resized.clamp(0.0, 1.0)


def _rectify(maps: Tensor, relu: bool) -> Tensor:
    return maps.relu() if relu else maps
