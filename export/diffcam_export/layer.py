"""What a head reads of a target layer and of the weights behind it, as nodes."""

import onnx_ir as ir

from diffcam_export.analysis import Found
from diffcam_export.emit import Emitter

Size = int | str | None
"""Of an axis: a number, a name, or not known."""


def cells(emit: Emitter, value: ir.Value, found: Found) -> ir.Value:
    """(N, C, P) float32 of an activation or its gradient."""
    if found.channel_axis == 3:
        value = emit("Transpose", value, perm=[0, 3, 1, 2])
    c, h, w = sizes(found)
    # A 0 keeps an axis. With a batch of no images -1 would have no value.
    channels = c if isinstance(c, int) else 0
    count = h * w if isinstance(h, int) and isinstance(w, int) else -1
    return emit("Reshape", cast(emit, value, ir.DataType.FLOAT), emit.ints(0, channels, count))


def grid(emit: Emitter, maps: ir.Value, found: Found) -> ir.Value:
    """(N, T, h, w) from maps (N, T, P)."""
    _, height, width = sizes(found)
    # A 0 keeps the axis: N and T.
    if isinstance(height, int) and isinstance(width, int):
        return emit("Reshape", maps, emit.ints(0, 0, height, width))
    first = 1 if found.channel_axis == 3 else 2
    sides = emit("Shape", found.layer, dtype=ir.DataType.INT64, start=first, end=first + 2)
    return emit("Reshape", maps, emit("Concat", emit.ints(0, 0), sides, axis=0))


def sizes(found: Found) -> tuple[Size, Size, Size]:
    """C, h and w of the activation, as far as the file tells."""
    shape = found.layer.shape
    if shape is None:
        return None, None, None
    first, second, third = (size_of(size) for size in list(shape)[1:4])
    return (third, first, second) if found.channel_axis == 3 else (first, second, third)


def size_of(size: int | ir.SymbolicDim) -> Size:
    """As what writes a shape takes it."""
    return size if isinstance(size, int) else size.value


def cell_count(emit: Emitter, a: ir.Value) -> ir.Value:
    """P as a float32 number, from A (N, C, P)."""
    p = emit("Shape", a, dtype=ir.DataType.INT64, start=2, end=3)
    return emit("Cast", p, dtype=ir.DataType.FLOAT, to=ir.DataType.FLOAT)


def class_rows(emit: Emitter, found: Found) -> ir.Value:
    """W (K, C) float32 of a pooled linear head."""
    assert found.weight is not None
    weight = cast(emit, found.weight, ir.DataType.FLOAT)
    if found.weight_layout == "KC11":
        return emit("Flatten", weight, axis=1)
    return emit("Transpose", weight, perm=[1, 0]) if found.weight_layout == "CK" else weight


def cast(emit: Emitter, value: ir.Value, dtype: ir.DataType | None) -> ir.Value:
    """A value in this element type; None: in its own."""
    return value if dtype in (None, value.dtype) else emit("Cast", value, dtype=dtype, to=dtype)
