"""How alike two heatmaps are."""

import torch
from torch import Tensor

from diffcam_fast.metrics.passes import check_heatmaps


def pearson(heatmaps: Tensor, others: Tensor) -> Tensor:
    """Pearson's coefficient of the pixels of two heatmaps.

    Args:
        heatmaps: (N, H, W) in [0, 1].
        others: the same shape.

    Returns:
        (N,) float64 in [-1, 1]; 0 where a map is constant, NaN where one holds NaN.

    Raises:
        ValueError: what does not fit.

    Example:
        >>> a = torch.tensor([[[0.0, 0.5, 1.0]]])
        >>> pearson(a, 1 - a / 2).round(decimals=6)
        tensor([-1.], dtype=torch.float64)
    """
    _check(heatmaps, others)
    return _coefficient(heatmaps.double().flatten(1), others.double().flatten(1), heatmaps, others)


def rank_correlation(heatmaps: Tensor, others: Tensor) -> Tensor:
    """Spearman's coefficient of two heatmaps; equal pixels share their mean rank.

    Args:
        heatmaps: (N, H, W) in [0, 1].
        others: the same shape.

    Returns:
        (N,) float32 in [-1, 1]; 0 where a map is constant, NaN where one holds NaN.

    Raises:
        ValueError: what does not fit.

    Example:
        >>> a = torch.tensor([[[0.0, 0.2, 1.0]]])
        >>> rank_correlation(a, a**2), rank_correlation(a, 1 - a)
        (tensor([1.]), tensor([-1.]))
    """
    _check(heatmaps, others)
    return _coefficient(_ranks(heatmaps), _ranks(others), heatmaps, others).float()


def constant_maps(heatmaps: Tensor) -> Tensor:
    """(N,) bool: all pixels are one value; of NaN False."""
    flat = heatmaps.flatten(1)
    constant: Tensor = flat.amin(dim=1) == flat.amax(dim=1)
    return constant


def _coefficient(one: Tensor, other: Tensor, heatmaps: Tensor, others: Tensor) -> Tensor:
    """Pearson's of rows (N, P) that were made of these heatmaps."""
    one, other = (rows - rows.mean(dim=1, keepdim=True) for rows in (one, other))
    norm = one.norm(dim=1) * other.norm(dim=1)
    constant = constant_maps(heatmaps) | constant_maps(others)
    found: Tensor = ((one * other).sum(dim=1) / norm).clamp(-1, 1).masked_fill(constant, 0)
    lost = (heatmaps.isnan() | others.isnan()).flatten(1).any(dim=1)
    return found.masked_fill(lost, torch.nan)


def _check(heatmaps: Tensor, others: Tensor) -> None:
    check_heatmaps(heatmaps)
    check_heatmaps(others)
    if heatmaps.shape != others.shape:
        raise ValueError(f"heatmaps are {tuple(heatmaps.shape)} and {tuple(others.shape)}")


def _ranks(heatmaps: Tensor) -> Tensor:
    """(N, P) float64, mean ranks from 0 on."""
    rows = []
    for row in heatmaps.flatten(1):
        _, group, sizes = row.unique(return_inverse=True, return_counts=True)
        last = sizes.cumsum(dim=0).double()
        rows.append((last - (sizes + 1) / 2)[group])
    return torch.stack(rows) if rows else heatmaps.flatten(1).double()
