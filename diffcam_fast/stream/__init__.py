"""Streams of images, explained in order at the rate of the slowest of their stages."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from diffcam_fast.explanation import Explanation
from diffcam_fast.stream.items import FLUSH, Flush, Preparation
from diffcam_fast.stream.network import (
    CPU_BATCH,
    Explains,
    NetworkStage,
    OutOfMemory,
    Refused,
    fitting_batch_size,
    normalises_on,
)
from diffcam_fast.stream.pipeline import NETWORK_THREAD, WORKERS, Explained, Pipeline
from diffcam_fast.stream.profile import Profile, Stage

if TYPE_CHECKING:
    from diffcam_fast.images.preprocess import Preprocess

__all__ = [
    "CPU_BATCH",
    "FLUSH",
    "NETWORK_THREAD",
    "WORKERS",
    "Explained",
    "Explains",
    "Flush",
    "NetworkStage",
    "OutOfMemory",
    "Pipeline",
    "Preparation",
    "Profile",
    "Refused",
    "Stage",
    "Streamed",
    "fitting_batch_size",
    "normalises_on",
    "stream",
]


@dataclass(frozen=True, eq=False)
class Streamed:
    """One image of a stream.

    Attributes:
        index: its place in the source, from 0.
        key: what the source calls it: a path, or the name in a sample; else the index.
        explanation: of this image alone, N = 1, in host memory; None where it could not be
            explained.
        error: why it could not be.
        picture: what the network saw, RGB; None where it was not asked for.
        heatmaps: (T, H, W) uint8, `Explanation.heatmaps` times 255; None where they were not asked
            for.
    """

    index: int
    key: Any
    explanation: Explanation | None
    error: str | None = None
    picture: Image.Image | None = None
    heatmaps: Tensor | None = None


def stream(
    explainer: Explains,
    source: Iterable[Any],
    *,
    preprocess: Preprocess | None = None,
    batch_size: int | None = None,
    targets: int | Sequence[int] = (),
    topk: int | None = None,
    workers: int | None = None,
    timeout: float | None = None,
    pictures: bool = False,
    heatmaps: tuple[int, int] | None = None,
    profile: Profile | None = None,
) -> Iterator[Streamed]:
    """Explains what a source yields: `Explainer.stream`, for anything that is called as one.

    Reading, decoding, the network and the caller work side by side, with bounded queues between
    them. An image that cannot be read, or that the network raises at, has its reason as `error` and
    stops nothing.

    Args:
        explainer: an `Explainer`, an `OnnxExplainer`, or what is called as they are.
        source: an iterable, a dataset or a `DataLoader` of PyTorch, a WebDataset, a dataset of
            Hugging Face, an array, the frames of a video. Its samples are paths; bytes of image
            files; pictures: PIL images, uint8 (H, W, 3) or (3, H, W); images as the network takes
            them: float (C, H, W); batches of either; tuples that begin with one of these; or
            mappings with one under a usual name, such as `image` or `jpg`. `FLUSH` has the images
            before it explained without waiting for a whole batch.
        preprocess: from a picture to the network's input; None: the samples are prepared.
        batch_size: images at once, at least 1; None: the explainer's own, or 16.
        targets: a class, or classes, to explain for every image; none: the predicted one.
        topk: the k best classes instead.
        workers: threads that decode; None: one for each processor, 32 at most.
        timeout: seconds that reading one image, or the source for its next sample, may take; None:
            any. What hangs for longer counts as failed.
        pictures: keep what the network saw of each picture, 1024 pixels on its longer side at most.
        heatmaps: height and width in pixels; make heatmaps of this size too, batch by batch where
            the network runs, which costs less than to make them of one image after another.
        profile: is filled with how busy each stage was.

    Yields:
        The images, in the order of the source.

    Raises:
        ValueError: an option out of range, or a sample that is no image.
        TypeError: likewise, of a wrong type.
        OutOfMemory: not even one image fits into memory.
        TimeoutError: the source gave nothing in time.

    Example:
        >>> from torch import nn
        >>> from diffcam_fast import Explainer
        >>> head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        >>> explainer = Explainer(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), head))
        >>> images = torch.rand(5, 3, 8, 8)
        >>> [one.explanation.maps.shape for one in stream(explainer, images, batch_size=2)][-1]
        torch.Size([1, 1, 6, 6])
    """
    for name, number in (("batch_size", batch_size), ("workers", workers), ("topk", topk)):
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if timeout is not None and timeout <= 0:
        raise ValueError(f"timeout must be a positive number of seconds, got {timeout}")
    if batch_size is None:
        batch_size = getattr(explainer, "batch_size", CPU_BATCH)
    classes = (targets,) if isinstance(targets, int) else tuple(targets)
    if classes and topk is not None:
        raise ValueError("give targets or topk, not both")
    device = torch.device(getattr(explainer, "device", "cpu"))
    on_device = preprocess is not None and normalises_on(device, preprocess)
    pipeline = Pipeline(
        NetworkStage(
            explainer,
            targets=classes,
            topk=topk,
            normalise=preprocess if on_device else None,
            device=device,
            batch_size=batch_size,
            heatmaps=heatmaps,
        ),
        Preparation(preprocess, raw=on_device, picture=1024 if pictures else None),
        workers=workers,
        timeout=timeout,
        patience=timeout,
        profile=profile,
    )
    return _one_by_one(pipeline.run(source))


def _one_by_one(batches: Generator[Explained]) -> Iterator[Streamed]:
    # Whoever leaves this generator ends the stream: some versions of Python keep what a generator
    # that was closed still refers to.
    with closing(batches):
        yield from _each(batches)


def _each(batches: Iterable[Explained]) -> Iterator[Streamed]:
    for batch in batches:
        for place, (key, picture) in enumerate(zip(batch.keys, batch.pictures, strict=True)):
            explanation = None if batch.explanation is None else batch.explanation[place]
            heatmaps = None if batch.heatmaps is None else batch.heatmaps[place]
            yield Streamed(batch.start + place, key, explanation, batch.error, picture, heatmaps)
