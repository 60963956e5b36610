"""One small class for each ``--format``: what an explanation becomes on the disk."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from diffcam_fast.images.colour import MID_GREY, blend, side_by_side
from diffcam_fast.outputs.atomic import atomic_write
from diffcam_fast.outputs.jsonl import JsonlWriter
from diffcam_fast.outputs.parquet import ParquetWriter
from diffcam_fast.outputs.record import Record, Writer

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "HeatmapWriter",
    "JsonlWriter",
    "NpzWriter",
    "OverlayWriter",
    "ParquetWriter",
    "Record",
    "Writer",
    "files_of",
]

# Of zlib's levels this one takes a third of the default's time for a tenth more bytes.
_PNG_LEVEL = 3
_MAX_SLUG = 40


class OverlayWriter(Writer):
    """The heatmap over the view as ``<name>.overlay.png``.

    Args:
        folder: The output folder.
        mode: ``side`` puts the view beside the blend, ``blend`` writes the blend alone.
        alpha: Share of the heatmap, 0 to 1.
        cmap: Name of a matplotlib colour map.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        mode: Literal["side", "blend"] = "side",
        alpha: float = 0.5,
        cmap: str = "turbo",
    ) -> None:
        super().__init__(folder)
        if mode not in ("side", "blend"):
            raise ValueError(f"mode is {mode!r}; known are 'side' and 'blend'")
        self.mode, self.alpha, self.cmap = mode, alpha, cmap
        # A bad alpha or colour map shall fail now, not at the first image.
        blend(np.zeros((1, 1, 3), np.uint8), np.zeros((1, 1)), alpha=alpha, cmap=cmap)

    def _write_one(self, record: Record) -> list[Path]:
        pixels, paths = np.asarray(record.view), []
        for infix, heatmap in zip(_infixes(record), record.pictures(), strict=True):
            mixed = blend(pixels, heatmap, alpha=self.alpha, cmap=self.cmap)
            picture = Image.fromarray(mixed)
            if self.mode == "side":
                picture = side_by_side(record.view, picture)
            path = self.folder / f"{record.source.name}{infix}.overlay.png"
            paths.append(_save_png(path, picture))
        return paths


class HeatmapWriter(Writer):
    """The heatmap at the view's size as ``<name>.heatmap.png``: grey, 255 = 1.0, NaN = 128."""

    def _write_one(self, record: Record) -> list[Path]:
        paths = []
        for infix, heatmap in zip(_infixes(record), record.pictures(), strict=True):
            grey = np.where(np.isnan(heatmap), MID_GREY, np.rint(heatmap * np.float32(255)))
            path = self.folder / f"{record.source.name}{infix}.heatmap.png"
            paths.append(_save_png(path, Image.fromarray(grey.clip(0, 255).astype(np.uint8))))
        return paths


class NpzWriter(Writer):
    """All numbers of an image as ``<name>.npz``.

    It holds ``maps`` (T, h, w) and ``scores``, ``probabilities`` (T,) as float32, ``targets`` (T,)
    as int64.

    Args:
        folder: The output folder.
        heatmaps: Also write ``heatmaps`` (T, H, W) at the size of the record's, or of the view.
    """

    def __init__(self, folder: str | os.PathLike[str], *, heatmaps: bool = False) -> None:
        super().__init__(folder)
        self.heatmaps = heatmaps

    def _write_one(self, record: Record) -> list[Path]:
        arrays: dict[str, NDArray[Any]] = {
            "maps": np.asarray(record.maps, np.float32),
            "targets": np.asarray(record.targets, np.int64),
            "scores": np.asarray(record.scores, np.float32),
            "probabilities": np.asarray(record.probabilities, np.float32),
        }
        if self.heatmaps:
            given = record.heatmaps
            arrays["heatmaps"] = record.pictures() if given is None else given
        path = self.folder / f"{record.source.name}.npz"
        with atomic_write(path) as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        return [path]


def files_of(writers: Sequence[Writer], records: Sequence[Record]) -> list[list[str]]:
    """Lets every writer write a batch.

    Args:
        writers: Of the same output folder each.
        records: The batch.

    Returns:
        For each record its files relative to the output folder, as :meth:`Record.entry` takes
        them.

    Raises:
        OSError: A file cannot be written.
    """
    files: list[list[str]] = [[] for _ in records]
    for writer in writers:
        for names, paths in zip(files, writer.write_each(records), strict=True):
            names.extend(path.relative_to(writer.folder).as_posix() for path in paths)
    return files


def _infixes(record: Record) -> list[str]:
    """What tells the pictures of one image apart: nothing for one target, else the labels."""
    if len(record.targets) == 1:
        return [""]
    slugs = [
        _slug(label) or str(target)
        for label, target in zip(record.labels, record.targets, strict=True)
    ]
    # ImageNet has two classes "crane" and two "maillot".
    return [
        f".{slug}" if slugs.count(slug) == 1 else f".{slug}-{target}"
        for slug, target in zip(slugs, record.targets, strict=True)
    ]


def _slug(label: str) -> str:
    """``label`` in ASCII letters, digits and single dashes: "Egyptian cat" -> "egyptian-cat"."""
    ascii_label = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", ascii_label.lower()).strip("-")[:_MAX_SLUG].rstrip("-")


def _save_png(path: Path, picture: Image.Image) -> Path:
    with atomic_write(path) as file:
        picture.save(file, format="PNG", compress_level=_PNG_LEVEL)
    return path
