"""What runs on every worker: a warm explainer that turns a batch of files into rows."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffcam_fast.distributed.rows import dataset_schema, explained_rows, failed_rows
from diffcam_fast.distributed.settings import Settings
from diffcam_fast.images.read import ImageError, image_from_pixels
from diffcam_fast.outputs.record import Values, values_of
from diffcam_fast.stream import NetworkStage, OutOfMemory, Preparation, normalises_on
from diffcam_fast.stream.items import Pixels
from diffcam_fast.stream.network import Refused

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Rows = list[dict[str, Any]]

# Batches of the network in one call: while it looks at one, the others are decoded.
AHEAD = 4


@dataclass(frozen=True)
class _Decoded:
    """One image for the network, or the reason why there is none."""

    path: str
    values: Tensor | None
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
        target, preprocess = torch.device(device), self._opened.loaded.preprocess
        on_device = normalises_on(target, preprocess)
        self._preparation = Preparation(preprocess, raw=on_device)
        self._stage = NetworkStage(
            self._opened.explainer,
            targets=self._opened.targets,
            topk=settings.topk,
            normalise=preprocess if on_device else None,
            device=target,
            batch_size=1 if self._opened.single else batch_size,
        )
        self._at_once = self._stage.batch_size
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
            if sum(held.values is not None for held in waiting) >= self._at_once:
                rows += self._finish(waiting)
                waiting = []
        rows += self._finish(waiting)
        return pa.Table.from_pylist([row for own in rows for row in own], schema=dataset_schema())

    def _decode(self, path: str, content: Any) -> _Decoded:
        try:
            return _Decoded(path, self._prepare(content).values)
        except ImageError as error:
            reason = str(error)
        except MemoryError:
            reason = "not enough memory to prepare it"
        except Exception as error:  # noqa: BLE001 - one strange image must not stop the others
            reason = f"cannot be prepared: {error!r}"
        return _Decoded(path, None, reason)

    def _prepare(self, content: Any) -> Pixels:
        if isinstance(content, bytes):
            return self._preparation.of_bytes(content)
        if isinstance(content, str):
            return self._preparation.of_file(content)
        if content is None:
            raise ImageError("no content")
        return self._preparation.of(image_from_pixels(content))

    def _finish(self, items: Sequence[_Decoded]) -> list[Rows]:
        """The rows of each item, in their order."""
        found = iter(self._explain([i.values for i in items if i.values is not None]))
        return [
            _rows(item.path, item.reason if item.values is None else next(found)) for item in items
        ]

    def _explain(self, images: Sequence[Tensor]) -> list[Values | str]:
        """What is said of each image, or why nothing is."""
        if self._lost:
            return [self._lost] * len(images)
        try:
            parts = self._stage(images)
        except OutOfMemory:
            if len(images) == 1:
                self._check_device("out of memory")
                return [self._lost or "out of memory with this image alone"]
            return [found for image in images for found in self._explain([image])]
        refused = next((part for part in parts if isinstance(part, Refused)), None)
        if refused is not None:
            self._check_device(refused.reason)
        found: list[Values | str] = []
        for part in parts:
            if isinstance(part, Refused):
                found.append(self._lost or part.reason)
            else:
                found += values_of(part, self._opened.labels)
        return found

    def _check_device(self, reason: str) -> None:
        """Notes where the GPU is lost: the images at hand fail, and the next batch goes elsewhere.

        To repeat these, too, would take for ever where one of them is to blame.
        """
        if self._stage.device.type == "cpu":
            return
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            self._lost = f"the GPU was lost: {reason}"


def _rows(path: str, found: Values | str) -> Rows:
    return failed_rows(path, found) if isinstance(found, str) else explained_rows(path, found)


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
