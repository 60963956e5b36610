"""Reverse mode: cotangents from the outputs back to the values asked for."""

from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir

from diffcam_export.emit import Emitter
from diffcam_export.gradients.registry import NO_GRADIENT, RULES, refusal

_FLOATING = frozenset(
    {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}
)


def vjp(
    cotangents: Mapping[ir.Value, ir.Value], wrt: Sequence[ir.Value], emit: Emitter
) -> list[ir.Value | None]:
    """The cotangents of some values, given those of some outputs: `sum_y J(y, x)^T g(y)`.

    Only nodes between the two are differentiated, and their values are read, not computed again.
    Integers and comparisons stop a gradient, but not a QuantizeLinear: the cotangent of what it
    returns is that of the number it stands for.

    Args:
        cotangents: for each output y its cotangent g(y), of its shape and element type.
        wrt: values x of the same graph; its shapes should have been inferred.
        emit: writes the nodes; they read values of the graph, and belong behind its own nodes.

    Returns:
        For each value of wrt its cotangent, of its shape and element type; None where no path
        leads from it to any of the outputs.

    Raises:
        MissingRuleError: an operator on a path has no rule, a ValueError.

    Example:
        >>> x = ir.val("x", dtype=ir.DataType.FLOAT, shape=["N", 3])
        >>> y = ir.val("y", dtype=ir.DataType.FLOAT, shape=["N", 3])
        >>> node = ir.node("Relu", [x], outputs=[y])
        >>> g = ir.val("g", dtype=ir.DataType.FLOAT, shape=["N", 3])
        >>> emit = Emitter("doc")
        >>> [dx] = vjp({y: g}, [x], emit)
        >>> [node.op_type for node in emit.nodes], dx.dtype
        (['Constant', 'Greater', 'Where'], FLOAT)
    """
    reached = _reached(wrt)
    found = {y: g for y, g in cotangents.items() if y in reached}
    for node in reversed(_between(found, reached)):
        grads = [found.get(value) for value in node.outputs]
        wanted = [value is not None and value in reached for value in node.inputs]
        for value, grad in zip(
            node.inputs, _differentiated(node, grads, wanted, emit), strict=True
        ):
            if value is None or grad is None:
                continue
            if value in found:
                grad = emit("Add", found[value], grad)
            if grad.shape is None and value.shape is not None:
                grad.shape = value.shape.copy()
            found[value] = grad
    return [found.get(value) for value in wrt]


def _differentiated(
    node: ir.Node, grads: Sequence[ir.Value | None], wanted: Sequence[bool], emit: Emitter
) -> Sequence[ir.Value | None]:
    if node.domain not in ("", "ai.onnx"):
        raise refusal(
            node,
            f"domain {node.domain!r} is not ONNX's own; a function that the model defines has to "
            "be inlined first",
        )
    if node.op_type not in RULES:
        raise refusal(node, "there is no rule for this operator")
    return RULES[node.op_type](node, grads, wanted, emit)


def _reached(wrt: Iterable[ir.Value]) -> set[ir.Value]:
    """The values that depend on those of wrt in a way that can be differentiated, and wrt."""
    reached = set(wrt)
    waiting = list(reached)
    parents: dict[ir.Graph, ir.Node] = {}
    while waiting:
        value = waiting.pop()
        for node in {use.node for use in value.uses()}:
            user = _outermost(node, value, parents)
            if user is None or user.op_type in NO_GRADIENT:
                continue
            for output in user.outputs:
                if output not in reached and _carries(output):
                    reached.add(output)
                    waiting.append(output)
    return reached


def _carries(value: ir.Value) -> bool:
    """Whether a gradient can pass the value."""
    if value.dtype is None or value.dtype in _FLOATING:
        return True
    node = value.producer()
    assert node is not None
    # A quantized number may be rearranged, or pooled, before it is a number again.
    return value.dtype.name.startswith(("INT8", "UINT8", "INT4", "UINT4", "FLOAT8")) and (
        node.op_type == "QuantizeLinear"
        or any(v is not None and _is_quantized(v) for v in node.inputs)
    )


def _is_quantized(value: ir.Value) -> bool:
    node = value.producer()
    while node is not None and node.op_type != "QuantizeLinear":
        first = node.inputs[0] if node.inputs else None
        if first is None or first.dtype != value.dtype:
            return False
        node = first.producer()
    return node is not None


def _outermost(node: ir.Node, value: ir.Value, parents: dict[ir.Graph, ir.Node]) -> ir.Node | None:
    """The node of the value's own graph in whose branches or body a node stands."""
    home = value.graph or (None if (p := value.producer()) is None else p.graph)
    while home is not None and node.graph is not home:
        if not parents:
            parents.update(_owners(home))
        owner = parents.get(node.graph) if isinstance(node.graph, ir.Graph) else None
        if owner is None:
            return None
        node = owner
    return node


def _owners(graph: ir.Graph | ir.Function) -> dict[ir.Graph, ir.Node]:
    return {
        attribute.as_graph(): node
        for node in graph.all_nodes()
        for attribute in node.attributes.values()
        if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref()
    }


def _between(outputs: Iterable[ir.Value], reached: set[ir.Value]) -> list[ir.Node]:
    """The nodes that lead from reached values to the outputs, in topological order."""
    ordered: dict[ir.Node, None] = {}
    opened: set[ir.Node] = set()
    producers = [node for value in outputs if (node := value.producer()) is not None]
    stack = [node for node in producers if _leads(node, reached)]
    while stack:
        node = stack[-1]
        if node in ordered:
            stack.pop()
            continue
        if node in opened:
            ordered[stack.pop()] = None
            continue
        opened.add(node)
        for value in _read(node):
            producer = value.producer() if value in reached else None
            if producer is not None and producer not in opened and _leads(producer, reached):
                stack.append(producer)
    return list(ordered)


def _read(node: ir.Node) -> list[ir.Value]:
    return [value for value in node.inputs if value is not None]


def _leads(node: ir.Node, reached: set[ir.Value]) -> bool:
    """False for the producer of a value of wrt that depends on no other."""
    graphs = any(a.type == ir.AttributeType.GRAPH for a in node.attributes.values())
    return graphs or any(value in reached for value in _read(node))
