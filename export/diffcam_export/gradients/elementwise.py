"""Arithmetic, with broadcasting."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from diffcam_export.emit import Emitter
from diffcam_export.gradients.registry import first_rule, refusal, rule
from diffcam_export.gradients.shapes import BOOL, array_of, reduce_to

Grads = Sequence[ir.Value | None]


def _operands(node: ir.Node) -> list[ir.Value]:
    return [value for value in node.inputs if value is not None]


@first_rule("Identity", "Dropout")
def _identity(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    training = node.inputs[2] if len(node.inputs) > 2 else None
    if training is not None and array_of(training) != np.array(False):
        raise refusal(node, "it is, or may be, in training mode")
    return grad


@rule("Cast", "CastLike")
def _cast(node: ir.Node, grads: Grads, wanted: Sequence[bool], emit: Emitter) -> Grads:
    """Of the second operand of CastLike nothing but its type is read."""
    [x, *rest] = _operands(node)
    grad = emit("CastLike", grads[0], x, dtype=x.dtype) if wanted[0] else None
    return [grad, *[None] * len(rest)]


@rule("Add", "Sum", "Mean")
def _add(node: ir.Node, grads: Grads, wanted: Sequence[bool], emit: Emitter) -> Grads:
    [grad] = grads
    assert grad is not None
    operands = _operands(node)
    if node.op_type == "Mean":
        grad = emit("Div", grad, emit.like(grad, len(operands)))
    return [
        reduce_to(grad, value, operands, emit) if asked else None
        for value, asked in zip(operands, wanted, strict=True)
    ]


@rule("Sub")
def _sub(node: ir.Node, grads: Grads, wanted: Sequence[bool], emit: Emitter) -> Grads:
    [grad] = grads
    assert grad is not None
    a, b = operands = _operands(node)
    return [
        reduce_to(grad, a, operands, emit) if wanted[0] else None,
        emit("Neg", reduce_to(grad, b, operands, emit)) if wanted[1] else None,
    ]


@rule("Mul")
def _mul(node: ir.Node, grads: Grads, wanted: Sequence[bool], emit: Emitter) -> Grads:
    [grad] = grads
    assert grad is not None
    a, b = operands = _operands(node)
    return [
        reduce_to(emit("Mul", grad, b), a, operands, emit) if wanted[0] else None,
        reduce_to(emit("Mul", grad, a), b, operands, emit) if wanted[1] else None,
    ]


@rule("Div")
def _div(node: ir.Node, grads: Grads, wanted: Sequence[bool], emit: Emitter) -> Grads:
    [grad] = grads
    assert grad is not None
    a, b = operands = _operands(node)
    quotient = emit("Div", grad, b)
    to_b = emit("Neg", emit("Mul", quotient, node.outputs[0])) if wanted[1] else None
    return [
        reduce_to(quotient, a, operands, emit) if wanted[0] else None,
        None if to_b is None else reduce_to(to_b, b, operands, emit),
    ]


@rule("Pow")
def _pow(node: ir.Node, grads: Grads, wanted: Sequence[bool], emit: Emitter) -> Grads:
    [grad] = grads
    assert grad is not None
    a, b = operands = _operands(node)
    results: list[ir.Value | None] = [None, None]
    if wanted[0]:
        slope = _power_slope(a, b, grad, emit)
        results[0] = reduce_to(emit("Mul", grad, slope), a, operands, emit)
    if wanted[1]:
        # a^b log a, which tends to 0 with a.
        zero = emit("Equal", a, emit.like(a, 0.0), dtype=BOOL)
        log = emit("Log", emit("Where", zero, emit.like(a, 1.0), a, dtype=a.dtype))
        change = emit("Mul", grad, emit("Mul", node.outputs[0], log))
        results[1] = reduce_to(change, b, operands, emit)
    return results


def _power_slope(a: ir.Value, b: ir.Value, grad: ir.Value, emit: Emitter) -> ir.Value:
    """b a^(b-1), of the element type of grad."""
    exponent = array_of(b)
    if exponent is not None and exponent.size == 1 and exponent.ndim == 0:
        number = float(exponent)
        if number == 2.0:
            return emit("Mul", a, emit.like(grad, 2.0))
        return emit("Mul", emit("Pow", a, emit.like(grad, number - 1.0)), emit.like(grad, number))
    b = emit("CastLike", b, grad, dtype=grad.dtype)
    return emit("Mul", b, emit("Pow", a, emit("Sub", b, emit.like(grad, 1.0))))


@rule("Max", "Min")
def _max(node: ir.Node, grads: Grads, wanted: Sequence[bool], emit: Emitter) -> Grads:
    """Equal operands share, as those of torch.maximum do."""
    [grad] = grads
    assert grad is not None
    operands = _operands(node)
    if len(operands) == 1:
        return [grad]
    # Indicators in numbers, since ReduceSum takes no truth values.
    one, zero = emit.like(grad, 1.0), emit.like(grad, 0.0)
    hits = [
        emit(
            "Where",
            emit("Equal", value, node.outputs[0], dtype=BOOL),
            one,
            zero,
            dtype=grad.dtype,
        )
        for value in operands
    ]
    share = emit("Div", grad, emit("Sum", *hits))
    return [
        reduce_to(emit("Mul", share, hit), value, operands, emit) if asked else None
        for value, hit, asked in zip(operands, hits, wanted, strict=True)
    ]


@rule("Where")
def _where(node: ir.Node, grads: Grads, wanted: Sequence[bool], emit: Emitter) -> Grads:
    [grad] = grads
    assert grad is not None
    condition, a, b = operands = _operands(node)
    zero = emit.like(grad, 0.0)
    to_a = emit("Where", condition, grad, zero, dtype=grad.dtype) if wanted[1] else None
    to_b = emit("Where", condition, zero, grad, dtype=grad.dtype) if wanted[2] else None
    return [
        None,
        None if to_a is None else reduce_to(to_a, a, operands, emit),
        None if to_b is None else reduce_to(to_b, b, operands, emit),
    ]


@first_rule("Neg")
def _neg(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    return emit("Neg", grad)


@first_rule("Sqrt")
def _sqrt(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    return emit("Div", emit("Mul", grad, emit.like(grad, 0.5)), node.outputs[0])


@first_rule("Reciprocal")
def _reciprocal(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    y = node.outputs[0]
    return emit("Neg", emit("Mul", grad, emit("Mul", y, y)))


@first_rule("Exp")
def _exp(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    return emit("Mul", grad, node.outputs[0])


@first_rule("Log")
def _log(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    [x] = _operands(node)
    return emit("Div", grad, x)


@first_rule("Abs")
def _abs(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    [x] = _operands(node)
    return emit("Mul", grad, emit("Sign", x))


@first_rule("Sin")
def _sin(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    [x] = _operands(node)
    return emit("Mul", grad, emit("Cos", x))


@first_rule("Cos")
def _cos(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    [x] = _operands(node)
    return emit("Neg", emit("Mul", grad, emit("Sin", x)))
