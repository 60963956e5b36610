"""Parquet: all images of a run in the shards of one dataset, with a manifest beside them."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffcam_fast.outputs.atomic import atomic_write, sync_folder
from diffcam_fast.outputs.ledger import Entry
from diffcam_fast.outputs.manifest import Manifest, Shard
from diffcam_fast.outputs.record import Record, Writer
from diffcam_fast.outputs.rows import MapType, as_utf8, table_rows, table_schema

if TYPE_CHECKING:
    import os

# A shard that is not full is written after so long, so that a kill does not cost more.
_SECONDS = 30.0


class ParquetWriter(Writer):
    """A dataset ``maps.parquet/`` of shards, one row per image and target.

    Columns: ``path``, ``target``, ``label``, ``probability``, ``score``, ``map`` (list of float16,
    row by row), ``h``, ``w``, ``scale``. The map in its own unit is ``map * scale``: a power of
    two, 1 except where float16 cannot hold the map (above 65504, or so small that digits go). With
    maps of uint8 it is ``map * scale + offset``, to half a 255th of its range; both are NaN where
    the map is not finite.

    Args:
        folder: The output folder.
        shard_images: Images in a shard. The rows of a batch wait in memory until there are so many,
            or :meth:`flush` is called; 1 writes each batch at once.
        map_type: ``float16`` or ``uint8``.
    """

    NAME = "maps.parquet"

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        shard_images: int = 1,
        map_type: MapType = "float16",
    ) -> None:
        super().__init__(folder)
        self.shards = self.folder / self.NAME
        self.map_type = map_type
        self._schema = table_schema(map_type)
        self._shard_images = shard_images
        self._next = 1 + max((_shard_number(path) for path in self._existing()), default=-1)
        self._rows: list[dict[str, Any]] = []
        self._images = 0
        self._since = 0.0
        self._written: dict[str, Shard] = {}

    @property
    def waiting(self) -> int:
        """Images whose rows are not written yet."""
        return self._images

    @property
    def due(self) -> bool:
        """Whether the waiting rows shall be written now."""
        full = self._images >= self._shard_images
        return full or (self._images > 0 and time.monotonic() - self._since > _SECONDS)

    def write(self, records: Sequence[Record]) -> list[Path]:
        """Adds a batch and writes the shard."""
        paths = super().write(records)
        self.flush()
        return paths

    def write_each(self, records: Sequence[Record]) -> list[list[Path]]:
        """Adds a batch to the shard that waits, and writes it when it is due.

        Returns:
            Where the rows of each record are, or will be.
        """
        if records and not self._images:
            self._since = time.monotonic()
        for record in records:
            self._rows += table_rows(str(record.source.path), record, map_type=self.map_type)
        self._images += len(records)
        path = self._path()
        if self.due:
            self.flush()
        return [[path] for _ in records]

    def flush(self) -> None:
        """Writes what waits, as one shard.

        Raises:
            OSError: It cannot be written; then it waits on.
        """
        if not self._images:
            return
        import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]

        path = self._path()
        _write_table(path, pa.Table.from_pylist(self._rows, schema=self._schema))
        self._written[path.name] = Shard.of(path, rows=len(self._rows), images=self._images)
        self._next += 1
        self._rows, self._images = [], 0

    def publish(self, *, complete: bool, facts: Mapping[str, Any]) -> None:
        """Writes ``manifest.json`` over the shards so far, when they are accounted for.

        Args:
            complete: No more will follow.
            facts: What else to note, as JSON values.
        """
        shards = [self._written[name] for name in sorted(self._written)]
        Manifest(self.map_type, tuple(shards), complete, facts).write(self.folder)

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
        known = Manifest.shards_of(self.folder)
        self._written = {
            name: Shard.again(existing[name], known.get(name), images=len(paths))
            for name, paths in held.items()
        }
        self._next = 1 + max((_shard_number(Path(name)) for name in held), default=-1)

    def remove(self) -> None:
        """Deletes the shards, and the dataset's folder where it holds nothing else."""
        self.restore(())
        Manifest.remove(self.folder)
        with contextlib.suppress(OSError):
            self.shards.rmdir()

    def _path(self) -> Path:
        return self.shards / f"part-{self._next:05d}.parquet"

    def _existing(self) -> list[Path]:
        return [path for path in self.shards.glob("part-*.parquet") if _shard_number(path) >= 0]


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
    kept = {as_utf8(path) for path in paths}
    mask = [path in kept for path in table.column("path").to_pylist()]
    if not all(mask):
        _write_table(shard, table.filter(pa.array(mask)))


def _shard_number(path: Path) -> int:
    match = re.fullmatch(r"part-(\d+)\.parquet", path.name)
    return int(match[1]) if match else -1
