"""Average Drop and Increase in Confidence: the image seen through its own heatmap."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffcam_fast.metrics.passes import (
    Model,
    Output,
    check,
    confidence,
    softmax,
    unknown,
)


@dataclass(frozen=True)
class Masked:
    """The targets' scores before and after an image is multiplied by its heatmap.

    Attributes:
        before: Y (N,).
        after: O (N,), NaN where the heatmap holds NaN.
    """

    before: Tensor
    after: Tensor

    @property
    def drop(self) -> Tensor:
        """See `average_drop`."""
        lost = (self.before - self.after).clamp(min=0)
        # Nothing is lost of no confidence.
        return torch.where((lost == 0) & (self.before == 0), lost, lost / self.before)

    @property
    def increase(self) -> Tensor:
        """See `increase_in_confidence`."""
        rise = (self.after > self.before).to(self.before.dtype)
        return torch.where(self.after.isnan(), self.after, rise)


def masked(
    model: Model,
    images: Tensor,
    heatmaps: Tensor,
    targets: Tensor,
    *,
    output: Output = softmax,
    batch_size: int = 16,
    progress: bool = False,
) -> Masked:
    """Two passes an image: as it is, and times its heatmap. Both confidences, for `average_drop`
    and `increase_in_confidence` at once.

    Args:
        model: returns logits (N, K), or whatever `output` takes.
        images: (N, C, H, W), normalised; what the heatmap hides becomes 0, the mean colour.
        heatmaps: (N, H, W) in [0, 1].
        targets: (N,) int64.
        output: from what the model returns to scores (N, K), at least 0; a drop is relative.
        batch_size: images a pass.
        progress: show a bar.

    Raises:
        ValueError: what does not fit.
    """
    check(images, heatmaps, targets=targets)
    both = torch.cat([images, images * heatmaps[:, None].to(images.dtype)])
    scores = confidence(
        model, both, targets.repeat(2), output=output, batch_size=batch_size, progress=progress
    )
    before, after = scores[: len(images)], scores[len(images) :]
    # A pass over NaN need not give NaN.
    return Masked(before, after.masked_fill(unknown(heatmaps).to(after.device), torch.nan))


def average_drop(
    model: Model,
    images: Tensor,
    heatmaps: Tensor,
    targets: Tensor,
    *,
    output: Output = softmax,
    batch_size: int = 16,
    progress: bool = False,
) -> Tensor:
    """max(0, Y - O) / Y: the share of the confidence Y = p_c(x) that O = p_c(x * M) lacks; lower
    is better. Average Drop of a set is the mean (Grad-CAM++, arXiv 1710.11063).

    Y is the confidence in the target, which need not be the prediction, and nothing is added to
    it; of Y = 0 the drop is 0. torch-cam adds 1e-7 to Y, pytorch-grad-cam does not divide.

    Args:
        model: as in `masked`.
        images: (N, C, H, W), normalised, and masked there.
        heatmaps: (N, H, W) in [0, 1].
        targets: (N,) int64.
        output: as in `masked`.
        batch_size: images a pass.
        progress: show a bar.

    Returns:
        (N,) in [0, 1].

    Raises:
        ValueError: what does not fit.

    Example:
        >>> brightness = lambda x: torch.stack([x.mean((1, 2, 3)), x[:, 0, 0, 0]], dim=1)
        >>> half = torch.tensor([[[1.0, 0.0]]])
        >>> identity = lambda scores: scores
        >>> image, target = torch.ones(1, 1, 1, 2), torch.tensor([0])
        >>> average_drop(brightness, image, half, target, output=identity)
        tensor([0.5000])
    """
    return masked(
        model,
        images,
        heatmaps,
        targets,
        output=output,
        batch_size=batch_size,
        progress=progress,
    ).drop


def increase_in_confidence(
    model: Model,
    images: Tensor,
    heatmaps: Tensor,
    targets: Tensor,
    *,
    output: Output = softmax,
    batch_size: int = 16,
    progress: bool = False,
) -> Tensor:
    """1 where O = p_c(x * M) > Y = p_c(x), else 0; more is better. Increase in Confidence of a set
    is the mean (Grad-CAM++, arXiv 1710.11063).

    Args:
        model: as in `masked`.
        images: (N, C, H, W), normalised, and masked there.
        heatmaps: (N, H, W) in [0, 1].
        targets: (N,) int64.
        output: as in `masked`.
        batch_size: images a pass.
        progress: show a bar.

    Returns:
        (N,) of 0 and 1.

    Raises:
        ValueError: what does not fit.

    Example:
        >>> dark = lambda x: 1 - x.mean((2, 3))
        >>> half = torch.tensor([[[1.0, 0.0]]])
        >>> image, identity = torch.ones(1, 1, 1, 2), lambda scores: scores
        >>> increase_in_confidence(dark, image, half, torch.tensor([0]), output=identity)
        tensor([1.])
    """
    return masked(
        model,
        images,
        heatmaps,
        targets,
        output=output,
        batch_size=batch_size,
        progress=progress,
    ).increase
