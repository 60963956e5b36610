"""What runs on every worker: a warm explainer that turns a batch of files into rows."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from diffcam_fast.distributed.rows import dataset_schema, explained_rows, failed_rows
from diffcam_fast.distributed.settings import Settings
from diffcam_fast.images.read import (
    ImageError,
    image_from_pixels,
    read_image,
    read_image_bytes,
)
from diffcam_fast.outputs.record import values_of
from diffcam_fast.running import is_out_of_memory

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Rows = list[dict[str, Any]]

# Batches of the network in one call: while it looks at one, the others are decoded.
AHEAD = 4


@dataclass(frozen=True)
class _Decoded:
    """One image for the network, or the reason why there is none."""

    path: str
    pixels: Tensor | None
    reason: str = ""


class ExplainBatches:
    """A callable class as `ray.data.Dataset.map_batches` takes it; Ray makes one in each actor.

    Args:
        settings: What to explain, and with what.
        batch_size: Images that the network takes at once.
        device: ``cpu`` or ``cuda``.
        threads: CPU threads, for the network and for decoding.

    Raises:
        ValueError: The network cannot be made, or does not run.
        TypeError: It is no image classifier.
    """

    def __init__(self, settings: Settings, *, batch_size: int, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._opened = settings.open(device, threads=threads)
        self._topk = settings.topk
        self._at_once = 1 if self._opened.single else batch_size
        self._device = device
        self._lost = ""
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="diffcam")

    def __call__(self, batch: Mapping[str, NDArray[Any]]) -> Any:
        """Explains a batch.

        Args:
            batch: Column ``path``, and ``bytes``, ``image`` or neither: then the path is a file.

        Returns:
            A ``pyarrow.Table`` of `dataset_schema`, images in the order of the batch.

        Raises:
            ValueError: The columns are others.
        """
        import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]

        if self._lost:
            # The GPU is gone for as long as this process lives: Ray starts another one, and
            # repeats this batch there.
            sys.stderr.write(f"diffcam: {self._lost}\n")
            sys.stderr.flush()
            os._exit(1)
        check_columns(list(batch))
        paths = [os.fsdecode(path) for path in batch["path"]]
        content = next((batch[name] for name in ("bytes", "image") if name in batch), paths)
        rows: list[Rows] = []
        waiting: list[_Decoded] = []
        for item in self._pool.map(self._decode, paths, content):
            waiting.append(item)
            if sum(held.pixels is not None for held in waiting) >= self._at_once:
                rows += self._finish(waiting)
                waiting = []
        rows += self._finish(waiting)
        return pa.Table.from_pylist([row for own in rows for row in own], schema=dataset_schema())

    def _decode(self, path: str, content: Any) -> _Decoded:
        try:
            return _Decoded(path, self._opened.loaded.preprocess(_read(content)))
        except ImageError as error:
            reason = str(error)
        except MemoryError:
            reason = "not enough memory to prepare it"
        except Exception as error:  # noqa: BLE001 - one strange image must not stop the others
            reason = f"cannot be prepared: {error!r}"
        return _Decoded(path, None, reason)

    def _finish(self, items: Sequence[_Decoded]) -> list[Rows]:
        """The rows of each item, in their order."""
        found = iter(self._explain([(i.path, i.pixels) for i in items if i.pixels is not None]))
        return [
            failed_rows(item.path, item.reason) if item.pixels is None else next(found)
            for item in items
        ]

    def _explain(self, items: Sequence[tuple[str, Tensor]]) -> list[Rows]:
        """Explains images together; where the network raises, in halves, down to one by one."""
        if not items:
            return []
        if self._lost:
            return [failed_rows(path, self._lost) for path, _ in items]
        try:
            targets = [self._opened.targets] * len(items) if self._opened.targets else None
            pixels = torch.stack([pixels for _, pixels in items])
            result = self._opened.explainer(pixels, targets, topk=self._topk)
            values = values_of(result, self._opened.labels)
            return [explained_rows(path, own) for (path, _), own in zip(items, values, strict=True)]
        except Exception as error:  # noqa: BLE001 - a network may raise anything
            full = is_out_of_memory(error)
            message = next(iter(str(error).splitlines()), "")
            reason = f"the network raised {type(error).__name__}" + (message and f": {message}")
        # Outside of the handler, whose traceback holds on to the tensors that were too large.
        self._check_device(reason)
        if len(items) == 1:
            path, _ = items[0]
            return [failed_rows(path, "out of memory with this image alone" if full else reason)]
        half = (len(items) + 1) // 2
        if full:
            self._at_once = min(self._at_once, half)
        return self._explain(items[:half]) + self._explain(items[half:])

    def _check_device(self, reason: str) -> None:
        """Notes where the GPU is lost: the images at hand fail, and the next batch goes elsewhere.

        To repeat these, too, would take for ever where one of them is to blame.
        """
        if self._device == "cpu":
            return
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            self._lost = f"the GPU was lost: {reason}"


def check_columns(columns: Sequence[str]) -> None:
    """Refuses a dataset that holds no images, or does not tell where they came from.

    Raises:
        ValueError: ``path`` is missing, or ``bytes`` and ``image`` are both there.
    """
    if "path" not in columns:
        raise ValueError(
            f"the dataset has the columns {', '.join(columns) or 'none'}, and no path; read it with"
            " ray.data.read_binary_files(..., include_paths=True)"
        )
    if "bytes" in columns and "image" in columns:
        raise ValueError("the dataset has images in bytes and in image; drop one of the columns")


def _read(content: Any) -> Image.Image:
    if isinstance(content, bytes):
        return read_image_bytes(content)
    if isinstance(content, str):
        return read_image(content)
    if content is None:
        raise ImageError("no content")
    return image_from_pixels(content)
