"""The first principal component, without the decomposition that ONNX does not have.

    M = X v,   X (P, C) less the mean of each column, v its first right singular vector

The Gram matrix of X, of cells or of channels, whichever are fewer, is squared until one eigenvalue
is left: a share e of another becomes e^2 each time. What remains is u u^T, and its longest column
is u.

All of it is float64, which ONNX Runtime multiplies on CPU and CUDA. On spectra whose two largest
singular values agree to 1e-2, 1e-4 and 1e-6 it is off by 5e-8 of the largest cell, which is the
rounding of the result; the same in float32 by 1e-6, 6e-5 and 1e-2. And only in float64 is the mean
of equal float32 numbers that number, so that constant channels leave nothing.
"""

import numpy as np
import onnx_ir as ir

from diffcam_export.analysis import Found
from diffcam_export.emit import Emitter
from diffcam_export.layer import cells, sizes
from diffcam_export.methods.form import Explained
from diffcam_export.reductions import not_zero
from diffcam_fast.methods import Method

_DOUBLE, _FLOAT = ir.DataType.DOUBLE, ir.DataType.FLOAT
_BOOL, _INT64 = ir.DataType.BOOL, ir.DataType.INT64

# Singular values that agree to 1e-9 are told apart; usual ones take eight.
_SQUARINGS = 32
# One less the sum of the squared shares: twice the share of all but the first, which is squared
# once more.
_LEFT = 1e-8
# Where the number of cells is free, fewer channels than this are the smaller side.
_FEW_CHANNELS = 256


def eigen_cam(at: Explained, found: Found) -> ir.Value:
    """The component of the activations, the same for every class."""
    emit = at.emit
    x = emit("Unsqueeze", cells(emit, found.layer, found), emit.ints(1))
    maps = component(emit, x, of_cells=fewer_cells(found))
    if at.several:
        maps = emit("Expand", maps, emit("Shape", at.column, dtype=_INT64))
    return at.of_known(maps)


def no_gradient(method: Method, found: Found) -> tuple[str, str]:
    """What is told of the way to `eigen_cam`."""
    return "principal component", "of the activations alone: no class and no gradient takes part"


def component(emit: Emitter, x: ir.Value, *, of_cells: bool) -> ir.Value:
    """(N, T, P) float32 from (N, T, C, P) float32; see `diffcam_kernels.reference.eigen_cam`.

    Args:
        emit: what writes the nodes.
        x: whose component it is.
        of_cells: square the Gram matrix of the cells, and not that of the channels.
    """
    x = emit("Cast", x, dtype=_DOUBLE, to=_DOUBLE)
    x = emit("Sub", x, emit("ReduceMean", x, emit.ints(3), keepdims=1))
    across = emit("Transpose", x, perm=[0, 1, 3, 2])
    gram = emit("MatMul", across, x) if of_cells else emit("MatMul", x, across)
    u = _longest_column(emit, _squared(emit, _over(emit, gram, _square_sum(emit, x, 2, 3))))
    v = _over(emit, u, _length(emit, u))
    if of_cells:
        v = emit("MatMul", x, v)
        v = _over(emit, v, _length(emit, v))
    maps = emit("Squeeze", emit("MatMul", across, v), emit.ints(3))
    return _signed(emit, emit("Cast", maps, dtype=_FLOAT, to=_FLOAT))


def fewer_cells(found: Found) -> bool:
    """Whether a layer has fewer cells than channels, as far as the file tells."""
    channels, height, width = sizes(found)
    if not isinstance(channels, int):
        return True
    if isinstance(height, int) and isinstance(width, int):
        return height * width <= channels
    return channels >= _FEW_CHANNELS


def _squared(emit: Emitter, power: ir.Value) -> ir.Value:
    """A matrix of trace 1 to a high power, its trace 1; as often as the slowest image needs."""
    body = Emitter(f"{emit.prefix}/power")
    step = ir.val(f"{body.prefix}/step", _INT64, [])
    going = ir.val(f"{body.prefix}/going", _BOOL, [])
    before = ir.val(f"{body.prefix}/before", _DOUBLE, [None] * 4)
    # The trace of the square; 0 for 0, of which there is nothing to wait for, nor of NaN.
    trace = not_zero(body, _square_sum(body, before, 2, 3))
    after = body("Div", body("MatMul", before, before), trace)
    more = body("Less", trace, body.like(trace, 1 - _LEFT), dtype=_BOOL)
    count = body("ReduceSum", body("Cast", more, dtype=_FLOAT, to=_FLOAT), keepdims=0)
    some = body("Greater", count, body.like(count, 0), dtype=_BOOL)
    some.shape, after.shape = ir.Shape([]), ir.Shape([None] * 4)
    graph = ir.Graph([step, going, before], [some, after], nodes=body.nodes, name=body.prefix)
    most = emit.constant(np.array(_SQUARINGS, np.int64))
    return emit("Loop", most, None, power, dtype=_DOUBLE, body=graph)


def _longest_column(emit: Emitter, matrix: ir.Value) -> ir.Value:
    """(N, T, R, 1) of (N, T, R, R)."""
    lengths = _square_sum(emit, matrix, 2)
    which = emit("ArgMax", lengths, dtype=_INT64, axis=3, keepdims=1)
    size = emit("Shape", matrix, dtype=_INT64, start=3, end=4)
    column = emit("Expand", which, emit("Concat", emit.ints(1, 1), size, emit.ints(1), axis=0))
    return emit("GatherElements", matrix, column, axis=3)


def _signed(emit: Emitter, maps: ir.Value) -> ir.Value:
    """Maps (N, T, P) whose cell of the largest magnitude is positive, of several the first."""
    peak = emit("ArgMax", emit("Abs", maps), dtype=_INT64, axis=2, keepdims=1)
    value = emit("GatherElements", maps, peak, axis=2)
    negative = emit("Less", value, emit.like(maps, 0), dtype=_BOOL)
    sign = emit("Where", negative, emit.like(maps, -1), emit.like(maps, 1), dtype=maps.dtype)
    return emit("Mul", maps, sign)


def _square_sum(emit: Emitter, x: ir.Value, *axes: int) -> ir.Value:
    return emit("ReduceSumSquare", x, emit.ints(*axes), keepdims=1)


def _length(emit: Emitter, x: ir.Value) -> ir.Value:
    return emit("Sqrt", _square_sum(emit, x, 2))


def _over(emit: Emitter, x: ir.Value, size: ir.Value) -> ir.Value:
    """x / size, and x where size is 0."""
    return emit("Div", x, not_zero(emit, size))
