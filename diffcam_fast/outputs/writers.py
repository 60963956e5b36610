"""One small class for each ``--format``: what an explanation becomes on the disk."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from diffcam_fast.images.colour import MID_GREY, blend, side_by_side
from diffcam_fast.images.inputs import Source
from diffcam_fast.outputs.atomic import atomic_write, sync_folder
from diffcam_fast.outputs.ledger import Entry

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Of zlib's levels this one takes a third of the default's time for a few percent more bytes.
_PNG_LEVEL = 3
_MAX_SLUG = 40


@dataclass(frozen=True)
class Record:
    """One explained image with its T targets.

    Attributes:
        source: Where the image came from.
        targets: T explained classes.
        labels: T class names.
        probabilities: T softmax values.
        scores: T contrasts.
        maps: (T, h, w) float32, unnormalised.
        heatmaps: (T, H, W) in [0, 1] or None, when only pictures need them and make their own.
        view: What the network saw, at the resolution that pictures shall have.
        finite: T flags: the map is free of NaN and infinity.
    """

    source: Source
    targets: Sequence[int]
    labels: Sequence[str]
    probabilities: Sequence[float]
    scores: Sequence[float]
    maps: NDArray[np.float32]
    heatmaps: NDArray[np.float32] | None
    view: Image.Image
    finite: Sequence[bool]

    def __post_init__(self) -> None:
        counts = [
            len(self.targets),
            len(self.labels),
            len(self.probabilities),
            len(self.scores),
            len(self.maps),
            len(self.finite),
        ]
        if len(set(counts)) != 1 or self.maps.ndim != 3:
            raise ValueError(
                f"{self.source.path}: targets, labels, probabilities, scores, maps, finite hold "
                f"{counts} items, maps are {self.maps.shape}; give T of each and maps (T, h, w)"
            )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the view."""
        return self.view.height, self.view.width

    def pictures(self) -> NDArray[np.float32]:
        """The heatmaps at the size of the view, (T, H, W) in [0, 1]."""
        if self.heatmaps is not None and self.heatmaps.shape[1:] == self.size:
            return self.heatmaps
        return _heatmaps(self.maps, self.size)

    def entry(self, files: Iterable[str]) -> Entry:
        """The ledger's line for this image with its ``files`` (relative to the output folder)."""
        return Entry(
            path=str(self.source.path),
            status="done",
            name=self.source.name,
            files=tuple(files),
            targets=tuple(int(target) for target in self.targets),
            labels=tuple(self.labels),
            probabilities=tuple(float(value) for value in self.probabilities),
            scores=tuple(float(value) for value in self.scores),
            finite=tuple(bool(flag) for flag in self.finite),
        )


class Writer:
    """What every format does; a format that writes files per image gives ``_write_one``.

    Args:
        folder: The output folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def write(self, records: Sequence[Record]) -> list[Path]:
        """Writes a batch; returns the files when they are whole and in place.

        Raises:
            OSError: A file cannot be written; nothing of that file is left behind.
        """
        return list(dict.fromkeys(path for paths in self.write_each(records) for path in paths))

    def write_each(self, records: Sequence[Record]) -> list[list[Path]]:
        """As :meth:`write`, but the files of each record; records may share a file."""
        return [self._write_one(record) for record in records]

    def restore(self, done: Sequence[Entry]) -> None:
        """Removes what a killed run wrote without finishing; call it once, before :meth:`write`.

        Args:
            done: The finished images of the ledger in its order; empty for a new run.

        Raises:
            ValueError: An output lacks images that the ledger holds.
        """

    def close(self) -> None:
        """Releases what the writer holds; the files are complete before."""

    def _write_one(self, record: Record) -> list[Path]:
        raise NotImplementedError


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


class JsonlWriter(Writer):
    """One line of JSON per image in ``explanations.jsonl``.

    Keys: ``path``, ``name``, ``targets``, ``labels``, ``probabilities``, ``scores`` (T items
    each), ``maps`` (T rows of h rows of w numbers), ``finite``. null stands for NaN and infinity.
    """

    NAME = "explanations.jsonl"

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__(folder)
        self.path = self.folder / self.NAME

    def write_each(self, records: Sequence[Record]) -> list[list[Path]]:
        """Appends a batch; where that fails, the file is as before."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(_json_line(record) for record in records)
        with open(self.path, "ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            try:
                data = memoryview(lines.encode())
                while data:
                    data = data[file.write(data) :]
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(size)
                raise
        return [[self.path] for _ in records]

    def restore(self, done: Sequence[Entry]) -> None:
        """Cuts the file behind the last line that the ledger holds too."""
        wanted = [entry.path for entry in done if self.NAME in entry.files]
        if not self.path.exists() and not wanted:
            return
        keep = 0
        with open(self.path, "r+b") as file:
            for path in wanted:
                line = file.readline()
                if not line.endswith(b"\n") or json.loads(line).get("path") != path:
                    raise ValueError(
                        f"{self.path}: the line of {path} is missing, though the run finished it; "
                        "run without --resume"
                    )
                keep += len(line)
            file.truncate(keep)
            os.fsync(file.fileno())


class ParquetWriter(Writer):
    """A dataset ``maps.parquet/`` with one file (shard) per batch, one row per image and target.

    Columns: ``path``, ``target``, ``label``, ``probability``, ``score``, ``map`` (list of float16,
    row by row), ``h``, ``w``, ``scale``. The map in its own unit is ``map * scale``: a power of
    two, 1 except where float16 cannot hold the map (above 65504, or so small that digits go).
    """

    NAME = "maps.parquet"

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__(folder)
        self.shards = self.folder / self.NAME
        self._next = 1 + max((_shard_number(path) for path in self._existing()), default=-1)

    def write_each(self, records: Sequence[Record]) -> list[list[Path]]:
        """Writes the batch as the next shard."""
        if not records:
            return []
        import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]

        path = self.shards / f"part-{self._next:05d}.parquet"
        rows = [row for record in records for row in _rows(record)]
        _write_table(path, pa.Table.from_pylist(rows, schema=_schema()))
        self._next += 1
        return [[path] for _ in records]

    def restore(self, done: Sequence[Entry]) -> None:
        """Deletes shards that the ledger does not name, and rows of images it does not hold."""
        held: dict[str, set[str]] = {}
        for entry in done:
            for file in entry.files:
                if file.startswith(f"{self.NAME}/"):
                    held.setdefault(file.removeprefix(f"{self.NAME}/"), set()).add(entry.path)
        existing = {path.name: path for path in self._existing()}
        lost = sorted(held.keys() - existing.keys())
        if lost:
            raise ValueError(
                f"{self.shards}: {', '.join(lost[:3])} missing, though the run finished it; "
                "run without --resume"
            )
        for name, path in existing.items():
            if name not in held:
                path.unlink()
        if held:
            # A ledger is cut at its end alone, so only the last shard can hold rows too many.
            last = max(held, key=lambda name: _shard_number(Path(name)))
            _keep_rows(existing[last], held[last])
        if existing:
            sync_folder(self.shards)
        self._next = 1 + max((_shard_number(Path(name)) for name in held), default=-1)

    def _existing(self) -> list[Path]:
        return [path for path in self.shards.glob("part-*.parquet") if _shard_number(path) >= 0]


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


