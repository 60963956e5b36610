"""JSON lines: all images of a run in one file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from diffcam_fast.outputs.ledger import Entry
from diffcam_fast.outputs.record import Record, Writer


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
