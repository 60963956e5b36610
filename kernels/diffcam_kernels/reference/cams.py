"""Maps: from activations and weights or gradients to where the network looked."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from diffcam_kernels.reference.contrast import contrast_gradient, contrast_score, predicted
from diffcam_kernels.reference.precision import accumulate_dtype


def channel_weights(gradient: Tensor, weight: Tensor, cells: int) -> Tensor:
    """Channel weights of a pooled linear head, w = d W / P.

    With z = W mean(A) + b the gradient dS/dA is this vector at every cell: nothing needs a backward
    pass.

    Args:
        gradient: d, (N, T, K).
        weight: W, (K, C).
        cells: P = h w.

    Returns:
        (N, T, C) float32 (float64 if an operand is).
    """
    dtype = accumulate_dtype(gradient, weight)
    return gradient.to(dtype) @ weight.to(dtype) / cells


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
    """All of a pooled linear head: z = W mean_ij(A) + b, its contrast, and the maps.

    Args:
        activations: A, (N, C, h, w).
        weight: W, (K, C).
        bias: b, (K,); None: 0.
        targets: (N, T) int64 in [0, K); None: the predicted class.
        temperature: as in `contrast_weights`; None: no contrast.
        relu: clip negative cells to 0.
        reference: as in `contrast_weights`.
        weights: as in `contrast_weights`.

    Returns:
        maps (N, T, h, w), logits (N, K), targets (N, T) int64 and scores S (N, T); float32 (float64
        if an operand is).
    """
    dtype = accumulate_dtype(activations, weight)
    shift = None if bias is None else bias.to(dtype)
    logits = F.linear(activations.to(dtype).mean(dim=(2, 3)), weight.to(dtype), shift)
    chosen = predicted(logits) if targets is None else targets
    d = contrast_gradient(logits, chosen, temperature, reference, weights)
    cells = activations.shape[2] * activations.shape[3]
    maps = pooled_cam(activations, channel_weights(d, weight, cells), relu)
    return maps, logits, chosen, contrast_score(logits, d)


def _weighted(w: Tensor, a: Tensor) -> Tensor:
    return torch.einsum("ntc,nchw->nthw", w, a)


def _grad_cam(a: Tensor, g: Tensor) -> Tensor:
    """alpha_k = mean_ij G; sum_k alpha_k A_k (arXiv 1610.02391)."""
    return _weighted(g.mean(dim=(3, 4)), a)


def _grad_cam_pp(a: Tensor, g: Tensor) -> Tensor:
    """sum_k w_k A_k with w_k = sum_ij alpha relu(G) / sum_ij [G > 0] alpha (arXiv 1710.11063).

    alpha = G^2 / (2 G^2 + (sum_ij A_k) G^3), here with G^2 cancelled, which underflows in float32.
    Where G or the denominator is 0, alpha is 0; it is renormalised as in the authors' code, by 1
    where that sum is 0.
    """
    below = 2 + a.sum(dim=(2, 3))[:, None, :, None, None] * g
    alpha = torch.where((below == 0) | (g <= 0), 0.0, 1 / below)
    total = alpha.sum(dim=(3, 4))
    return _weighted((alpha * g).sum(dim=(3, 4)) / torch.where(total == 0, 1.0, total), a)


def _xgrad_cam(a: Tensor, g: Tensor) -> Tensor:
    """sum_k w_k A_k with w_k = sum_ij G A_k / sum_ij A_k, or 0 / 0 = 0 (arXiv 2008.02312)."""
    total = a.sum(dim=(2, 3))[:, None]
    products = torch.einsum("ntchw,nchw->ntc", g, a)
    return _weighted(torch.where(total == 0, 0.0, products / total), a)


def _layer_cam(a: Tensor, g: Tensor) -> Tensor:
    """sum_k relu(G_k) A_k, cell by cell (TIP 2021)."""
    return torch.einsum("ntchw,nchw->nthw", g.relu(), a)


def _hires_cam(a: Tensor, g: Tensor) -> Tensor:
    """sum_k G_k A_k, cell by cell (arXiv 2011.08891)."""
    return torch.einsum("ntchw,nchw->nthw", g, a)


REDUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "grad_cam": _grad_cam,
    "grad_cam_pp": _grad_cam_pp,
    "xgrad_cam": _xgrad_cam,
    "layer_cam": _layer_cam,
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


def eigen_cam(activations: Tensor, center: bool) -> Tensor:
    """M = X v, X (P, C) the cells of A and v its first right singular vector (arXiv 2008.00299).

    The sign of v is arbitrary; here the cell of the largest magnitude is positive, and where
    several share that magnitude, the first of them. Where singular values are equal, the direction
    is not unique: any of them.

    Args:
        activations: A, (N, C, h, w).
        center: subtract from each channel its mean over the cells first.

    Returns:
        (N, h, w) float32 (float64 for float64 activations), signed, in units of A; zeros where X is
        0.
    """
    dtype = accumulate_dtype(activations)
    x = activations.double().flatten(2).mT
    if center:
        x = x - x.mean(dim=1, keepdim=True)
    if x.numel() == 0:
        return x.new_zeros((x.shape[0], *activations.shape[2:]), dtype=dtype)
    # NaN passes through; LAPACK would refuse the whole batch for it.
    broken = ~x.isfinite().all(dim=2).all(dim=1)
    x = x.masked_fill(broken[:, None, None], 0.0)
    # The square of the smaller side has the same components, and in float64 the same digits.
    if x.shape[1] <= x.shape[2]:
        squares, vectors = torch.linalg.eigh(x @ x.mT)
        m = vectors[:, :, -1] * squares[:, -1:].clamp_min(0).sqrt()
    else:
        m = (x @ torch.linalg.eigh(x.mT @ x)[1][:, :, -1:])[:, :, 0]
    m = m * torch.where(m.gather(1, m.abs().argmax(dim=1, keepdim=True)) < 0, -1.0, 1.0)
    maps: Tensor = m.masked_fill(broken[:, None], math.nan).to(dtype)
    return maps.view(-1, *activations.shape[2:])


def _rectify(maps: Tensor, relu: bool) -> Tensor:
    return maps.relu() if relu else maps
