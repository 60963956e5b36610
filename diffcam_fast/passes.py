"""Many passes over variants of a few images, in pieces that fit a memory budget."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from diffcam_fast.network import Network
from diffcam_fast.running import evaluating, is_out_of_memory
from diffcam_fast.split import tapped

# A pass holds some values at once: input and output of an operator, and a shortcut.
_VALUES_AT_ONCE = 4
# Seconds before a bar appears by itself.
_PATIENCE = 2.0


def in_pieces(count: int, row_bytes: int, memory: int) -> Iterator[slice]:
    """Slices of `count` rows, each of as many rows as fit the memory, and of one at least.

    Args:
        count: how many rows there are.
        row_bytes: what one row takes.
        memory: bytes.
    """
    step = max(1, memory // max(row_bytes, 1))
    # Pieces of one size: 65 rows of 64 are 33 and 32.
    step = -(-count // -(-count // step)) if count else 1
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def bar(total: int, what: str, progress: bool | None) -> "tqdm[Any]":
    """A progress bar; None shows it on a terminal, after some seconds."""
    disable = None if progress is None else not progress
    delay = _PATIENCE if progress is None else 0.0
    return tqdm(total=total, desc=what, unit="pass", leave=False, disable=disable, delay=delay)


def row_bytes(network: Network, images: Tensor) -> int:
    """What a pass of the whole network takes for one row."""
    largest = max(found.largest for found in network.founds)
    image = images[:1].numel() * images.element_size()
    return max(largest, image) * _VALUES_AT_ONCE


@dataclass
class ImagePasses:
    """Runs the network on variants of images."""

    network: Network

    def __call__(self, images: Tensor) -> tuple[Tensor, Any]:
        """Logits (M, K) and output for images (M, C, H, W)."""
        with torch.inference_mode(), evaluating(self.network.model):
            output = self.network.model(images.clone())
            return self.network.output(output), output


@dataclass
class HeadPasses:
    """Runs the head on activations in place of those that the network computes.

    The network is called as it is, and a hook on the layer puts the activations in place. Until
    then its operators run on meta tensors, which have a shape and no data, so that the features
    cost nothing. Where that cannot be, because the head reads earlier values too or the features
    look at their data, the whole network runs.

    Attributes:
        network: at one layer.
        images: (N, C, H, W), that the activations are variants of.
    """

    network: Network
    images: Tensor
    _alone: bool | None = field(default=None, init=False)

    def row_bytes(self, outputs: Tensor) -> int:
        """What a pass takes for one row of what the layer returns; runs the first of them to know
        whether the features can be left out. Most heads hold less than their input a few times.
        """
        if self._alone is None and len(outputs):
            self(outputs[:1], torch.zeros(1, dtype=torch.int64, device=outputs.device))
        own = outputs[:1].numel() * outputs.element_size() * _VALUES_AT_ONCE
        return own if self._alone else row_bytes(self.network, self.images)

    def __call__(self, outputs: Tensor, rows: Tensor) -> tuple[Tensor, Any]:
        """Logits (M, K) and what the model returns.

        Args:
            outputs: (M, ...), as the layer returns them.
            rows: (M,) int64, of which image each is a variant.
        """
        if self._alone is not False:
            try:
                logits, output = self._run(self._nothing(len(rows)), outputs, _Meta())
                if not logits.is_meta:
                    self._alone = True
                    return logits, output
            except Exception as error:
                if is_out_of_memory(error):
                    raise
            self._alone = False
        return self._run(self.images[rows], outputs, None)

    def _nothing(self, count: int) -> Tensor:
        return torch.empty((count, *self.images.shape[1:]), dtype=self.images.dtype, device="meta")

    def _run(self, images: Tensor, outputs: Tensor, meta: "_Meta | None") -> tuple[Tensor, Any]:
        def replace(computed: Tensor) -> Tensor:
            if computed.shape != outputs.shape:
                raise RuntimeError(f"the layer returned {tuple(computed.shape)} this time")
            if meta is not None:
                meta.active = False
            return outputs.clone()

        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(evaluating(self.network.model))
            stack.enter_context(tapped(self.network.model, self.network.found.layer, replace))
            if meta is not None:
                stack.enter_context(meta)
            output = self.network.model(images.clone())
            return self.network.output(output), output


class _Meta(TorchDispatchMode):  # type: ignore[no-untyped-call]  # PyTorch annotates neither
    """Until it is set inactive, operators see meta tensors in place of all others."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.active = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.active:
            args, kwargs = tree_map_only(Tensor, _on_meta, (args, kwargs))
        return func(*args, **kwargs)


def _on_meta(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else torch.empty_like(tensor, device="meta")
