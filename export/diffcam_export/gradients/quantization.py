"""Quantization passes the gradient straight through, inside the range of its integers."""

import numpy as np
import onnx_ir as ir

from diffcam_export.emit import Emitter
from diffcam_export.gradients.registry import first_rule, refusal
from diffcam_export.gradients.shapes import BOOL, rank, static_shape


@first_rule("DequantizeLinear")
def _dequantize(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    """The cotangent of a quantized number is that of the number it stands for."""
    return grad


@first_rule("QuantizeLinear")
def _quantize(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    """As of torch.fake_quantize: 0 where the rounded number lies outside the range."""
    x, scale, *rest = node.inputs
    assert x is not None and scale is not None
    dtype = node.outputs[0].dtype
    name = "" if dtype is None else dtype.name
    if name not in ("INT8", "UINT8", "INT16", "UINT16"):
        raise refusal(node, f"there is no rule for its element type {name or 'unknown'}")
    if node.attributes.get_int("block_size", 0):
        raise refusal(node, "there is no rule for blocks")
    limits = np.iinfo(np.dtype(name.lower()))
    steps = emit("Round", emit("Div", x, _beside(scale, node, x, emit)))
    if rest and rest[0] is not None:
        zero = _beside(rest[0], node, x, emit)
        steps = emit("Add", steps, emit("CastLike", zero, x, dtype=x.dtype))
    inside = emit(
        "And",
        emit("GreaterOrEqual", steps, emit.like(x, float(limits.min)), dtype=BOOL),
        emit("LessOrEqual", steps, emit.like(x, float(limits.max)), dtype=BOOL),
        dtype=BOOL,
    )
    return emit("Where", inside, grad, emit.like(grad, 0.0), dtype=grad.dtype)


def _beside(value: ir.Value, node: ir.Node, x: ir.Value, emit: Emitter) -> ir.Value:
    """A number for all of x, or one for each cell of an axis."""
    if rank(value) == 0 or static_shape(value) == (1,):
        return value
    axis = node.attributes.get_int("axis", 1)
    behind = rank(x) - axis - 1 if axis >= 0 else -axis - 1
    return emit("Reshape", value, emit.ints(-1, *[1] * behind))
