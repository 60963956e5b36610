"""The formats that hold many images in one place: JSON lines and Parquet."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffcam_fast.outputs.atomic import atomic_write, sync_folder
from diffcam_fast.outputs.ledger import Entry
from diffcam_fast.outputs.record import Record, Values, Writer

if TYPE_CHECKING:
    from numpy.typing import NDArray


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
        if not self.path.exists():
            if wanted:
                raise self._lost(wanted[0])
            return
        keep = 0
        with open(self.path, "r+b") as file:
            for path in wanted:
                line = file.readline()
                if _path_of(line) != path:
                    raise self._lost(path)
                keep += len(line)
            file.truncate(keep)
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Deletes the file."""
        self.path.unlink(missing_ok=True)

    def _lost(self, path: str) -> ValueError:
        return ValueError(
            f"{self.path}: the line of {path} is missing, though the run finished it; "
            "run without --resume"
        )


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
        rows = [row for record in records for row in table_rows(str(record.source.path), record)]
        _write_table(path, pa.Table.from_pylist(rows, schema=table_schema()))
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

    def remove(self) -> None:
        """Deletes the shards, and the dataset's folder where it holds nothing else."""
        self.restore(())
        with contextlib.suppress(OSError):
            self.shards.rmdir()

    def _existing(self) -> list[Path]:
        return [path for path in self.shards.glob("part-*.parquet") if _shard_number(path) >= 0]


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


def _path_of(line: bytes) -> str | None:
    """The path in a whole line of JSON; None where the line is torn or something else."""
    try:
        path = json.loads(line)["path"]
    except (ValueError, LookupError, TypeError):
        return None
    return path if line.endswith(b"\n") and isinstance(path, str) else None


def _numbers(values: Iterable[float]) -> list[float | None]:
    # Nine digits give back the same float32.
    return [float(f"{v:.9g}") if math.isfinite(v) else None for v in values]


def table_rows(path: str, values: Values) -> list[dict[str, Any]]:
    """The rows of one image, one for each of its T targets; `table_schema` has their types.

    Args:
        path: What the column ``path`` shall hold; bytes that are no UTF-8 are replaced.
        values: What was found out about the image.
    """
    rows = []
    for index, target in enumerate(values.targets):
        plane = np.asarray(values.maps[index], np.float32)
        scale = _scale(plane)
        rows.append(
            {
                "path": _utf8(path),
                "target": int(target),
                "label": values.labels[index],
                "probability": float(values.probabilities[index]),
                "score": float(values.scores[index]),
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
def table_schema() -> Any:
    """The columns of `ParquetWriter`, a ``pyarrow.Schema``."""
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
