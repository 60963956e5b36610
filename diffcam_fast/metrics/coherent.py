"""Coherency, complexity, and ADCC, which joins them with Average Drop."""

import torch
from torch import Tensor

from diffcam_fast.metrics.correlation import constant_maps, pearson
from diffcam_fast.metrics.passes import Explain, check, check_heatmaps


def coherency(explain: Explain, images: Tensor, heatmaps: Tensor, targets: Tensor) -> Tensor:
    """(Pearson(M(x), M(x * M)) + 1) / 2: whether the image seen through its heatmap has the same
    one; more is better (ADCC, arXiv 2104.10252).

    Pearson's coefficient of a constant map is undefined; the coherency is 0 then.

    Args:
        explain: what made the heatmaps; see `explain_with`.
        images: (N, C, H, W), normalised, and masked there.
        heatmaps: (N, H, W) in [0, 1].
        targets: (N,) int64.

    Returns:
        (N,) in [0, 1].

    Raises:
        ValueError: what does not fit.

    Example:
        >>> ramp = torch.linspace(0, 1, 4).view(1, 2, 2)
        >>> images, target = torch.ones(1, 3, 2, 2), torch.tensor([0])
        >>> coherency(lambda x, c: ramp.clone(), images, ramp, target)
        tensor([1.])
        >>> coherency(lambda x, c: ramp * 0, images, ramp, target)
        tensor([0.])
    """
    check(images, heatmaps, targets=targets)
    again = explain(images * heatmaps[:, None].to(images.dtype), targets)
    check_heatmaps(again)
    if again.shape != heatmaps.shape:
        raise ValueError(f"explain returned {tuple(again.shape)} for {tuple(heatmaps.shape)}")
    return coherency_of(heatmaps, again)


def coherency_of(heatmaps: Tensor, again: Tensor) -> Tensor:
    """As `coherency`, of both heatmaps (N, H, W)."""
    constant = constant_maps(heatmaps) | constant_maps(again)
    coherent: Tensor = ((pearson(heatmaps, again) + 1) / 2).masked_fill(constant, 0)
    return coherent.to(heatmaps.dtype)


def complexity(heatmaps: Tensor) -> Tensor:
    """sum |M| / P: the share of the image that the heatmap leaves visible; less is better (ADCC,
    arXiv 2104.10252).

    Args:
        heatmaps: (N, H, W) in [0, 1].

    Returns:
        (N,) in [0, 1].

    Raises:
        ValueError: other heatmaps.

    Example:
        >>> complexity(torch.tensor([[[1.0, 0.0], [0.5, 0.5]]]))
        tensor([0.5000])
    """
    check_heatmaps(heatmaps)
    return heatmaps.flatten(1).mean(dim=1)


def adcc(coherency: Tensor, complexity: Tensor, drop: Tensor) -> Tensor:
    """3 / (1 / coherency + 1 / (1 - complexity) + 1 / (1 - drop)), a harmonic mean; more is better
    (arXiv 2104.10252).

    Of the parts of each image it is ADCC per image, whose mean aimagelab reports; of their means
    over a set it is pooled, as openvino_xai does it, and never less. Where a part is 0, so is it.

    Args:
        coherency: of any shape, in [0, 1].
        complexity: the same.
        drop: the same; see `average_drop`.

    Returns:
        The same shape, in [0, 1].

    Example:
        >>> adcc(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.5]), torch.tensor([0.0, 0.5]))
        tensor([1., 0.])
    """
    parts = torch.stack([coherency, 1 - complexity, 1 - drop])
    mean: Tensor = 3 / parts.reciprocal().sum(dim=0)
    return mean
