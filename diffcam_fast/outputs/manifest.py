"""The list of a dataset's shards, for whoever copies or reads them elsewhere."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffcam_fast.outputs.atomic import atomic_write

NAME = "manifest.json"
_VERSION = 1


@dataclass(frozen=True)
class Shard:
    """One file of a dataset.

    Attributes:
        file: Its name in the dataset's folder.
        images: That it holds.
        rows: One for each image and target.
        bytes: Its size.
        sha256: Of its content, in hexadecimal digits.
    """

    file: str
    images: int
    rows: int
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path, *, rows: int, images: int) -> Shard:
        """The facts of a file that was just written."""
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(path.name, images, rows, path.stat().st_size, digest)

    @classmethod
    def again(cls, path: Path, known: Shard | None, *, images: int) -> Shard:
        """The facts of a file of an earlier run; those that are ``known`` hold where its size does
        and nothing was taken out of it.
        """
        if known is not None and (known.bytes, known.images) == (path.stat().st_size, images):
            return known
        import pyarrow.parquet as pq  # type: ignore[import-untyped,unused-ignore]

        return cls.of(path, rows=pq.read_metadata(path).num_rows, images=images)


@dataclass(frozen=True)
class Manifest:
    """All shards that are accounted for.

    Attributes:
        map: Type of the maps' cells.
        shards: In their order.
        complete: Whether the run came to its end.
        facts: What else was noted.
    """

    map: str
    shards: tuple[Shard, ...]
    complete: bool
    facts: Mapping[str, Any]

    def write(self, folder: Path) -> None:
        """Writes ``manifest.json`` in place of an earlier one.

        Raises:
            OSError: It cannot be written.
        """
        fields = {
            "version": _VERSION,
            "complete": self.complete,
            "images": sum(shard.images for shard in self.shards),
            "rows": sum(shard.rows for shard in self.shards),
            "map": self.map,
            **self.facts,
            "shards": [dataclasses.asdict(shard) for shard in self.shards],
        }
        with atomic_write(folder / NAME) as file:
            file.write(json.dumps(fields, indent=1).encode())

    @staticmethod
    def shards_of(folder: Path) -> dict[str, Shard]:
        """The shards that a manifest names, by their files; none where it cannot be read."""
        try:
            fields = json.loads((folder / NAME).read_text(encoding="utf-8"))
            shards = [Shard(**shard) for shard in fields["shards"]]
        except (OSError, ValueError, LookupError, TypeError):
            return {}
        return {shard.file: shard for shard in shards}

    @staticmethod
    def remove(folder: Path) -> None:
        """Deletes it."""
        (folder / NAME).unlink(missing_ok=True)
