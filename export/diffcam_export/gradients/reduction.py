"""Sums, means, maxima and norms over axes."""

from collections.abc import Sequence

import onnx_ir as ir

from diffcam_export.emit import Emitter
from diffcam_export.gradients.registry import first_rule, refusal
from diffcam_export.gradients.shapes import (
    BOOL,
    count_of,
    ints_of,
    normalised,
    rank,
    shape_of,
)


def _x(node: ir.Node) -> ir.Value:
    x = node.inputs[0]
    assert x is not None
    return x


def _axes(node: ir.Node) -> Sequence[int]:
    """The axes that are reduced, counted from the front."""
    ndim = rank(_x(node))
    axes: Sequence[int] | None = node.attributes.get_ints("axes", None)
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        axes = ints_of(node.inputs[1])
        if axes is None:
            raise refusal(node, "its axes are computed when the model runs")
    if not axes:
        return [] if node.attributes.get_int("noop_with_empty_axes", 0) else range(ndim)
    return sorted(normalised(axis, ndim) for axis in axes)


def _kept(value: ir.Value, node: ir.Node, axes: Sequence[int], emit: Emitter) -> ir.Value:
    """The result, or its cotangent, with the reduced axes of size 1 in place."""
    if node.attributes.get_int("keepdims", 1) or not axes:
        return value
    return emit("Unsqueeze", value, emit.ints(*axes))


@first_rule("ReduceSum", "ReduceMean")
def _sum(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    x, axes = _x(node), _axes(node)
    if not axes:
        return grad
    if node.op_type == "ReduceMean":
        grad = emit("Div", grad, count_of(x, axes, grad, emit))
    return emit("Expand", _kept(grad, node, axes, emit), shape_of(x, emit))


@first_rule("ReduceMax", "ReduceMin")
def _max(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    """Equal maxima share, as those of torch.amax do."""
    x, axes = _x(node), _axes(node)
    if not axes:
        return grad
    y = _kept(node.outputs[0], node, axes, emit)
    hit = emit("Equal", x, y, dtype=BOOL)
    hits = emit("Where", hit, emit.like(grad, 1.0), emit.like(grad, 0.0), dtype=grad.dtype)
    share = emit("ReduceSum", hits, emit.ints(*axes), keepdims=1)
    return emit("Mul", hits, emit("Div", _kept(grad, node, axes, emit), share))


@first_rule("ReduceL1")
def _l1(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    return emit("Mul", emit("Sign", _x(node)), _kept(grad, node, _axes(node), emit))


@first_rule("ReduceL2")
def _l2(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    """`g x / |x|`, and 0 where all are 0."""
    axes = _axes(node)
    y = node.outputs[0]
    none = emit("Equal", y, emit.like(y, 0.0), dtype=BOOL)
    y = emit("Where", none, emit.like(y, 1.0), y, dtype=y.dtype)
    return emit("Mul", _x(node), _kept(emit("Div", grad, y), node, axes, emit))


@first_rule("ReduceSumSquare")
def _sum_square(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    twice = emit("Mul", grad, emit.like(grad, 2.0))
    return emit("Mul", _x(node), _kept(twice, node, _axes(node), emit))


@first_rule("ReduceLogSumExp")
def _log_sum_exp(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    axes = _axes(node)
    y = _kept(node.outputs[0], node, axes, emit)
    share = emit("Exp", emit("Sub", _x(node), y))
    return emit("Mul", share, _kept(grad, node, axes, emit))


@first_rule("ReduceLogSum")
def _log_sum(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    x, axes = _x(node), _axes(node)
    share = emit("Div", grad, emit("Exp", node.outputs[0]))
    return emit("Expand", _kept(share, node, axes, emit), shape_of(x, emit))
