"""Pictures as nodes: heatmaps of the maps, and the network's input from photographs."""

import math
from typing import Literal

import numpy as np
import onnx_ir as ir

from diffcam_export.emit import Emitter
from diffcam_fast.images.preprocess import Preprocess

HeatmapType = Literal["float32", "uint8"]


def heatmap(emit: Emitter, maps: ir.Value, size: ir.Value, kind: HeatmapType) -> ir.Value:
    """Min-max of each map to [0, 1], then bilinear upsampling; (N, T, H, W).

    The definition is `diffcam_kernels.reference.heatmap`.

    Args:
        emit: what writes the nodes.
        maps: (N, T, h, w) float32.
        size: H and W, int64 (2,).
        kind: float32 in [0, 1], or uint8 holding round(255 v) and 0 for NaN.
    """
    cells = emit.ints(2, 3)
    low = emit("ReduceMin", maps, cells, keepdims=1)
    span = emit("Sub", emit("ReduceMax", maps, cells, keepdims=1), low)
    constant = emit("Equal", span, emit.like(span, 0), dtype=ir.DataType.BOOL)
    divisor = emit("Where", constant, emit.like(span, 1), span, dtype=span.dtype)
    unit = emit("Div", emit("Sub", maps, low), divisor)
    # Of a map with NaN all is NaN: a minimum need not carry it on.
    unit = emit("Add", unit, emit("Mul", emit("ReduceSum", unit, cells, keepdims=1), _zero(emit)))
    whole = emit(
        "Concat", emit("Shape", maps, dtype=ir.DataType.INT64, start=0, end=2), size, axis=0
    )
    resized = emit(
        "Resize",
        unit,
        None,
        None,
        whole,
        mode="linear",
        coordinate_transformation_mode="half_pixel",
    )
    # Interpolation weights may sum to one unit in the last place above 1.
    heat = emit("Clip", resized, emit.like(resized, 0), emit.like(resized, 1))
    if kind == "float32":
        return heat
    broken = emit("IsNaN", heat, dtype=ir.DataType.BOOL)
    known = emit("Where", broken, emit.like(heat, 0), heat, dtype=heat.dtype)
    scaled = emit("Mul", known, emit.like(heat, 255))
    # Whole numbers are cut off, not rounded.
    return emit(
        "Cast",
        emit("Add", scaled, emit.like(heat, 0.5)),
        dtype=ir.DataType.UINT8,
        to=ir.DataType.UINT8,
    )


def _zero(emit: Emitter) -> ir.Value:
    return emit.constant(np.array(0, dtype=np.float32))


def prepared(
    emit: Emitter, photographs: ir.Value, preprocess: Preprocess, dtype: ir.DataType
) -> ir.Value:
    """The network's input (N, 3, H, W) from uint8 photographs (N, height, width, 3).

    Follows `diffcam_fast.images.preprocess.Preprocess`, with ONNX's antialiasing in place of
    Pillow's, whose weights are whole numbers: a few bytes in a thousand differ, by 1.

    Args:
        emit: what writes the nodes.
        photographs: all of one size.
        preprocess: of the network.
        dtype: element type of the network's input.
    """
    planes = emit("Transpose", photographs, perm=[0, 3, 1, 2])
    x = emit("Cast", planes, dtype=ir.DataType.FLOAT, to=ir.DataType.FLOAT)
    sides = emit("Shape", photographs, dtype=ir.DataType.INT64, start=1, end=3)
    target = [math.floor(side / preprocess.crop_pct + 1e-6) for side in preprocess.size]
    resized = _resized_sides(emit, sides, target)
    first, last = (
        emit("Slice", resized, emit.ints(i), emit.ints(i + 1), emit.ints(0)) for i in (0, 1)
    )
    # One axis after the other, with bytes between them, as Pillow does: width, then height.
    old_height = emit("Shape", photographs, dtype=ir.DataType.INT64, start=1, end=2)
    x = _resized(emit, x, [old_height, last], preprocess)
    x = _resized(emit, x, [first, last], preprocess)
    x = _cropped(emit, x, resized, preprocess.size)
    mean = 255 * np.array(preprocess.mean, np.float32)[:, None, None]
    std = 255 * np.array(preprocess.std, np.float32)[:, None, None]
    x = emit("Div", emit("Sub", x, emit.constant(mean)), emit.constant(std))
    return x if dtype == x.dtype else emit("Cast", x, dtype=dtype, to=dtype)


def _resized(emit: Emitter, x: ir.Value, sides: list[ir.Value], preprocess: Preprocess) -> ir.Value:
    """x (N, C, height, width) at other sides, int64 (1,) each; whole numbers from 0 to 255."""
    kept = emit("Shape", x, dtype=ir.DataType.INT64, start=0, end=2)
    cubic = preprocess.interpolation == "bicubic"
    x = emit(
        "Resize",
        x,
        None,
        None,
        emit("Concat", kept, *sides, axis=0),
        mode="cubic" if cubic else "linear",
        coordinate_transformation_mode="half_pixel",
        antialias=1,
        # As Pillow has them: its own filter, and beyond the border weights are renormalised.
        cubic_coeff_a=-0.5,
        exclude_outside=int(cubic),
    )
    # Bytes have no value beyond 0 and 255; a cubic filter overshoots. Half a byte goes up, which
    # it does not in Round.
    x = emit("Clip", x, emit.like(x, 0), emit.like(x, 255))
    return emit("Floor", emit("Add", x, emit.like(x, 0.5)))


def _resized_sides(emit: Emitter, sides: ir.Value, target: list[int]) -> ir.Value:
    """Height and width, int64 (2,), of the resized photographs: the short side fits its target."""
    height, width = target
    if height == width:
        short = emit("ReduceMin", sides, emit.ints(0), keepdims=1)
        return emit("Div", emit("Mul", sides, emit.ints(height)), short)
    real = emit("Cast", sides, dtype=ir.DataType.DOUBLE, to=ir.DataType.DOUBLE)
    ratios = emit("Div", real, emit.constant(np.array(target, np.float64)))
    ratio = emit("ReduceMin", ratios, emit.ints(0), keepdims=1)
    rounded = emit("Round", emit("Div", real, ratio))
    whole = emit("Cast", rounded, dtype=ir.DataType.INT64, to=ir.DataType.INT64)
    return emit("Max", whole, emit.ints(height, width))


def _cropped(emit: Emitter, x: ir.Value, sides: ir.Value, size: tuple[int, int]) -> ir.Value:
    """The centre of x (N, C, height, width), with Python's rounding of half a pixel."""
    spare = emit("Sub", sides, emit.ints(*size))
    half = emit(
        "Mul",
        emit("Cast", spare, dtype=ir.DataType.FLOAT, to=ir.DataType.FLOAT),
        emit.constant(np.array(0.5, np.float32)),
    )
    start = emit("Cast", emit("Round", half), dtype=ir.DataType.INT64, to=ir.DataType.INT64)
    return emit("Slice", x, start, emit("Add", start, emit.ints(*size)), emit.ints(2, 3))
