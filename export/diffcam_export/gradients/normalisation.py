"""Normalisation; statistics are taken in float32 where the model is in half precision."""

from collections.abc import Sequence

import onnx_ir as ir

from diffcam_export.emit import Emitter
from diffcam_export.gradients.registry import first_rule, refusal
from diffcam_export.gradients.shapes import (
    normalised,
    rank,
    reshape_like,
    sizes_of,
    static_shape,
)

_HALF = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


def _first(node: ir.Node) -> ir.Value:
    x = node.inputs[0]
    assert x is not None
    return x


def _raised(value: ir.Value, emit: Emitter) -> ir.Value:
    if value.dtype not in _HALF:
        return value
    return emit("Cast", value, dtype=ir.DataType.FLOAT, to=ir.DataType.FLOAT.value)


def _lowered(value: ir.Value, like: ir.Value, emit: Emitter) -> ir.Value:
    if like.dtype is None or value.dtype == like.dtype:
        return value
    return emit("Cast", value, dtype=like.dtype, to=like.dtype.value)


def _column(values: ir.Value, ndim: int, emit: Emitter) -> ir.Value:
    """(C,) to (C, 1, ...), beside an activation of so many axes with channels second."""
    return emit("Reshape", values, emit.ints(-1, *[1] * (ndim - 2)))


@first_rule("BatchNormalization")
def _batch(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    """`g scale / sqrt(var + eps)`: constants, which the runtime folds into one."""
    x, scale, _, _, variance = node.inputs
    assert x is not None and scale is not None and variance is not None
    if node.attributes.get_int("training_mode", 0):
        raise refusal(node, "it is in training mode")
    epsilon = emit.like(variance, node.attributes.get_float("epsilon", 1e-5))
    deviation = emit("Sqrt", emit("Add", variance, epsilon))
    slope = emit("Div", emit("CastLike", scale, deviation, dtype=deviation.dtype), deviation)
    slope = _lowered(slope, grad, emit)
    return emit("Mul", grad, _column(slope, rank(x), emit))


def _standardised(
    x: ir.Value, axes: Sequence[int], epsilon: float, emit: Emitter, *, centred: bool = True
) -> tuple[ir.Value, ir.Value]:
    """`(x - mean) / deviation`, and the deviation."""
    over = emit.ints(*axes)
    if centred:
        x = emit("Sub", x, emit("ReduceMean", x, over, keepdims=1))
    variance = emit("ReduceMean", emit("Mul", x, x), over, keepdims=1)
    deviation = emit("Sqrt", emit("Add", variance, emit.like(x, epsilon)))
    return emit("Div", x, deviation), deviation


def _normalised_grad(
    x: ir.Value,
    grad: ir.Value,
    axes: Sequence[int],
    epsilon: float,
    emit: Emitter,
    *,
    centred: bool = True,
) -> ir.Value:
    """`(g - mean g - n mean (g n)) / deviation` where n is the normalised x."""
    over = emit.ints(*axes)
    n, deviation = _standardised(x, axes, epsilon, emit, centred=centred)
    along = emit("Mul", n, emit("ReduceMean", emit("Mul", grad, n), over, keepdims=1))
    rest = emit("Sub", grad, along)
    if centred:
        rest = emit("Sub", rest, emit("ReduceMean", grad, over, keepdims=1))
    return emit("Div", rest, deviation)


@first_rule("LayerNormalization", "RMSNormalization")
def _layer(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    x, scale, *_ = node.inputs
    assert x is not None
    axis = normalised(node.attributes.get_int("axis", -1), rank(x))
    if scale is not None:
        grad = emit("Mul", grad, scale)
    result = _normalised_grad(
        _raised(x, emit),
        _raised(grad, emit),
        range(axis, rank(x)),
        node.attributes.get_float("epsilon", 1e-5),
        emit,
        centred=node.op_type == "LayerNormalization",
    )
    return _lowered(result, x, emit)


@first_rule("InstanceNormalization")
def _instance(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    x, scale, *_ = node.inputs
    assert x is not None and scale is not None
    grad = emit("Mul", grad, _column(scale, rank(x), emit))
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    axes = range(2, rank(x))
    result = _normalised_grad(_raised(x, emit), _raised(grad, emit), axes, epsilon, emit)
    return _lowered(result, x, emit)


@first_rule("GroupNormalization")
def _group(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    """Its scale is one for each group up to opset 20, one for each channel behind that."""
    x, scale, *_ = node.inputs
    assert x is not None and scale is not None
    groups = node.attributes.get_int("num_groups")
    if static_shape(scale) != (groups,):
        grad = emit("Mul", grad, _column(scale, rank(x), emit))
        scale = None
    split = emit.ints(0, groups, -1)
    rows, grad = emit("Reshape", x, split), emit("Reshape", grad, split)
    if scale is not None:
        grad = emit("Mul", grad, emit("Reshape", scale, emit.ints(groups, 1)))
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    result = _normalised_grad(_raised(rows, emit), _raised(grad, emit), [2], epsilon, emit)
    return reshape_like(_lowered(result, x, emit), x, emit)


@first_rule("LpNormalization")
def _lp(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    """`(g - s sum (g y)) / |x|`, where `y = x / |x|` and s is y, or the sign of x for p = 1."""
    x, y = _first(node), node.outputs[0]
    axis = emit.ints(node.attributes.get_int("axis", -1))
    first = node.attributes.get_int("p", 2) == 1
    norm = emit("ReduceL1" if first else "ReduceL2", x, axis, keepdims=1)
    along = emit("ReduceSum", emit("Mul", grad, y), axis, keepdims=1)
    slope = emit("Sign", x) if first else y
    return emit("Div", emit("Sub", grad, emit("Mul", slope, along)), norm)


@first_rule("LRN")
def _lrn(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    """With `D = bias + alpha / size S(x^2)` and S the sum over neighbouring channels:
    `g D^-beta - 2 alpha beta / size x S'(g y / D)`.
    """
    x, y = _first(node), node.outputs[0]
    size = node.attributes.get_int("size")
    alpha = node.attributes.get_float("alpha", 1e-4)
    beta = node.attributes.get_float("beta", 0.75)
    before, behind = (size - 1) // 2, size // 2
    mean = _channel_mean(emit("Mul", x, x), x, size, before, behind, emit)
    base = emit("Mul", mean, emit.like(x, alpha))
    base = emit("Add", base, emit.like(x, node.attributes.get_float("bias", 1.0)))
    direct = emit("Mul", grad, emit("Pow", base, emit.like(x, -beta)))
    # A channel lies in the windows of the channels in whose window it lies: mirrored.
    shared = emit("Div", emit("Mul", grad, y), base)
    shared = _channel_mean(shared, x, size, behind, before, emit)
    shared = emit("Mul", emit("Mul", shared, x), emit.like(x, 2.0 * alpha * beta))
    return emit("Sub", direct, shared)


def _channel_mean(
    value: ir.Value, like: ir.Value, size: int, before: int, behind: int, emit: Emitter
) -> ir.Value:
    """Over neighbouring channels; beyond the first and the last are zeros."""
    channels = sizes_of(like, [1], emit)
    shape = emit("Concat", emit.ints(0, 1), channels, emit.ints(-1), axis=0)
    if (count := static_shape(like)[1]) is not None:
        shape = emit.ints(0, 1, count, -1)
    pooled = emit(
        "AveragePool",
        emit("Reshape", value, shape),
        kernel_shape=[size, 1],
        pads=[before, 0, behind, 0],
        count_include_pad=1,
    )
    return reshape_like(pooled, like, emit)
