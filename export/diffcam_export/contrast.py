"""The contrast as nodes: from logits to the explained classes, and to d = e_c - q.

The definition is `diffcam_kernels.reference.contrast_gradient`.
"""

import math
from typing import Literal

import numpy as np
import onnx_ir as ir

from diffcam_export.emit import Emitter
from diffcam_fast.contrast import Contrast

Targets = Literal["predicted", "input"] | int
"""The predicted class, classes that the caller names, or the k classes of the largest logits."""

TARGETS_INPUT = "targets"
"""The name of the input that names classes."""

COLDEST, HOTTEST = (float(limit) for limit in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))
"""Temperatures beyond these are 0 and infinity to float32."""


def chosen_classes(
    emit: Emitter, logits: ir.Value, targets: Targets, asked: ir.Value | None
) -> ir.Value:
    """The classes to explain, (N, T) int64.

    Args:
        emit: what writes the nodes.
        logits: (N, K) float32.
        targets: which.
        asked: (1 or N, T) int64, the input that names classes where they are an input; -1 stands
            for the prediction.
    """
    if isinstance(targets, int) and targets > 1:
        _, classes = emit.several("TopK", logits, emit.ints(targets), outputs=2, axis=1)
        classes.dtype = ir.DataType.INT64
        return classes
    predicted = emit("ArgMax", logits, dtype=ir.DataType.INT64, axis=1, keepdims=1)
    if asked is None:
        return predicted
    absent = emit("Equal", asked, emit.ints(-1), dtype=ir.DataType.BOOL)
    return emit("Where", absent, predicted, asked, dtype=ir.DataType.INT64)


def contrast_gradient(
    emit: Emitter, logits: ir.Value, classes: ir.Value, contrast: Contrast, *, checked: bool
) -> ir.Value:
    """d = e_c - q, (N, T, K) float32.

    Args:
        emit: what writes the nodes.
        logits: (N, K) float32, K known.
        classes: (N, T) int64.
        contrast: with weights of shape (K,) where it has some.
        checked: NaN for a class that is none: a graph cannot raise.
    """
    column = emit("Unsqueeze", classes, emit.ints(2))
    target = emit("Equal", column, numbered(emit, logits), dtype=ir.DataType.BOOL)
    d = emit("Cast", target, dtype=ir.DataType.FLOAT, to=ir.DataType.FLOAT)
    if contrast.weights is not None:
        q = contrast.weights.float().cpu().numpy()
        d = emit("Sub", d, emit.constant(q))
    elif contrast.temperature is not None:
        d = emit("Sub", d, _blend(emit, logits, target, contrast))
    if checked:
        known = known_classes(emit, column, logits)
        d = emit("Where", known, d, emit.like(d, math.nan), dtype=d.dtype)
    return d


def known_classes(emit: Emitter, classes: ir.Value, logits: ir.Value) -> ir.Value:
    """Which of some numbers are classes of logits (N, K), bool."""
    low = emit("GreaterOrEqual", classes, emit.ints(0), dtype=ir.DataType.BOOL)
    high = emit("Less", classes, emit.ints(_classes(logits)), dtype=ir.DataType.BOOL)
    return emit("And", low, high)


def numbered(emit: Emitter, logits: ir.Value) -> ir.Value:
    """All classes of logits (N, K), 0 to K - 1; as a constant they would be most of what the file
    grows by.
    """
    start, end, step = (emit.constant(np.array(n, np.int64)) for n in (0, _classes(logits), 1))
    return emit("Range", start, end, step)


def reference_mask(emit: Emitter, logits: ir.Value, contrast: Contrast) -> ir.Value:
    """The reference classes of a contrast that has some, (K,) bool."""
    taken = np.zeros(_classes(logits), dtype=np.bool_)
    taken[list(contrast.reference or ())] = True
    return emit.constant(taken)


def _blend(emit: Emitter, logits: ir.Value, target: ir.Value, contrast: Contrast) -> ir.Value:
    """q (N, T, K): a softmax of the other classes at the temperature of the contrast."""
    assert contrast.temperature is not None
    z = emit("Unsqueeze", logits, emit.ints(1))
    least = emit.like(z, -math.inf)
    # Not the constant alone: a target of NaN stays, and makes all of q NaN.
    others = emit("Where", target, emit("Min", z, least), z, dtype=z.dtype)
    if contrast.reference is not None:
        taken = reference_mask(emit, logits, contrast)
        others = emit("Where", taken, others, emit("Min", z, least), dtype=z.dtype)
    if contrast.temperature > HOTTEST:
        within = emit("Greater", others, least, dtype=ir.DataType.BOOL)
        taken_part = emit("Cast", within, dtype=ir.DataType.FLOAT, to=ir.DataType.FLOAT)
        count = emit("ReduceSum", taken_part, emit.ints(2), keepdims=1)
        return with_nan_of(emit, z, emit("Div", taken_part, count))
    if contrast.temperature < COLDEST:
        best = emit("ArgMax", others, dtype=ir.DataType.INT64, axis=2, keepdims=1)
        first = emit("Equal", best, numbered(emit, logits), dtype=ir.DataType.BOOL)
        return with_nan_of(emit, z, emit("Cast", first, dtype=z.dtype, to=z.dtype))
    if contrast.temperature != 1:
        # The maximum goes first: z / T overflows for a small T.
        others = emit("Sub", others, emit("ReduceMax", others, emit.ints(2), keepdims=1))
        others = emit("Div", others, emit.like(z, contrast.temperature))
    return emit("Softmax", others, axis=2)


def _classes(logits: ir.Value) -> int:
    assert logits.shape is not None
    k = logits.shape[1]
    assert isinstance(k, int)
    return k


def with_nan_of(emit: Emitter, z: ir.Value, q: ir.Value) -> ir.Value:
    """q (N, _, _), and NaN for every image with a logit of NaN in z (N, 1, K); a softmax does so
    by itself.
    """
    nan = emit("IsNaN", z, dtype=ir.DataType.BOOL)
    number = emit("Cast", nan, dtype=ir.DataType.FLOAT, to=ir.DataType.FLOAT)
    some = emit("ReduceMax", number, emit.ints(2), keepdims=1)
    broken = emit("Cast", some, dtype=ir.DataType.BOOL, to=ir.DataType.BOOL)
    return emit("Where", broken, emit.like(q, math.nan), q, dtype=q.dtype)