def _heatmaps(maps: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Min-max of each map to [0, 1], then bilinear to ``size``; constant -> 0, NaN stays."""
    import torch

    values = torch.tensor(maps, dtype=torch.float32)
    low, high = values.amin((1, 2), keepdim=True), values.amax((1, 2), keepdim=True)
    span = high - low
    unit = torch.where(span == 0, torch.zeros_like(values), (values - low) / span)
    grown = torch.nn.functional.interpolate(
        unit[None], size=size, mode="bilinear", align_corners=False
    )
    result: NDArray[np.float32] = grown[0].clamp(0, 1).numpy()
    return result


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


def _json_line(record: Record) -> str:
    fields = {
        "path": str(record.source.path),
        "name": record.source.name,
        "targets": [int(target) for target in record.targets],
        "labels": list(record.labels),
        "probabilities": _numbers(record.probabilities),
        "scores": _numbers(record.scores),
        "maps": [[_numbers(row) for row in plane] for plane in np.asarray(record.maps)],
        "finite": [bool(flag) for flag in record.finite],
    }
    return json.dumps(fields, allow_nan=False) + "\n"


def _numbers(values: Iterable[float]) -> list[float | None]:
    # Nine digits give back the same float32.
    return [float(f"{v:.9g}") if math.isfinite(v) else None for v in values]


def _rows(record: Record) -> list[dict[str, Any]]:
    rows = []
    for index, target in enumerate(record.targets):
        plane = np.asarray(record.maps[index], np.float32)
        scale = _scale(plane)
        rows.append(
            {
                "path": _utf8(str(record.source.path)),
                "target": int(target),
                "label": record.labels[index],
                "probability": float(record.probabilities[index]),
                "score": float(record.scores[index]),
                "map": (plane / np.float32(scale)).astype(np.float16).ravel(),
                "h": plane.shape[0],
                "w": plane.shape[1],
                "scale": scale,
            }
        )
    return rows


def _scale(plane: NDArray[np.float32]) -> float:
    """1.0 where float16 holds the map as it is, else the power of two that brings it near 1."""
    sizes = np.abs(plane[np.isfinite(plane)])
    largest = float(sizes.max()) if sizes.size else 0.0
    # Below 2**-4 the map's small values begin to lose digits (float16 is normal above 2**-14).
    if largest == 0.0 or 2.0**-4 <= largest < 65504.0:
        return 1.0
    return float(2.0 ** max(-126, math.frexp(largest)[1]))


@functools.cache
def _schema() -> Any:
    import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]

    return pa.schema(
        [
            ("path", pa.string()),
            ("target", pa.int64()),
            ("label", pa.string()),
            ("probability", pa.float32()),
            ("score", pa.float32()),
            ("map", pa.list_(pa.float16())),
            ("h", pa.int32()),
            ("w", pa.int32()),
            ("scale", pa.float32()),
        ]
    )


def _write_table(path: Path, table: Any) -> None:
    import pyarrow.parquet as pq  # type: ignore[import-untyped,unused-ignore]

    with atomic_write(path) as file:
        pq.write_table(table, file)


def _keep_rows(shard: Path, paths: set[str]) -> None:
    import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]
    import pyarrow.parquet as pq  # type: ignore[import-untyped,unused-ignore]

    # As one file: a dataset of the folder would not read the shard alone.
    with pq.ParquetFile(shard) as file:
        table = file.read()
    kept = {_utf8(path) for path in paths}
    mask = [path in kept for path in table.column("path").to_pylist()]
    if not all(mask):
        _write_table(shard, table.filter(pa.array(mask)))


def _shard_number(path: Path) -> int:
    match = re.fullmatch(r"part-(\d+)\.parquet", path.name)
    return int(match[1]) if match else -1


def _utf8(path: str) -> str:
    # A path may hold bytes that are no UTF-8; Parquet strings may not.
    return os.fsencode(path).decode("utf-8", "replace")
