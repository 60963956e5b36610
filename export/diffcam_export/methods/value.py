"""The score of other logits as nodes; the definition is `diffcam_fast.Contrast.value`.

    F = z_c - T (LSE_j(z_j / T) - log J) over the J classes that c is held against

Without a contrast, under the mean and under weights that is sum_k d_k z_k with one d for all logits
of an image: then nothing of the size of the logits times cells or channels is made.
"""

import math

import onnx_ir as ir

from diffcam_export.contrast import (
    COLDEST,
    numbered,
    reference_mask,
    with_nan_of,
)
from diffcam_export.emit import Emitter
from diffcam_export.layer import cast
from diffcam_export.methods.form import Explained

_BOOL, _FLOAT = ir.DataType.BOOL, ir.DataType.FLOAT


def linear_value(at: Explained, logits: ir.Value) -> ir.Value:
    """F (N, T, 1) of other logits (N, K) under a linear contrast."""
    emit, zero = at.emit, at.emit.like(logits, 0)
    # Classes with d = 0 take no part, be they -inf.
    left_out = emit("Equal", at.d, zero, dtype=_BOOL)
    products = emit("Mul", at.d, emit("Unsqueeze", logits, emit.ints(1)))
    products = emit("Where", left_out, zero, products, dtype=_FLOAT)
    return emit("ReduceSum", products, emit.ints(2), keepdims=1)


def value(emit: Emitter, at: Explained, rows: ir.Value, target: ir.Value) -> ir.Value:
    """F (N, 1, R) of R sets of logits an image, under a contrast that is not linear.

    Args:
        emit: what writes the nodes.
        at: whose contrast it is.
        rows: (N, K, R).
        target: (N, 1), the class of each image.
    """
    difference, total, taken = _parts(emit, at, rows, target)
    if total is None or taken is None:
        return difference
    count = _over_classes(emit, "ReduceSum", taken)
    return emit("Sub", difference, _times_t(emit, at, emit("Log", emit("Div", total, count))))


def lost_value(emit: Emitter, at: Explained, rows: ir.Value, target: ir.Value) -> ir.Value:
    """F of the first of R sets of logits less that of each other, (N, 1, R - 1); as `value`.

    Logits that are almost the same differ by the logarithm of a quotient, which is near 0: that of
    two logarithms would be rounded away.
    """
    difference, total, _ = _parts(emit, at, rows, target)
    first, others = _first_and_others(emit, difference)
    lost = emit("Sub", first, others)
    if total is None:
        return lost
    first, others = _first_and_others(emit, total)
    return emit("Add", lost, _times_t(emit, at, emit("Log", emit("Div", others, first))))


def _parts(
    emit: Emitter, at: Explained, rows: ir.Value, target: ir.Value
) -> tuple[ir.Value, ir.Value | None, ir.Value | None]:
    """z_c - max_j z_j (N, 1, R), and None for T = 0: sum_j exp((z_j - max) / T), and which classes
    take part (N, K, 1), 0 or 1.
    """
    t = at.contrast.temperature
    assert t is not None
    chosen = _chosen(emit, at, target)
    zero = emit.like(rows, 0)
    own = _over_classes(emit, "ReduceSum", emit("Where", chosen, rows, zero, dtype=_FLOAT))
    others = _others(emit, at, rows, chosen)
    largest = _over_classes(emit, "ReduceMax", others)
    difference = emit("Sub", own, largest)
    if t < COLDEST:
        return difference, None, None
    # A class of -inf takes no part, and is one in all rows.
    plain = _others(emit, at, emit("Unsqueeze", at.logits, emit.ints(2)), chosen)
    part = emit("Greater", plain, emit.like(plain, -math.inf), dtype=_BOOL)
    taken = cast(emit, part, _FLOAT)
    below = emit("Sub", others, largest)
    if t != 1:
        below = emit("Div", below, emit.like(rows, t))
    # A product rounds less than a sum over the first axis but one.
    total = emit("MatMul", emit("Transpose", taken, perm=[0, 2, 1]), emit("Exp", below))
    return difference, total, taken


def _times_t(emit: Emitter, at: Explained, x: ir.Value) -> ir.Value:
    t = at.contrast.temperature
    assert t is not None
    return x if t == 1 else emit("Mul", x, emit.like(x, t))


def _first_and_others(emit: Emitter, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """(N, 1, 1) and (N, 1, R - 1) of (N, 1, R)."""
    one, axis = emit.ints(1), emit.ints(2)
    return (
        emit("Slice", x, emit.ints(0), one, axis),
        emit("Slice", x, one, emit.ints(2**31), axis),
    )


def of_whole_images(at: Explained, maps: ir.Value) -> ir.Value:
    """Maps (N, T, P) made of `value`: NaN for a class that is none, and for logits of NaN."""
    z = at.emit("Unsqueeze", at.logits, at.emit.ints(1))
    return at.of_known(with_nan_of(at.emit, z, maps))


def _chosen(emit: Emitter, at: Explained, target: ir.Value) -> ir.Value:
    """(N, K, 1) bool."""
    every = emit("Unsqueeze", numbered(emit, at.logits), emit.ints(1))
    return emit("Equal", emit("Unsqueeze", target, emit.ints(2)), every, dtype=_BOOL)


def _others(emit: Emitter, at: Explained, rows: ir.Value, chosen: ir.Value) -> ir.Value:
    """Rows (N, K, R) with -inf for the classes that the chosen one is not held against."""
    least = emit.like(rows, -math.inf)
    others = emit("Where", chosen, least, rows, dtype=rows.dtype)
    if at.contrast.reference is None:
        return others
    taken = emit("Unsqueeze", reference_mask(emit, at.logits, at.contrast), emit.ints(1))
    return emit("Where", taken, others, least, dtype=rows.dtype)


def _over_classes(emit: Emitter, operator: str, x: ir.Value) -> ir.Value:
    return emit(operator, x, emit.ints(1), keepdims=1)
