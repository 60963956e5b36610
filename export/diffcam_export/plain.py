"""The plain model beside an explained one: given, or what is left without the added outputs."""

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common

PREFIX = "diffcam_"


@dataclass(frozen=True)
class Plain:
    """A model to compare with.

    Attributes:
        name: for messages.
        model: a file, or bytes whose external data lies beside the explained file.
        nodes: how many it has, those inside functions and subgraphs included.
        bytes: of the model and its external data.
    """

    name: str
    model: Path | bytes
    nodes: int
    bytes: int


def plain_file(path: Path) -> Plain:
    """A file as it is."""
    model = ir.load(path)
    return Plain(str(path), path, count_nodes(model), path.stat().st_size + _external(model))


def plain_part(path: Path) -> Plain:
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
    external = _external(model)
    serialised = ir.to_proto(model).SerializeToString()
    return Plain(
        "the file without maps", serialised, count_nodes(model), len(serialised) + external
    )


def count_nodes(model: ir.Model) -> int:
    """How many nodes a model has, those inside functions and subgraphs included."""
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    nodes = [node for graph in graphs for node in ir.traversal.RecursiveGraphIterator(graph)]
    # A constant is data; whether it stands in a node or in an initializer is a matter of taste.
    return sum(node.op_type != "Constant" for node in nodes)


def _external(model: ir.Model) -> int:
    """Bytes of the tensors outside of the file."""
    values = model.graph.initializers.values()
    tensors = {id(v.const_value): v.const_value for v in values}
    return sum(t.nbytes for t in tensors.values() if isinstance(t, ir.ExternalTensor))
