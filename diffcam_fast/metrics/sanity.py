"""Parameter randomisation: a map that explains a network must change with its weights."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from diffcam_fast.metrics.coherent import constant_maps
from diffcam_fast.metrics.passes import check_heatmaps


def cascade(model: nn.Module, *, seed: int = 0) -> Iterator[tuple[str, nn.Module]]:
    """A copy of the model whose layers lose what they learned, one after the other from the head
    down, and stay so (Sanity Checks for Saliency Maps, arXiv 1810.03292).

    A layer is a module with `reset_parameters`, in the reverse of `named_modules`; it is drawn anew
    by that method, which of a batch normalisation resets its statistics too.

    Args:
        model: stays as it is.
        seed: of the random weights; the generators of the caller are left alone.

    Yields:
        The name of the layer that was reset last, and the copy, in evaluation mode. It is one
        module all along: use it before the next one is asked for.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4, 2))
        >>> [name for name, _ in cascade(model)]
        ['2', '0']
    """
    fallen = copy.deepcopy(model).eval()
    layers: list[tuple[str, Any]] = [
        (name, module)
        for name, module in fallen.named_modules()
        if callable(getattr(module, "reset_parameters", None))
    ]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        state = torch.get_rng_state()
    for name, module in reversed(layers):
        with torch.random.fork_rng(), torch.no_grad():
            torch.set_rng_state(state)
            module.reset_parameters()
            state = torch.get_rng_state()
        yield name, fallen


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
    check_heatmaps(heatmaps)
    check_heatmaps(others)
    if heatmaps.shape != others.shape:
        raise ValueError(f"heatmaps are {tuple(heatmaps.shape)} and {tuple(others.shape)}")
    one, other = _ranks(heatmaps), _ranks(others)
    one, other = (ranks - ranks.mean(dim=1, keepdim=True) for ranks in (one, other))
    norm = one.norm(dim=1) * other.norm(dim=1)
    constant = constant_maps(heatmaps) | constant_maps(others)
    found: Tensor = ((one * other).sum(dim=1) / norm).clamp(-1, 1).masked_fill(constant, 0)
    lost = (heatmaps.isnan() | others.isnan()).flatten(1).any(dim=1)
    found = found.masked_fill(lost, torch.nan).float()
    return found


def _ranks(heatmaps: Tensor) -> Tensor:
    """(N, P) float64, mean ranks from 0 on."""
    rows = []
    for row in heatmaps.flatten(1):
        _, group, sizes = row.unique(return_inverse=True, return_counts=True)
        last = sizes.cumsum(dim=0).double()
        rows.append((last - (sizes + 1) / 2)[group])
    return torch.stack(rows) if rows else heatmaps.flatten(1).double()
