"""ROAD: remove pixels by noisy linear imputation, and see what the model says."""

import math
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffcam_fast.metrics.passes import Model, Output, check, scored, softmax, unknown

PERCENTILES = (10, 20, 30, 40, 50, 60, 70, 80, 90)

# A missing pixel is the weighted mean of its neighbours; these weights sum to 1.
_NEIGHBOURS = [
    (dy, dx, 1 / 6 if dy * dx == 0 else 1 / 12)
    for dy in (-1, 0, 1)
    for dx in (-1, 0, 1)
    if (dy, dx) != (0, 0)
]


def road(
    model: Model,
    images: Tensor,
    heatmaps: Tensor,
    targets: Tensor,
    *,
    percentiles: Sequence[float] = PERCENTILES,
    noise: float = 0.01,
    seed: int = 0,
    output: Output = softmax,
    batch_size: int = 16,
    progress: bool = False,
) -> Tensor:
    """ROADCombined: the mean over percentiles of (LeRF - MoRF) / 2, the confidence once the least
    relevant pixels are imputed less that once the most relevant are; more is better (arXiv
    2202.00449, as pytorch-grad-cam combines it).

    At percentile p that share of the pixels is kept: the least relevant in MoRF, the most relevant
    in LeRF. They are taken by rank, equal ones from the top left on, so that p % are kept of a map
    that is 0 almost everywhere too. pytorch-grad-cam compares with a threshold, which keeps nothing
    of such a map; elsewhere both keep the same pixels.

    Args:
        model: returns logits (N, K), or whatever `output` takes.
        images: (N, C, H, W), normalised.
        heatmaps: (N, H, W) in [0, 1]; their order alone counts.
        targets: (N,) int64.
        percentiles: each in (0, 100).
        noise: standard deviation of what is added to imputed pixels, in normalised space.
        seed: of the noise. An image gets the same noise in any batch, and at any place in it.
        output: from what the model returns to scores (N, K).
        batch_size: images a pass.
        progress: show a bar.

    Returns:
        (N,) in [-0.5, 0.5] for probabilities.

    Raises:
        ValueError: what does not fit.
        ImportError: SciPy is not installed; it solves the equations.

    Example:
        >>> left = lambda x: x[:, 0, :, :4].mean((1, 2))[:, None]
        >>> image = torch.zeros(1, 1, 8, 8)
        >>> image[..., :4] = 1
        >>> options = {"noise": 0.0, "output": lambda scores: scores}
        >>> road(left, image, image[:, 0], torch.tensor([0]), **options) > 0.1
        tensor([True])
    """
    check(images, heatmaps, targets=targets)
    if not percentiles or not all(0 < p < 100 for p in percentiles):
        raise ValueError(f"percentiles must be between 0 and 100, got {list(percentiles)}")
    pixels = math.prod(heatmaps.shape[1:])
    kept = [math.ceil((pixels - 1) * p / 100) for p in percentiles]
    noises = _noises(images, 2 * len(kept), noise, seed)

    def perturbed() -> Iterator[tuple[Tensor, Tensor]]:
        for image, heatmap, target in zip(images, heatmaps, targets, strict=True):
            for number, keep in enumerate(_kept(heatmap, kept)):
                yield impute(image, keep) + noises[number] * ~keep.to(image.device), target

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        waiting: list[tuple[Tensor, Tensor]] = []
        for one in perturbed():
            waiting.append(one)
            if len(waiting) == batch_size:
                yield _stacked(waiting)
                waiting = []
        if waiting:
            yield _stacked(waiting)

    total = len(images) * len(noises)
    scores = [*scored(model, batches(), total, output=output, progress=progress, what="ROAD")]
    if not scores:
        return images.new_zeros(0)
    morf, lerf = torch.cat(scores).view(len(images), 2, len(kept)).unbind(dim=1)
    result = ((lerf - morf) / 2).mean(dim=1)
    return result.masked_fill(unknown(heatmaps).to(result.device), torch.nan)


def impute(image: Tensor, keep: Tensor) -> Tensor:
    """Fills what is missing: each such pixel is the mean of its neighbours, 1/6 for those beside
    it and 1/12 for diagonal ones, over those inside the image; all of them are solved at once.

    Args:
        image: (C, H, W).
        keep: (H, W) bool, the pixels that are there. Where there is none, 0 is filled in.

    Returns:
        (C, H, W), no noise added.

    Raises:
        ImportError: SciPy is not installed.

    Example:
        >>> keep = torch.tensor([[True, False, True]])
        >>> impute(torch.tensor([[[0.0, 9.0, 4.0]]]), keep)
        tensor([[[0., 2., 4.]]])
    """
    known = keep.flatten().cpu().numpy()
    if known.all():
        return image.clone()
    if not known.any():
        return torch.zeros_like(image)
    values = image.flatten(1).double().cpu().numpy()
    filled = image.flatten(1).clone()
    solved = _solve(values, known, (int(keep.shape[0]), int(keep.shape[1])))
    filled[:, torch.from_numpy(~known).to(image.device)] = torch.from_numpy(solved).to(filled)
    return filled.view_as(image)


def _solve(values: np.ndarray, known: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The missing pixels of (C, H * W), those that are not known (H * W)."""
    sparse, linalg = _scipy("scipy.sparse"), _scipy("scipy.sparse.linalg")
    height, width = size
    missing = np.flatnonzero(~known)
    count = len(missing)
    number = np.full(len(known), -1)
    number[missing] = np.arange(count)
    y, x = np.divmod(missing, width)
    diagonal, right = np.zeros(count), np.zeros((count, len(values)))
    rows, columns, weights = [np.arange(count)], [np.arange(count)], [diagonal]
    for dy, dx, weight in _NEIGHBOURS:
        inside = (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
        row, beside = np.flatnonzero(inside), (missing + dy * width + dx)[inside]
        diagonal[row] += weight
        there = known[beside]
        right[row[there]] += weight * values[:, beside[there]].T
        rows.append(row[~there])
        columns.append(number[beside[~there]])
        weights.append(np.full(len(rows[-1]), -weight))
    places = (np.concatenate(rows), np.concatenate(columns))
    matrix = sparse.csc_matrix((np.concatenate(weights), places), shape=(count, count))
    # Symmetric and positive definite; this ordering halves the time of the default one.
    factors = linalg.splu(
        matrix,
        permc_spec="MMD_AT_PLUS_A",
        diag_pivot_thresh=0.0,
        options={"SymmetricMode": True},
    )
    solved: np.ndarray = factors.solve(right).T
    return solved


def _kept(heatmap: Tensor, counts: Sequence[int]) -> Iterator[Tensor]:
    """Masks (H, W) of what stays: for MoRF at each count, then for LeRF."""
    for values in (heatmap, -heatmap):
        order = values.flatten().argsort(stable=True)
        for count in counts:
            keep = torch.zeros(heatmap.numel(), dtype=torch.bool, device=heatmap.device)
            keep[order[:count]] = True
            yield keep.view_as(heatmap)


def _noises(images: Tensor, count: int, noise: float, seed: int) -> Tensor:
    """(count, C, H, W), drawn on the CPU: the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, *images.shape[1:], generator=generator)
    return (noise * drawn).to(device=images.device, dtype=images.dtype)


def _stacked(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.stack([image for image, _ in pairs]), torch.stack([c for _, c in pairs])


def _scipy(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise ImportError("ROAD needs SciPy: pip install scipy") from None
