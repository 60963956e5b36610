"""One row of a table for each image and target: what Parquet shards and Ray's datasets hold."""

from __future__ import annotations

import functools
import math
import os
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from diffcam_fast.outputs.record import Values

if TYPE_CHECKING:
    from numpy.typing import NDArray

MapType = Literal["float16", "uint8"]


def table_rows(path: str, values: Values, *, map_type: MapType = "float16") -> list[dict[str, Any]]:
    """The rows of one image, one for each of its T targets; `table_schema` has their types.

    Args:
        path: What the column ``path`` shall hold; bytes that are no UTF-8 are replaced.
        values: What was found out about the image.
        map_type: How the cells of the map are written.
    """
    rows = []
    for index, target in enumerate(values.targets):
        plane = np.asarray(values.maps[index], np.float32)
        encode = _as_uint8 if map_type == "uint8" else _as_float16
        rows.append(
            {
                "path": as_utf8(path),
                "target": int(target),
                "label": values.labels[index],
                "probability": float(values.probabilities[index]),
                "score": float(values.scores[index]),
                "h": plane.shape[0],
                "w": plane.shape[1],
                **encode(plane),
            }
        )
    return rows


@functools.cache
def table_schema(map_type: MapType = "float16") -> Any:
    """The columns of `ParquetWriter`, a ``pyarrow.Schema``."""
    import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]

    cell = pa.uint8() if map_type == "uint8" else pa.float16()
    columns = [
        ("path", pa.string()),
        ("target", pa.int64()),
        ("label", pa.string()),
        ("probability", pa.float32()),
        ("score", pa.float32()),
        ("map", pa.list_(cell)),
        ("h", pa.int32()),
        ("w", pa.int32()),
        ("scale", pa.float32()),
    ]
    return pa.schema([*columns, ("offset", pa.float32())] if map_type == "uint8" else columns)


def as_utf8(path: str) -> str:
    """A path as a column of text can hold it: it may hold bytes that are no UTF-8."""
    return os.fsencode(path).decode("utf-8", "replace")


def _as_float16(plane: NDArray[np.float32]) -> dict[str, Any]:
    scale = _scale(plane)
    return {"map": (plane / np.float32(scale)).astype(np.float16).ravel(), "scale": scale}


def _as_uint8(plane: NDArray[np.float32]) -> dict[str, Any]:
    """The range of the map in 255 steps."""
    if not np.isfinite(plane).all():
        nothing = np.zeros(plane.size, np.uint8)
        return {"map": nothing, "scale": math.nan, "offset": math.nan}
    # In float64: the range of a float32 map may be beyond float32.
    low, high = (float(plane.min()), float(plane.max())) if plane.size else (0.0, 0.0)
    scale = (high - low) / 255
    steps = (plane.astype(np.float64) - low) / (scale or 1.0)
    return {"map": np.rint(steps).astype(np.uint8).ravel(), "scale": scale, "offset": low}


def _scale(plane: NDArray[np.float32]) -> float:
    """1.0 where float16 holds the map as it is, else the power of two that brings it near 1."""
    sizes = np.abs(plane[np.isfinite(plane)])
    largest = float(sizes.max()) if sizes.size else 0.0
    # Below 2**-4 the map's small values begin to lose digits (float16 is normal above 2**-14).
    if largest == 0.0 or 2.0**-4 <= largest < 65504.0:
        return 1.0
    return float(2.0 ** max(-126, math.frexp(largest)[1]))
