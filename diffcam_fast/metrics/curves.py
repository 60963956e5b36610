"""Insertion and Deletion: the confidence while an image appears or goes, most relevant first."""

from collections.abc import Callable, Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffcam_fast.metrics.passes import Model, Output, check, chunks, scored, softmax, unknown

Baseline = Callable[[Tensor], Tensor]
"""From images (N, C, H, W) to what stands where they do not."""


def blurred(images: Tensor) -> Tensor:
    """Images (N, C, H, W) under a Gaussian of 11 x 11 pixels and sigma 5, zeros beyond the edge:
    what RISE inserts into.

    RISE makes the kernel with SciPy, which folds what lies beyond the 11 pixels back into them, so
    that it is flatter than a Gaussian that is cut off.

    Example:
        >>> blurred(torch.ones(1, 1, 32, 32))[0, 0, 16, 16]
        tensor(1.0000)
    """
    offsets = torch.arange(-20, 21, dtype=torch.float64)
    place = (5 + offsets.long()) % 22
    line = torch.zeros(11, dtype=torch.float64)
    line.index_add_(0, torch.where(place < 11, place, 21 - place), (-(offsets**2) / 50).exp())
    kernel = (line[:, None] * line / line.sum() ** 2).to(images)[None, None]
    channels = images.shape[1]
    return F.conv2d(images, kernel.expand(channels, 1, 11, 11), padding=5, groups=channels)


def perturbation_curve(
    model: Model,
    images: Tensor,
    heatmaps: Tensor,
    targets: Tensor,
    *,
    kind: Literal["insertion", "deletion"],
    step: int = 224,
    baseline: Baseline | None = None,
    output: Output = softmax,
    batch_size: int = 16,
    progress: bool = False,
) -> Tensor:
    """The confidence after 0, `step`, 2 `step`, ... pixels, up to all, (N, points); pixels in order
    of the heatmap, largest first, and equal ones from the top left on.

    Args and errors are those of `insertion` and `deletion`, whose `baseline` depends on the kind.
    """
    check(images, heatmaps, targets=targets)
    if step < 1:
        raise ValueError(f"step must be at least 1 pixel, got {step}")
    base = (baseline or (blurred if kind == "insertion" else torch.zeros_like))(images)
    if base.shape != images.shape:
        raise ValueError(f"the baseline is {tuple(base.shape)}, the images {tuple(images.shape)}")
    pixels = heatmaps[0].numel() if len(heatmaps) else 1
    points = -(-pixels // step) + 1
    first, last = (base, images) if kind == "insertion" else (images, base)
    # rank[n, h, w]: how many pixels come before this one
    order = heatmaps.flatten(1).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(pixels, device=order.device).expand_as(order)
    )
    rank = rank.view(heatmaps.shape)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for some in chunks(torch.arange(len(images) * points), batch_size):
            rows, passed = (some // points).to(rank.device), (some % points * step).to(rank.device)
            gone = (rank[rows] < passed[:, None, None])[:, None]
            yield torch.where(gone, last[rows], first[rows]), targets[rows]

    scores = scored(
        model, batches(), len(images) * points, output=output, progress=progress, what=kind
    )
    curve = torch.cat([*scores]) if len(images) else images.new_zeros(0)
    curve = curve.view(len(images), points)
    return curve.masked_fill(unknown(heatmaps).to(curve.device)[:, None], torch.nan)


def insertion(
    model: Model,
    images: Tensor,
    heatmaps: Tensor,
    targets: Tensor,
    *,
    step: int = 224,
    baseline: Baseline = blurred,
    output: Output = softmax,
    batch_size: int = 16,
    progress: bool = False,
) -> Tensor:
    """Area under the confidence while the image appears on its blur, the pixels of the largest
    relevance first; more is better (RISE, arXiv 1806.07421).

    The trapezoids of equal width, 1 / (points - 1), also where the last step is shorter, as RISE
    does it. A constant heatmap ranks pixels from the top left on.

    Args:
        model: returns logits (N, K), or whatever `output` takes.
        images: (N, C, H, W), normalised.
        heatmaps: (N, H, W) in [0, 1]; their order alone counts.
        targets: (N,) int64.
        step: pixels a step; 224 is RISE's, for images of 224 x 224, and 225 passes each; 1792
            what it takes for many images.
        baseline: from images to what they appear on.
        output: from what the model returns to scores (N, K).
        batch_size: passes at once, over images and steps alike.
        progress: show a bar.

    Returns:
        (N,), in units of the score.

    Raises:
        ValueError: what does not fit.

    Example:
        >>> mean = lambda x: x.mean((2, 3))
        >>> ramp = torch.tensor([[[1.0, 0.5, 0.2, 0.0]]])
        >>> image = torch.tensor([[[[4.0, 0.0, 0.0, 0.0]]]])
        >>> options = {"step": 1, "baseline": torch.zeros_like, "output": lambda scores: scores}
        >>> insertion(mean, image, ramp, torch.tensor([0]), **options)
        tensor([0.8750])
    """
    return _area(
        perturbation_curve(
            model,
            images,
            heatmaps,
            targets,
            kind="insertion",
            step=step,
            baseline=baseline,
            output=output,
            batch_size=batch_size,
            progress=progress,
        )
    )


def deletion(
    model: Model,
    images: Tensor,
    heatmaps: Tensor,
    targets: Tensor,
    *,
    step: int = 224,
    baseline: Baseline = torch.zeros_like,
    output: Output = softmax,
    batch_size: int = 16,
    progress: bool = False,
) -> Tensor:
    """Area under the confidence while pixels become 0, in normalised space, those of the largest
    relevance first; less is better (RISE, arXiv 1806.07421).

    Args:
        model: returns logits (N, K), or whatever `output` takes.
        images: (N, C, H, W), normalised.
        heatmaps: (N, H, W) in [0, 1]; their order alone counts.
        targets: (N,) int64.
        step: pixels a step, as in `insertion`.
        baseline: from images to what is left of them.
        output: from what the model returns to scores (N, K).
        batch_size: passes at once, over images and steps alike.
        progress: show a bar.

    Returns:
        (N,), in units of the score.

    Raises:
        ValueError: what does not fit.

    Example:
        >>> mean = lambda x: x.mean((2, 3))
        >>> ramp = torch.tensor([[[1.0, 0.5, 0.2, 0.0]]])
        >>> image = torch.tensor([[[[4.0, 0.0, 0.0, 0.0]]]])
        >>> options = {"step": 1, "output": lambda scores: scores}
        >>> deletion(mean, image, ramp, torch.tensor([0]), **options)
        tensor([0.1250])
    """
    return _area(
        perturbation_curve(
            model,
            images,
            heatmaps,
            targets,
            kind="deletion",
            step=step,
            baseline=baseline,
            output=output,
            batch_size=batch_size,
            progress=progress,
        )
    )


def _area(curve: Tensor) -> Tensor:
    return (curve[:, 1:] + curve[:, :-1]).mean(dim=1) / 2
