"""The rows of the dataset: those of ``maps.parquet/``, and one for each image that failed."""

from __future__ import annotations

import functools
import os
from typing import Any

from diffcam_fast.outputs.record import Values
from diffcam_fast.outputs.rows import table_rows, table_schema


@functools.cache
def dataset_schema() -> Any:
    """The columns of the dataset, a ``pyarrow.Schema``: those of `ParquetWriter`, and ``error``."""
    import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]

    return table_schema().append(pa.field("error", pa.string()))


def explained_rows(path: str, values: Values) -> list[dict[str, Any]]:
    """One row for each target of an image; ``error`` is null."""
    return [{**row, "error": None} for row in table_rows(path, values)]


def failed_rows(path: str, reason: str) -> list[dict[str, Any]]:
    """The one row of an image that was not explained; all but ``path`` and ``error`` is null."""
    empty = dict.fromkeys(dataset_schema().names)
    return [{**empty, "path": os.fsencode(path).decode("utf-8", "replace"), "error": reason}]
