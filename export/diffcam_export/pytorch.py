"""From a PyTorch model to a plain ONNX graph in which the target layer is known."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import Dim

from diffcam_export.emit import OPSET
from diffcam_export.options import check_whole
from diffcam_fast.running import evaluating, find_logits, unwrap

IMAGES, LOGITS = "images", "logits"
# Of a message of PyTorch, whose first one names the error, and the next ones the reason.
_LINES = 8


class ExportError(ValueError):
    """A model that cannot be exported; the message says what stood in the way."""


@dataclass(frozen=True)
class Plain:
    """A classifier as a plain ONNX graph.

    Attributes:
        model: its graph, with the outputs of the PyTorch model and no others.
        layers: the activation of each layer that was asked for.
        output: the output that holds the logits, or their softmax.
    """

    model: ir.Model
    layers: tuple[ir.Value, ...]
    output: ir.Value


class _Tapped(nn.Module):
    """A model that returns its tensors, and the outputs of some of its layers behind them."""

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self._layers = layers
        self.logits = 0
        """Index of the logits among the tensors that the model returns."""

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        taken: dict[str, Tensor] = {}

        handles = [
            # A copy: the model may go on to overwrite its activation.
            self.model.get_submodule(name).register_forward_hook(
                lambda module, args, output, name=name: taken.__setitem__(name, output.clone())
            )
            for name in self._layers
        ]
        try:
            result = self.model(images)
        finally:
            for handle in handles:
                handle.remove()
        leaves = torch.utils._pytree.tree_leaves(result)
        outputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        logits = find_logits(result)
        if not any(leaf is logits for leaf in outputs):
            # A class of the user's own, into which PyTorch does not look.
            outputs = [logits]
        self.logits = next(i for i, leaf in enumerate(outputs) if leaf is logits)
        return (*outputs, *(taken[name] for name in self._layers))


def plain_graph(
    model: nn.Module,
    images: Tensor,
    layers: Sequence[str],
    *,
    dynamic_size: bool,
    opset: int,
) -> Plain:
    """Exports a model with a dynamic batch axis.

    Args:
        model: an image classifier; left as it was.
        images: (N, C, H, W) of the kind that it takes, N at least 2.
        layers: dotted names of modules.
        dynamic_size: height and width may change too.
        opset: version of the default operator set.

    Raises:
        ExportError: PyTorch cannot export it; the message is PyTorch's, shortened.
    """
    tapped = _Tapped(unwrap(model), layers)
    axes: dict[int, Any] = {0: Dim("batch", min=1)}
    if dynamic_size:
        axes |= {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    with torch.no_grad(), evaluating(model):
        try:
            graph = _exported(tapped, images, axes, opset)
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            shown = "\n  ".join(lines[:_LINES])
            raise ExportError(
                f"PyTorch cannot export the model: {type(error).__name__}: {shown}"
            ) from error
    made = graph.opset_imports[""]
    if made != opset:
        raise ExportError(f"PyTorch wrote opset {made} and cannot write {opset}; leave opset out")
    return _named(graph, layers, tapped.logits)


def check_opset(opset: int) -> None:
    """Refuses a version of the default operator set that cannot be written.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is out of range.
    """
    check_whole("opset", opset, least=OPSET)
    newest = onnx.defs.onnx_opset_version()
    if opset > newest:
        raise ValueError(f"opset must be from {OPSET} to {newest}, got {opset}")


def _exported(tapped: nn.Module, images: Tensor, axes: dict[int, Any], opset: int) -> ir.Model:
    program = torch.export.export(tapped, (images,), dynamic_shapes=(axes,), strict=False)
    _plain_means(program.graph)
    made = torch.onnx.export(program, (), dynamo=True, opset_version=opset, verbose=False)
    assert made is not None
    model: ir.Model = made.model
    return model


def _plain_means(graph: torch.fx.Graph) -> None:
    """Global pooling as a mean: of a channels-last activation PyTorch would make one and then a
    rearrangement by strides, which becomes a dozen nodes.
    """
    pool = torch.ops.aten.adaptive_avg_pool2d.default
    for node in graph.find_nodes(op="call_function", target=pool):
        activation, size = node.args
        if list(size) == [1, 1]:
            node.target = torch.ops.aten.mean.dim
            node.args = (activation, [-1, -2], True)


def _named(model: ir.Model, layers: Sequence[str], logits: int) -> Plain:
    graph = model.graph
    graph.inputs[0].name = IMAGES
    _name_axes(graph)
    count = len(graph.outputs) - len(layers)
    values = [_source(value) for value in graph.outputs[count:]]
    del graph.outputs[count:]
    for index, value in enumerate(graph.outputs):
        value.name = LOGITS if index == logits else f"output_{index}"
    for name in list(graph.initializers):
        value = graph.initializers[name]
        # The name that the user's model gives it.
        value.name = name.removeprefix("model.")
    for node in graph:
        # Paths and source lines of the machine that exported are nobody's business.
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
        node.metadata_props.pop("pkg.torch.onnx.fx_node", None)
    for name, value in zip(layers, values, strict=True):
        value.doc_string = f"output of {name}"
    return Plain(model, tuple(values), graph.outputs[logits])


def _source(value: ir.Value) -> ir.Value:
    """What a chain of copies began with."""
    node = value.producer()
    while node is not None and node.op_type == "Identity":
        assert node.inputs[0] is not None
        value = node.inputs[0]
        node = value.producer()
    return value


def _name_axes(graph: ir.Graph) -> None:
    """Gives the axes of the images names in place of PyTorch's symbols, here and in what follows
    from them.
    """
    shape = graph.inputs[0].shape
    assert shape is not None
    names = {
        size.value: name
        for size, name in zip(shape, ("batch", "channels", "height", "width"), strict=True)
        if isinstance(size, ir.SymbolicDim) and size.value is not None
    }
    if not names:
        return
    symbols = re.compile("|".join(rf"\b{symbol}\b" for symbol in names))
    made = (value for node in graph.all_nodes() for value in node.outputs)
    for value in [*graph.inputs, *made]:
        for axis, size in enumerate(value.shape or ()):
            if isinstance(size, ir.SymbolicDim) and size.value is not None:
                assert value.shape is not None
                value.shape[axis] = symbols.sub(lambda found: names[found[0]], size.value)
