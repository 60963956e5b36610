"""The network's stage: batches in, explanations out, whatever the network makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from diffcam_fast.explanation import Explanation
from diffcam_fast.images.preprocess import AsItIs, Preprocess
from diffcam_fast.running import is_out_of_memory
from diffcam_fast.stream.transfer import Transfers, stacked
from diffcam_fast.targets import Targets
from diffcam_kernels import ops

# What a free GPU is filled to by an automatic batch size, and its largest.
_FILL, _LARGEST = 0.8, 256
# More does not make a CPU faster, and takes the memory of its caches.
CPU_BATCH = 16


class OutOfMemory(RuntimeError):
    """Not even one image fits into memory."""


class Explains(Protocol):
    """An `Explainer`, an `OnnxExplainer`, or what is called as they are."""

    @property
    def layer(self) -> str:
        """Name of the target layer."""

    def __call__(
        self, images: Tensor, targets: Targets = None, *, topk: int | None = None
    ) -> Explanation:
        """Explains a batch."""


@dataclass(frozen=True)
class Refused:
    """An image that the network did not take, with the reason."""

    reason: str


@dataclass(frozen=True)
class _Failure:
    """What the network raised, in words."""

    memory: bool
    raised: str
    message: str

    @classmethod
    def of(cls, error: Exception) -> _Failure:
        message = next(iter(str(error).splitlines()), "")
        return cls(is_out_of_memory(error), type(error).__name__, message)

    @property
    def problem(self) -> str:
        return "out of memory" if self.memory else f"the network raised {self.raised}"

    @property
    def reason(self) -> str:
        return f"{self.problem}: {self.message}" if self.message else self.problem


@dataclass
class NetworkStage:
    """Explains batches; where one fails, the images that the failure is about are found.

    Attributes:
        explainer: what explains.
        targets: T classes for every image; empty: the predicted one.
        topk: the k best classes instead.
        normalise: how uint8 pictures (H, W, 3) are normalised on the device; None: they are not.
        device: where the network is.
        batch_size: the most images at once; smaller after memory ran out.
        heatmaps: height and width of the heatmaps that are made beside the maps; None: there are
            none.
        tell: is told what went wrong and what is done about it, and the error's own words.
    """

    explainer: Explains
    targets: Sequence[int] = ()
    topk: int | None = None
    normalise: Preprocess | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch_size: int = 16
    heatmaps: tuple[int, int] | None = None
    tell: Callable[[str, str], object] = lambda problem, message: None

    @cached_property
    def transfers(self) -> Transfers | None:
        """What copies to and from the device; None where it is the host."""
        return Transfers(self.device) if self.device.type == "cuda" else None

    def __call__(self, images: Sequence[Tensor]) -> list[Explanation | Refused]:
        """Explains images of one shape.

        Returns:
            Explanations of one image or more each, and refusals, in the order of the images.

        Raises:
            OutOfMemory: not even one image fits into memory.
        """
        found: list[Explanation | Refused] = []
        whole = None
        start = 0
        while start < len(images):
            chunk = images[start : start + self.batch_size]
            failure = None
            try:
                found.append(self._explain(chunk))
            except Exception as error:  # noqa: BLE001 - a network may raise anything
                failure = _Failure.of(error)
            # Outside of the handler, whose traceback holds on to the tensors that were too large.
            if failure is None:
                start += len(chunk)
                continue
            if failure.memory and torch.cuda.is_available():
                torch.cuda.empty_cache()
            if len(chunk) > 1:
                if not failure.memory:
                    whole = whole or self.batch_size
                self.batch_size = (len(chunk) + 1) // 2
                change = f"batch size {len(chunk)} -> {self.batch_size}"
                self.tell(f"{failure.problem}: {change}", failure.message)
                continue
            if failure.memory:
                raise OutOfMemory(
                    "out of memory with a single image; try a smaller --size or another --device"
                )
            found.append(Refused(failure.reason))
            start += 1
            # It was this image, not the size of the batch that it was in.
            self.batch_size = whole or self.batch_size
            whole = None
        return found

    def _explain(self, images: Sequence[Tensor]) -> Explanation:
        batch = stacked(images) if self.transfers is None else self.transfers.upload(images)
        if self.normalise is not None and batch.dtype == torch.uint8:
            mean, std = self.normalise.mean, self.normalise.std
            dtype = getattr(self.explainer, "dtype", torch.float32)
            batch = ops.preprocess(batch, list(mean), list(std), dtype, True)
        targets = [list(self.targets)] * len(images) if self.targets else None
        return self.explainer(batch, targets, topk=self.topk)


def normalises_on(device: torch.device, preprocess: Preprocess) -> bool:
    """Whether pictures go to a device as they are: a byte a value in place of four."""
    return device.type == "cuda" and not isinstance(preprocess, AsItIs)


def fitting_batch_size(explainer: Explains, image: Tensor, device: torch.device) -> int:
    """The largest power of two of images that a device has memory for, 256 at most; on the CPU 16.

    Args:
        explainer: what explains.
        image: one of them, as the network takes it.
        device: where the network is.
    """
    if device.type != "cuda":
        return CPU_BATCH
    used = []
    for count in (1, 2):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        explainer(image[None].repeat(count, *[1] * image.ndim))
        torch.cuda.synchronize(device)
        used.append(torch.cuda.max_memory_allocated(device) - before)
    free, _ = torch.cuda.mem_get_info(device)
    return size_for(free, used[0], used[1] - used[0])


def size_for(free: int, first: int, each: int) -> int:
    """The largest power of two of images, 1 to 256, that memory is left for.

    Args:
        free: bytes that there are.
        first: bytes that one image takes.
        each: bytes that every further one takes.

    Example:
        >>> size_for(free=10_000, first=1_000, each=500), size_for(free=100, first=1_000, each=1)
        (8, 1)
    """
    further = (free * _FILL - first) / max(each, 1)
    size = 1
    while size < _LARGEST and 2 * size - 1 <= further:
        size *= 2
    return size
