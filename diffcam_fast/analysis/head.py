"""The head: everything between the target layer and the logits.

A head is called pooled linear, `z = W mean_ij(A) + b`, when two things hold. By its operators it is
affine in A, so that its gradient does not depend on A. And for random cotangents d its
vector-Jacobian product, taken once, is `d W / P` at every cell for one of its weights W. An affine
map with that gradient is the pooled linear one, whatever the order of its pooling, flattening,
dropout and 1x1 convolution.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffcam_fast.analysis.trace import Node, Trace
from diffcam_fast.layout import Layout
from diffcam_fast.running import pick_logits, tensor_named
from diffcam_fast.split import Layers, Output, head_gradients

_REARRANGING = frozenset(
    {
        *("view", "_unsafe_view", "reshape", "flatten", "squeeze", "unsqueeze", "expand"),
        *("permute", "transpose", "t", "select", "slice", "as_strided", "as_strided_"),
        *("alias", "detach", "clone", "contiguous", "_to_copy"),
    }
)
_AVERAGING = frozenset({"mean", "sum", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_avg_pool2d"})
_LINEAR = frozenset(
    {
        *("convolution", "_convolution", "linear", "addmm", "mm", "bmm", "baddbmm"),
        *("add", "sub", "mul", "div"),
    }
)


@dataclass(frozen=True)
class Head:
    """What was read of a head.

    Attributes:
        operators: its operators in one line.
        reason: why its form is closed, or why it is not.
        weight: name of W where it is.
        probabilities: it ends in a softmax.
    """

    operators: str
    reason: str
    weight: str | None
    probabilities: bool


def read_head(
    model: nn.Module,
    images: Tensor,
    flow: Trace,
    layer: str,
    node: Node,
    *,
    layout: Layout,
    output: Output = pick_logits,
) -> Head:
    """Decides between the closed form and the vjp, with the reason in words."""
    nodes = flow.head_of(node.index)
    operators = " -> ".join(_name(n) for n in nodes if n.operator not in _REARRANGING) or "nothing"
    probabilities = ends_in_softmax(flow)
    obstacle = _obstacle(nodes, node, flow.classes) or _overwritten(flow, node)
    if obstacle is None:
        with torch.autocast(images.device.type, enabled=False):
            weight, obstacle = _proven_weight(
                model, images, flow, {layer: layout}, node, nodes, output
            )
        if weight is not None:
            reason = f"average pooling and one linear map, {weight}: the gradient is d W / (h w)"
            return Head(operators, reason, weight, probabilities)
    return Head(operators, f"backward through the head: {obstacle}", None, probabilities)


def ends_in_softmax(flow: Trace) -> bool:
    """Whether the model returns probabilities."""
    node = flow.nodes[flow.logits]
    while node.operator in _REARRANGING and node.parents[-1] >= 0:
        node = flow.nodes[node.parents[-1]]
    return node.operator.strip("_") == "softmax"


def _overwritten(flow: Trace, layer: Node) -> str | None:
    """A later write into the activation; the closed form would read what it leaves behind."""
    writes = (
        n for n in flow.nodes.values() if n.operator.endswith("_") and n.operator != "as_strided_"
    )
    found = next((n for n in writes if layer.index in n.parents), None)
    return None if found is None else f"{_name(found)} overwrites the activation"


def _obstacle(nodes: list[Node], layer: Node, classes: int) -> str | None:
    """The first operator that keeps the head from being affine in A, in words."""
    inside = {layer.index, *(n.index for n in nodes)}
    for node in nodes:
        if not inside.issuperset(node.parents):
            return f"{_name(node)} also reads data that does not pass through the layer"
        if node.operator in _LINEAR:
            if len(node.parents) > 1:
                return f"{_name(node)} combines two values that depend on the layer"
        elif node.operator not in _REARRANGING | _AVERAGING:
            return f"{_name(node)} is neither pooling nor a linear map"
    if not any(n.parameters for n in nodes):
        return f"no weights stand between the layer and the {classes} logits"
    return None


def _proven_weight(
    model: nn.Module,
    images: Tensor,
    flow: Trace,
    layers: Layers,
    node: Node,
    nodes: list[Node],
    output: Output,
) -> tuple[str | None, str]:
    [layout] = layers.values()
    shape = (flow.classes, node.shape[layout.channel_axis])
    names = dict.fromkeys(name for n in nodes for name in n.parameters)
    fitting = [name for name in names if _matrix_shape(tensor_named(model, name)) == shape]
    if not fitting:
        return None, f"it has no weight of shape (K, C) = {shape}"
    generator = torch.Generator("cpu").manual_seed(0)
    shape_d = (images.shape[0], 1, flow.classes)
    d = torch.randn(shape_d, generator=generator, dtype=torch.float32, device="cpu")
    d = d.to(images.device)
    split = head_gradients(model, images, layers, lambda logits, _: (logits, d), output=output)
    gradients = split.gradients[0][:, 0].float()
    for name in fitting:
        weight = tensor_named(model, name).detach().flatten(1).float()
        expected = (d[:, 0] @ weight / gradients[0, 0].numel())[:, :, None, None]
        expected = expected.expand_as(gradients)
        error = (gradients - expected).norm() / expected.norm().clamp_min(
            torch.finfo(torch.float32).tiny
        )
        # Half-precision weights give a half-precision gradient.
        if error < (1e-4 if images.dtype in (torch.float32, torch.float64) else 2e-2):
            return name, ""
    return None, f"its gradient is not d W / (h w) for its weight {fitting[0]}"


def _matrix_shape(weight: Tensor) -> tuple[int, ...]:
    flat = weight.ndim == 4 and weight.shape[2:] == (1, 1)
    return tuple(weight.shape[:2]) if flat or weight.ndim == 2 else ()


def _name(node: Node) -> str:
    operator = node.operator.strip("_")
    return f"{operator} ({node.module})" if node.module else operator
