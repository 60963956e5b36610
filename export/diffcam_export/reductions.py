"""The reductions as nodes: from activations and gradients, or weights, to a map.

The definitions are `diffcam_kernels.reference.REDUCTIONS`; a reduction is one function here, from A
and G (N, C, P) float32 to a map (N, 1, P).
"""

from collections.abc import Callable

import onnx_ir as ir

from diffcam_export.emit import Emitter

Reduction = Callable[[Emitter, ir.Value, ir.Value], ir.Value]


def weighted(emit: Emitter, weights: ir.Value, a: ir.Value) -> ir.Value:
    """M = sum_k w_k A_k, (N, T, P), from w (N, T, C) and A (N, C, P)."""
    return emit("MatMul", weights, a)


def _row(emit: Emitter, per_channel: ir.Value) -> ir.Value:
    """(N, C, 1) as a row (N, 1, C)."""
    return emit("Transpose", per_channel, perm=[0, 2, 1])


def _total(emit: Emitter, x: ir.Value) -> ir.Value:
    """Over the cells, (N, C, 1)."""
    return emit("ReduceSum", x, emit.ints(2), keepdims=1)


def _grad_cam(emit: Emitter, a: ir.Value, g: ir.Value) -> ir.Value:
    w = emit("ReduceMean", g, emit.ints(2), keepdims=1)
    return weighted(emit, _row(emit, w), a)


def _grad_cam_pp(emit: Emitter, a: ir.Value, g: ir.Value) -> ir.Value:
    below = emit("Add", emit("Mul", _total(emit, a), g), emit.like(g, 2))
    zero = emit.like(g, 0)
    left_out = emit(
        "Or",
        emit("Equal", below, zero, dtype=ir.DataType.BOOL),
        emit("LessOrEqual", g, zero, dtype=ir.DataType.BOOL),
    )
    alpha = emit("Where", left_out, zero, emit("Reciprocal", below), dtype=g.dtype)
    total = _total(emit, alpha)
    w = emit("Div", _total(emit, emit("Mul", alpha, g)), not_zero(emit, total))
    return weighted(emit, _row(emit, w), a)


def _xgrad_cam(emit: Emitter, a: ir.Value, g: ir.Value) -> ir.Value:
    total = _total(emit, a)
    dead = emit("Equal", total, emit.like(a, 0), dtype=ir.DataType.BOOL)
    ratio = emit("Div", _total(emit, emit("Mul", g, a)), not_zero(emit, total))
    w = emit("Where", dead, emit.like(a, 0), ratio, dtype=a.dtype)
    return weighted(emit, _row(emit, w), a)


def _layer_cam(emit: Emitter, a: ir.Value, g: ir.Value) -> ir.Value:
    return _hires_cam(emit, a, emit("Relu", g))


def _hires_cam(emit: Emitter, a: ir.Value, g: ir.Value) -> ir.Value:
    return emit("ReduceSum", emit("Mul", g, a), emit.ints(1), keepdims=1)


def not_zero(emit: Emitter, x: ir.Value) -> ir.Value:
    """x, and 1 where it is 0."""
    zero = emit("Equal", x, emit.like(x, 0), dtype=ir.DataType.BOOL)
    return emit("Where", zero, emit.like(x, 1), x, dtype=x.dtype)


REDUCTIONS: dict[str, Reduction] = {
    "grad_cam": _grad_cam,
    "grad_cam_pp": _grad_cam_pp,
    "xgrad_cam": _xgrad_cam,
    "layer_cam": _layer_cam,
    "hires_cam": _hires_cam,
}
