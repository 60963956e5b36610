"""What the metrics share: passes in batches, and what is checked."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from tqdm import tqdm

from diffcam_fast.explainer import Explainer
from diffcam_fast.running import evaluating, pick_logits

Model = nn.Module | Callable[[Tensor], object]
"""A module, run in evaluation mode, or a function; returns what `Output` takes."""

Output = Callable[[object], Tensor]
"""From what the model returns to one score for each class, (N, K)."""

Explain = Callable[[Tensor, Tensor], Tensor]
"""From images (N, C, H, W) and targets (N,) to heatmaps (N, H, W) in [0, 1]."""


def softmax(output: object) -> Tensor:
    """The probabilities (N, K) float32 of a model that returns logits."""
    return pick_logits(output).float().softmax(dim=1)


def confidence(
    model: Model,
    images: Tensor,
    targets: Tensor,
    *,
    output: Output = softmax,
    batch_size: int = 16,
    progress: bool = False,
) -> Tensor:
    """The score that a model gives each image's target, by default its probability.

    Args:
        model: returns logits (N, K), or whatever `output` takes.
        images: (N, C, H, W).
        targets: (N,) int64 classes.
        output: from what the model returns to scores (N, K).
        batch_size: images a pass.
        progress: show a bar.

    Returns:
        (N,).

    Raises:
        ValueError: shapes that do not fit, or a target that is no class.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, 100.0]])
        >>> confidence(lambda x: logits, torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]))
        tensor([0.5000, 1.0000])
    """
    check(images, targets=targets)
    batches = zip(chunks(images, batch_size), chunks(targets, batch_size), strict=True)
    scores = scored(
        model, batches, len(images), output=output, progress=progress, what="confidence"
    )
    return torch.cat([*scores]) if len(images) else images.new_zeros(0)


def scored(
    model: Model,
    batches: Iterable[tuple[Tensor, Tensor]],
    total: int,
    *,
    output: Output,
    progress: bool,
    what: str,
) -> Iterator[Tensor]:
    """The targets' scores of batch after batch: (B, C, H, W) and (B,) in, (B,) out."""
    with (
        still(model),
        torch.inference_mode(),
        tqdm(total=total, desc=what, unit="pass", leave=False, disable=not progress) as bar,
    ):
        for images, targets in batches:
            scores = output(model(images))
            if scores.ndim != 2 or len(scores) != len(images):
                raise ValueError(
                    f"scores must be ({len(images)}, K), got {tuple(scores.shape)}; `output` "
                    "makes them of what the model returns"
                )
            if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < scores.shape[1]:
                raise ValueError(f"targets must be from 0 to {scores.shape[1] - 1}")
            yield scores.gather(1, targets[:, None].to(scores.device))[:, 0].clone()
            bar.update(len(images))


def chunks(tensor: Tensor, size: int) -> Iterator[Tensor]:
    """So many at a time along the first axis."""
    for start in range(0, len(tensor), size):
        yield tensor[start : start + size]


def still(model: Model) -> AbstractContextManager[None]:
    """A module in evaluation mode, and as it was afterwards."""
    return evaluating(model) if isinstance(model, nn.Module) else nullcontext()


def explain_with(explainer: Explainer, *, batch_size: int = 16) -> Explain:
    """What `coherency` asks for, of an explainer.

    Args:
        explainer: of any method; its maps are scaled to [0, 1] and to the images' size.
        batch_size: images a call.

    Returns:
        A function of images (N, C, H, W) and targets (N,), to heatmaps (N, H, W).

    Example:
        >>> head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        >>> explainer = Explainer(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), head))
        >>> explain_with(explainer)(torch.rand(2, 3, 8, 8), torch.tensor([0, 2])).shape
        torch.Size([2, 8, 8])
    """

    def explain(images: Tensor, targets: Tensor) -> Tensor:
        size = (images.shape[2], images.shape[3])
        pairs = zip(chunks(images, batch_size), chunks(targets, batch_size), strict=True)
        return torch.cat([explainer(x, c[:, None]).heatmaps(size)[:, 0] for x, c in pairs])

    return explain


def check(images: Tensor, heatmaps: Tensor | None = None, *, targets: Tensor | None = None) -> None:
    """Refuses what does not fit.

    Raises:
        ValueError: images that are not (N, C, H, W), heatmaps that are not (N, H, W) in [0, 1],
            or targets that are not (N,) int64.
    """
    if images.ndim != 4:
        raise ValueError(f"images must be (N, C, H, W), got {tuple(images.shape)}")
    if targets is not None and (targets.dtype != torch.int64 or targets.shape != images.shape[:1]):
        raise ValueError(
            f"targets must be ({len(images)},) int64, one an image; got {tuple(targets.shape)} "
            f"{targets.dtype}"
        )
    if heatmaps is not None:
        wanted = (len(images), *images.shape[2:])
        check_heatmaps(heatmaps)
        if heatmaps.shape != wanted:
            raise ValueError(f"heatmaps must be {wanted}, got {tuple(heatmaps.shape)}")


def check_heatmaps(heatmaps: Tensor) -> None:
    """Refuses heatmaps that are not (N, H, W) in [0, 1]; NaN passes.

    Raises:
        ValueError: that.
    """
    if heatmaps.ndim != 3 or not heatmaps.is_floating_point():
        raise ValueError(
            f"heatmaps must be floating point (N, H, W), got {tuple(heatmaps.shape)} "
            f"{heatmaps.dtype}; of an explanation, heatmaps(size)[:, 0]"
        )
    if ((heatmaps < 0) | (heatmaps > 1)).any():
        raise ValueError("heatmaps must be in [0, 1]; scale each map between its least and largest")


def unknown(heatmaps: Tensor) -> Tensor:
    """(N,) bool: the heatmap holds NaN."""
    return heatmaps.isnan().flatten(1).any(dim=1)
