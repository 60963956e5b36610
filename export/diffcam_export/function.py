"""Nodes into one ONNX function, so that a viewer shows one node that opens."""

from collections.abc import Iterator, Sequence

import onnx_ir as ir

from diffcam_export.emit import OPSET

DOMAIN = "diffcam"


def as_function(
    nodes: Sequence[ir.Node],
    outputs: Sequence[ir.Value],
    *,
    name: str,
    opset: int = OPSET,
) -> tuple[ir.Node, ir.Function]:
    """One call in place of nodes.

    Args:
        nodes: in topological order, part of no graph; they become the body of the function.
        outputs: values that they make and that are needed outside.
        name: of the function, in the domain `diffcam`.
        opset: version of the default operator set.

    Returns:
        The call, whose outputs take the place, name and shape of `outputs`, and the function.
    """
    inner = dict.fromkeys(outputs)
    outside = list(dict.fromkeys(_outside_values(nodes)))
    parameters = [
        ir.Value(name=f"{name}_{index}", type=value.type) for index, value in enumerate(outside)
    ]
    _replace_inputs(nodes, dict(zip(outside, parameters, strict=True)))
    graph = ir.Graph(parameters, list(inner), nodes=nodes, opset_imports={"": opset}, name=name)
    function = ir.Function(DOMAIN, name, graph=graph, attributes=[])
    call = ir.node(
        name, inputs=outside, domain=DOMAIN, num_outputs=len(inner), name=f"{DOMAIN}/{name}"
    )
    for result, value in zip(call.outputs, inner, strict=True):
        result.name, result.type, result.shape = value.name, value.type, value.shape
        value.name = f"{value.name}_"
    return call, function


def _all_nodes(nodes: Sequence[ir.Node]) -> Iterator[ir.Node]:
    """The nodes and those of their subgraphs."""
    for node in nodes:
        yield node
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield from _all_nodes(list(attribute.as_graph()))


def _outside_values(nodes: Sequence[ir.Node]) -> Iterator[ir.Value]:
    """What the nodes read and do not make; a body reads from every graph around it."""
    every = list(_all_nodes(nodes))
    made = {value for node in every for value in node.outputs}
    for node in every:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                made.update(attribute.as_graph().inputs)
    for node in every:
        for value in node.inputs:
            if value is not None and value not in made:
                yield value


def _replace_inputs(nodes: Sequence[ir.Node], by: dict[ir.Value, ir.Value]) -> None:
    for node in _all_nodes(nodes):
        for index, value in enumerate(node.inputs):
            if value in by:
                node.replace_input_with(index, by[value])
