"""The plain model beside an explained one: given, or what is left without the added outputs."""

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common

PREFIX = "diffcam_"


_QUANTIZED = ("QuantizeLinear", "QLinear", "Integer")


@dataclass(frozen=True)
class Plain:
    """A model to compare with.

    Attributes:
        name: for messages.
        model: a file, or bytes whose external data lies beside the explained file.
        nodes: how many it has, those inside functions and subgraphs included.
        bytes: of the model and its external data.
        half: some of its values are float16.
        quantized: some of its operators are those of whole numbers.
    """

    name: str
    model: Path | bytes
    nodes: int
    bytes: int
    half: bool
    quantized: bool


def plain_file(path: Path) -> Plain:
    """A file as it is."""
    model = ir.load(path)
    size = path.stat().st_size + _external(model)
    return Plain(str(path), path, count_nodes(model), size, *_kinds(model))


def plain_part(path: Path) -> Plain:
    """What is left of an explained file; see `plain_model`."""
    model = plain_model(path)
    external = _external(model)
    serialised = ir.to_proto(model).SerializeToString()
    size = len(serialised) + external
    name = "the file without maps"
    return Plain(name, serialised, count_nodes(model), size, *_kinds(model))


def plain_model(path: Path) -> ir.Model:
    """What is left of an explained file when its outputs named `diffcam_...` are taken away, with
    the nodes and weights that no other output needs. The file itself is not changed.
    """
    model = ir.load(path)
    graph = model.graph
    kept = [value for value in graph.outputs if not str(value.name).startswith(PREFIX)]
    graph.outputs[:] = kept
    unused = ir.passes.Sequential(
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
    )
    unused(model)
    # The classes that were asked for: nothing reads them any more.
    graph.inputs[:] = [
        value for value in graph.inputs if value.uses() or value.name not in graph.initializers
    ]
    unused(model)
    return model


def count_nodes(model: ir.Model) -> int:
    """How many nodes a model has, those inside functions and subgraphs included."""
    return len(_nodes(model))


def _kinds(model: ir.Model) -> tuple[bool, bool]:
    """Whether there is float16 in it, and whether there are quantized operators."""
    nodes = _nodes(model)
    values = [v for node in nodes for v in [*node.inputs, *node.outputs] if v is not None]
    half = any(value.dtype == ir.DataType.FLOAT16 for value in values)
    quantized = any(mark in node.op_type for node in nodes for mark in _QUANTIZED)
    return half, quantized


def _nodes(model: ir.Model) -> list[ir.Node]:
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    nodes = [node for graph in graphs for node in ir.traversal.RecursiveGraphIterator(graph)]
    # A constant is data; whether it stands in a node or in an initializer is a matter of taste.
    return [node for node in nodes if node.op_type != "Constant"]


def _external(model: ir.Model) -> int:
    """Bytes of the tensors outside of the file."""
    values = model.graph.initializers.values()
    tensors = {id(v.const_value): v.const_value for v in values}
    return sum(t.nbytes for t in tensors.values() if isinstance(t, ir.ExternalTensor))
