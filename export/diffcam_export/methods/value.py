"""The score of other logits as nodes; the definition is `diffcam_fast.Contrast.value`.

    F = z_c - T (LSE_j(z_j / T) - log J) over the J classes that c is held against

Without a contrast, under the mean and under weights that is sum_k d_k z_k with one d for all logits
of an image: then nothing of the size of the logits times cells or channels is made.
"""

import onnx_ir as ir

from diffcam_export.contrast import (
    COLDEST,
    HOTTEST,
    numbered,
    reference_mask,
    with_nan_of,
)
from diffcam_export.emit import Emitter
from diffcam_export.layer import cast
from diffcam_export.methods.form import Explained
from diffcam_fast.contrast import Contrast

_BOOL, _FLOAT = ir.DataType.BOOL, ir.DataType.FLOAT


def is_linear(contrast: Contrast) -> bool:
    """Whether F is linear in the logits."""
    t = contrast.temperature
    return contrast.weights is not None or t is None or t > HOTTEST


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
    t = at.contrast.temperature
    assert t is not None
    chosen = _chosen(emit, at, target)
    zero = emit.like(rows, 0)
    own = _over_classes(emit, "ReduceSum", emit("Where", chosen, rows, zero, dtype=_FLOAT))
    others = _others(emit, at, rows, chosen)
    largest = _over_classes(emit, "ReduceMax", others)
    difference = emit("Sub", own, largest)
    if t < COLDEST:
        return difference
    below = emit("Sub", others, largest)
    if t != 1:
        below = emit("Div", below, emit.like(rows, t))
    total = _over_classes(emit, "ReduceSum", emit("Exp", below))
    # A class of -inf takes no part, and is one in all rows.
    plain = _others(emit, at, emit("Unsqueeze", at.logits, emit.ints(2)), chosen)
    part = emit("Greater", plain, emit.like(plain, -float("inf")), dtype=_BOOL)
    count = _over_classes(emit, "ReduceSum", cast(emit, part, _FLOAT))
    logarithm = emit("Log", emit("Div", total, count))
    if t != 1:
        logarithm = emit("Mul", logarithm, emit.like(rows, t))
    return emit("Sub", difference, logarithm)


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
    least = emit.like(rows, -float("inf"))
    others = emit("Where", chosen, least, rows, dtype=rows.dtype)
    if at.contrast.reference is None:
        return others
    taken = emit("Unsqueeze", reference_mask(emit, at.logits, at.contrast), emit.ints(1))
    return emit("Where", taken, others, least, dtype=rows.dtype)


def _over_classes(emit: Emitter, operator: str, x: ir.Value) -> ir.Value:
    return emit(operator, x, emit.ints(1), keepdims=1)
