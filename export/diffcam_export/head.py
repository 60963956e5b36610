"""The head in a graph: everything between the target layer and the logits.

A head is called pooled linear, `z = W mean_ij(A) + b`, when two things hold. By its operators it is
affine in A. And run on random activations, the differences of its logits are those of that
formula, for one of its weights W; an affine map with these differences is the pooled linear one,
whatever the order of its pooling, flattening, casting and 1x1 convolution.

Quantized heads are read with the rounding between their operators taken out, as their gradient is
(straight through); W is then the dequantized weight.
"""

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from diffcam_export.flow import REARRANGING, Flow, dims, named
from diffcam_export.proof import Unproven, differences

Layout = Literal["KC", "CK", "KC11"]
"""Axes of W: `(K, C)`, `(C, K)` or `(K, C, 1, 1)`."""

_AVERAGING = frozenset({"GlobalAveragePool", "AveragePool", "ReduceMean", "ReduceSum"})
_ROUNDING = frozenset({"QuantizeLinear", "DequantizeLinear"})
_COMBINING = frozenset({"Add", "Sub", "Sum", "Concat"})
_LINEAR = frozenset({"Conv", "Gemm", "MatMul", "Mul", "Div", "Neg", "BatchNormalization"})


@dataclass(frozen=True)
class Head:
    """What was read of a head.

    Attributes:
        operators: its operators in one line.
        reason: why its form is closed, or why it is not.
        weight: W where it is.
        layout: the axes of W.
    """

    operators: str
    reason: str
    weight: ir.Value | None = None
    layout: Layout | None = None


def read_head(flow: Flow, layer: ir.Value, axis: int) -> Head:
    """Decides between the closed form and the gradient of the head, with the reason in words.

    Args:
        flow: of the graph.
        layer: the activation A, 4-D, that the logits depend on.
        axis: of its channels, 1 or 3.
    """
    nodes = flow.behind(layer)
    shown = (node.op_type for node in nodes if node.op_type not in REARRANGING | _ROUNDING)
    operators = " -> ".join(shown) or "nothing"
    obstacle = _obstacle(flow, nodes, layer)
    if obstacle is None:
        try:
            weight, layout = _proven(flow, nodes, layer, axis)
        except Unproven as error:
            obstacle = str(error)
        else:
            how = f"average pooling and one linear map, {weight.name}"
            return Head(operators, f"{how}: the gradient is d W / (h w)", weight, layout)
    return Head(operators, f"backward through the head: {obstacle}")


def _obstacle(flow: Flow, nodes: list[ir.Node], layer: ir.Value) -> str | None:
    """The first operator that keeps the head from being affine in A, in words."""
    inside = {layer, *(value for node in nodes for value in node.outputs)}
    for node in nodes:
        moving = flow.inputs(node)
        outside = next((value for value in moving if value not in inside), None)
        if outside is not None:
            return f"{named(node)} also reads {outside.name}, which does not pass through the layer"
        why = _not_affine(node, moving)
        if why is not None:
            return f"{named(node)} {why}"
    if flow.logits not in inside or not any(n in nodes and flow.weights(n) for n in flow.mixers()):
        return "no weights stand between the layer and the logits"
    return None


def _not_affine(node: ir.Node, moving: list[ir.Value]) -> str | None:
    kind = node.op_type
    if node.domain != "":
        return f"is an operator of {node.domain}, which is not known here"
    if kind not in REARRANGING | _AVERAGING | _ROUNDING | _COMBINING | _LINEAR:
        return "is neither pooling nor a linear map"
    reads = sum(value in moving for value in node.inputs)
    if kind in _LINEAR | _ROUNDING and reads > 1:
        return "combines two values that depend on the layer"
    if kind not in _COMBINING | {"Mul", "MatMul"} and node.inputs[0] not in moving:
        return "does more than move the activation"
    if kind == "Cast":
        to = ir.DataType(node.attributes["to"].as_int())
        return None if to.is_floating_point() else f"rounds to {to.name}"
    if kind == "BatchNormalization" and node.attributes.get_int("training_mode"):
        return "takes statistics of the batch"
    if kind == "Dropout" and len(node.inputs) > 2 and node.inputs[2] is not None:
        flag = ir.convenience.get_const_tensor(node.inputs[2])
        return None if flag is not None and not flag.numpy().any() else "drops values at random"
    if kind == "QuantizeLinear" and not all(
        user.op_type == "DequantizeLinear" for user, _ in node.outputs[0].uses()
    ):
        return "hands integers on"
    before = node.inputs[0].producer() if node.inputs[0] is not None else None
    if kind == "DequantizeLinear" and (before is None or before.op_type != "QuantizeLinear"):
        return "reads integers that no QuantizeLinear made"
    return None


def _proven(
    flow: Flow, nodes: list[ir.Node], layer: ir.Value, axis: int
) -> tuple[ir.Value, Layout]:
    shape = dims(layer)
    assert shape is not None
    channels, classes = shape[axis], flow.classes()
    if not isinstance(channels, int) or classes is None:
        raise Unproven("the number of channels or classes is not known")
    fitting: list[tuple[ir.Value, Layout]] = []
    layouts: dict[tuple[int, ...], Layout] = {
        (classes, channels, 1, 1): "KC11",
        (channels, classes): "CK",
        (classes, channels): "KC",
    }
    for node in nodes:
        for value in flow.weights(node):
            for sizes, layout in layouts.items():
                if dims(value) == sizes:
                    fitting.append((value, layout))
            if classes == channels and dims(value) == (classes, channels):
                fitting.append((value, "CK"))
    if not fitting:
        raise Unproven(f"it has no weight of shape (K, C) = ({classes}, {channels})")
    runs = differences(flow, nodes, layer, axis, [value for value, _ in fitting])
    for index, (value, layout) in enumerate(fitting):
        if all(run.agrees(index, transposed=layout == "CK") for run in runs):
            return value, layout
    raise Unproven(f"its logits are not W mean(A) + b for its weight {fitting[0][0].name}")
