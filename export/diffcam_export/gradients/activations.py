"""Activation functions; at kinks and bounds the gradient is PyTorch's."""

import math

import onnx_ir as ir

from diffcam_export.emit import Emitter
from diffcam_export.gradients.registry import first_rule
from diffcam_export.gradients.shapes import BOOL


def _x(node: ir.Node) -> ir.Value:
    x = node.inputs[0]
    assert x is not None
    return x


def _scaled(value: ir.Value, number: float, emit: Emitter) -> ir.Value:
    return value if number == 1.0 else emit("Mul", value, emit.like(value, number))


def _where(condition: ir.Value, a: ir.Value, b: ir.Value, emit: Emitter) -> ir.Value:
    return emit("Where", condition, a, b, dtype=a.dtype)


def _compare(operator: str, x: ir.Value, number: float, emit: Emitter) -> ir.Value:
    return emit(operator, x, emit.like(x, number), dtype=BOOL)


def _positive(x: ir.Value, emit: Emitter) -> ir.Value:
    return _compare("Greater", x, 0.0, emit)


def _one_minus(value: ir.Value, emit: Emitter) -> ir.Value:
    return emit("Sub", emit.like(value, 1.0), value)


@first_rule("Relu")
def _relu(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    # Nothing passes at 0.
    return _where(_positive(node.outputs[0], emit), grad, emit.like(grad, 0.0), emit)


@first_rule("LeakyRelu")
def _leaky_relu(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    slope = node.attributes.get_float("alpha", 0.01)
    return _where(_positive(_x(node), emit), grad, _scaled(grad, slope, emit), emit)


@first_rule("ThresholdedRelu")
def _thresholded_relu(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    above = _compare("Greater", _x(node), node.attributes.get_float("alpha", 1.0), emit)
    return _where(above, grad, emit.like(grad, 0.0), emit)


@first_rule("PRelu")
def _prelu(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    slope = node.inputs[1]
    return _where(_positive(_x(node), emit), grad, emit("Mul", grad, slope), emit)


@first_rule("Elu", "Selu", "Celu")
def _elu(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    selu = node.op_type == "Selu"
    alpha = node.attributes.get_float("alpha", 1.6732632 if selu else 1.0)
    gamma = node.attributes.get_float("gamma", 1.0507010) if selu else 1.0
    x = _x(node)
    # Of the negative part alone: exp of a large x would be infinite.
    below = emit("Min", x, emit.like(x, 0.0))
    if node.op_type == "Celu":
        slope = emit("Exp", _scaled(below, 1.0 / alpha, emit))
    else:
        slope = _scaled(emit("Exp", below), alpha, emit)
    slope = _where(_positive(x, emit), emit.like(slope, 1.0), slope, emit)
    return emit("Mul", grad, _scaled(slope, gamma, emit))


@first_rule("Clip")
def _clip(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    # Nothing passes at the bounds, as of torch.clamp and relu6.
    for bound, operator in zip(node.inputs[1:], ("Greater", "Less"), strict=False):
        if bound is not None:
            inside = emit(operator, _x(node), bound, dtype=BOOL)
            grad = _where(inside, grad, emit.like(grad, 0.0), emit)
    return grad


@first_rule("Sigmoid")
def _sigmoid(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    y = node.outputs[0]
    return emit("Mul", grad, emit("Mul", y, _one_minus(y, emit)))


@first_rule("HardSigmoid")
def _hard_sigmoid(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    y = node.outputs[0]
    inside = emit("And", _positive(y, emit), _compare("Less", y, 1.0, emit), dtype=BOOL)
    slope = node.attributes.get_float("alpha", 0.2)
    return _where(inside, _scaled(grad, slope, emit), emit.like(grad, 0.0), emit)


@first_rule("HardSwish")
def _hard_swish(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    x = _x(node)
    between = emit("Add", _scaled(x, 1.0 / 3.0, emit), emit.like(x, 0.5))
    below = _compare("LessOrEqual", x, -3.0, emit)
    slope = _where(_compare("Less", x, 3.0, emit), between, emit.like(x, 1.0), emit)
    return _where(below, emit.like(grad, 0.0), emit("Mul", grad, slope), emit)


@first_rule("Tanh")
def _tanh(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    y = node.outputs[0]
    return emit("Mul", grad, _one_minus(emit("Mul", y, y), emit))


@first_rule("Softplus")
def _softplus(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    return emit("Mul", grad, emit("Sigmoid", _x(node)))


@first_rule("Softsign")
def _softsign(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    x = _x(node)
    below = emit("Add", emit("Abs", x), emit.like(x, 1.0))
    return emit("Div", grad, emit("Mul", below, below))


@first_rule("Mish")
def _mish(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    x = _x(node)
    tanh = emit("Tanh", emit("Softplus", x))
    inner = emit(
        "Mul", emit("Mul", x, emit("Sigmoid", x)), _one_minus(emit("Mul", tanh, tanh), emit)
    )
    return emit("Mul", grad, emit("Add", tanh, inner))


@first_rule("Swish")
def _swish(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    """`s + a x s (1 - s)` where s is the sigmoid of a x."""
    x = _scaled(_x(node), node.attributes.get_float("alpha", 1.0), emit)
    s = emit("Sigmoid", x)
    slope = emit("Mul", s, emit("Add", emit("Mul", x, _one_minus(s, emit)), emit.like(x, 1.0)))
    return emit("Mul", grad, slope)


@first_rule("Erf")
def _erf(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    return emit("Mul", grad, _gaussian(_x(node), 1.0, 2.0 / math.sqrt(math.pi), emit))


def _gaussian(x: ir.Value, rate: float, height: float, emit: Emitter) -> ir.Value:
    """`height exp(-rate x^2)`."""
    return _scaled(emit("Exp", _scaled(emit("Mul", x, x), -rate, emit)), height, emit)


@first_rule("Gelu")
def _gelu(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    x = _x(node)
    if node.attributes.get_string("approximate", "none") == "tanh":
        return emit("Mul", grad, _gelu_tanh_slope(x, emit))
    erf = emit("Erf", _scaled(x, math.sqrt(0.5), emit))
    below = _scaled(emit("Add", erf, emit.like(x, 1.0)), 0.5, emit)
    density = _gaussian(x, 0.5, 1.0 / math.sqrt(2.0 * math.pi), emit)
    return emit("Mul", grad, emit("Add", below, emit("Mul", x, density)))


def _gelu_tanh_slope(x: ir.Value, emit: Emitter) -> ir.Value:
    """Of `x (1 + tanh u) / 2` with `u = b (x + c x^3)`: `(1 + t + x (1 - t^2) u') / 2`."""
    b, c = math.sqrt(2.0 / math.pi), 0.044715
    squared = emit("Mul", x, x)
    u = emit("Mul", x, emit("Add", _scaled(squared, b * c, emit), emit.like(x, b)))
    slope = emit("Add", _scaled(squared, 3.0 * b * c, emit), emit.like(x, b))
    tanh = emit("Tanh", u)
    bent = emit("Mul", emit("Mul", x, slope), _one_minus(emit("Mul", tanh, tanh), emit))
    return _scaled(emit("Add", emit("Add", tanh, emit.like(x, 1.0)), bent), 0.5, emit)


@first_rule("Softmax")
def _softmax(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    y = node.outputs[0]
    axis = emit.ints(node.attributes.get_int("axis", -1))
    along = emit("ReduceSum", emit("Mul", grad, y), axis, keepdims=1)
    return emit("Mul", y, emit("Sub", grad, along))


@first_rule("LogSoftmax")
def _log_softmax(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    axis = emit.ints(node.attributes.get_int("axis", -1))
    along = emit("ReduceSum", grad, axis, keepdims=1)
    return emit("Sub", grad, emit("Mul", emit("Exp", node.outputs[0]), along))
