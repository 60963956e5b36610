"""Batches on their way to a GPU and back, copied while it computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor


class _Copied(Protocol):
    def cpu(self: _T, *, non_blocking: bool = False) -> _T:
        """The same in host memory."""


_T = TypeVar("_T", bound=_Copied)


def stacked(images: Sequence[Tensor], *, pinned: bool = False) -> Tensor:
    """Images as a batch, copied by one thread.

    PyTorch would take several threads for it, and those wait for each other while decoders and the
    network's own threads have the processors: a copy of 1 ms takes 100 ms then.

    Args:
        images: of one shape and dtype.
        pinned: in memory that a GPU reads while the host goes on.
    """
    first = images[0]
    if first.device.type != "cpu" or first.dtype == torch.bfloat16:
        return torch.stack(list(images))
    batch = torch.empty((len(images), *first.shape), dtype=first.dtype, pin_memory=pinned)
    np.stack([image.numpy() for image in images], out=batch.numpy())
    return batch


class Transfers:
    """Copies to and from a GPU on streams of their own: the network waits for its own batch alone,
    and whoever takes a result for that result alone.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # PyTorch's own have no types.
        self._up = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._down = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def upload(self, images: Sequence[Tensor]) -> Tensor:
        """The batch on the GPU, for what is enqueued on the current stream from now on."""
        batch = stacked(images, pinned=True)
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._up):
            there = batch.to(self._device, non_blocking=True)
        current.wait_stream(self._up)
        there.record_stream(current)
        return there

    def download(self, result: _T) -> Leaving[_T]:
        """A result on its way to host memory."""
        self._down.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._down):
            copy = result.cpu(non_blocking=True)
            return Leaving(copy, self._down.record_event(), result)


@dataclass(frozen=True)
class Leaving(Generic[_T]):
    """A result that may not have arrived yet.

    Attributes:
        copy: in host memory.
        event: what is waited for.
        source: on the GPU, which keeps its memory until then.
    """

    copy: _T
    event: torch.cuda.Event
    source: _T

    def arrived(self) -> _T:
        """The result, once it is there."""
        self.event.synchronize()
        return self.copy
