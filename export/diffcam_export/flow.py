"""The data flow of an ONNX graph, from the image to the logits.

Values are called moving where they depend on the numbers in the image. What depends only on its
size, a batch size read by Shape say, is not: it stands still like a weight.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import onnx_ir as ir

REARRANGING = frozenset(
    {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Cast", "Dropout"}
)
"""Operators that move numbers to other places, and do nothing to them."""

_SIZES = frozenset({"Shape", "Size"})
_COPYING = frozenset({"Identity", "Cast", "CastLike", "Dropout", "QuantizeLinear"})
MIXING = frozenset(
    {
        *("Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "DeformConv"),
        *("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "QGemm"),
        *("FusedConv", "FusedMatMul", "FusedGemm", "NhwcConv", "NhwcFusedConv"),
    }
)
"""Operators that mix channels."""

_CHANNELS_SECOND = frozenset(
    {
        *("Conv", "ConvTranspose", "DeformConv", "QLinearConv", "FusedConv"),
        *("BatchNormalization", "InstanceNormalization", "GroupNormalization", "LRN"),
        *("MaxPool", "AveragePool", "LpPool"),
        *("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"),
    }
)
_CHANNELS_LAST = frozenset({"LayerNormalization", "MatMul", "Gemm"})

Size = int | str


@dataclass(frozen=True)
class Flow:
    """The moving nodes that logits depend on.

    Attributes:
        graph: the main graph of a model that `read_onnx` prepared.
        logits: the value that is asked about.
        nodes: in topological order.
    """

    graph: ir.Graph
    logits: ir.Value
    nodes: tuple[ir.Node, ...]

    @classmethod
    def to(cls, graph: ir.Graph, logits: ir.Value) -> "Flow":
        """The flow that ends in a value of the graph."""
        moving = moving_values(graph)
        needed, nodes = {logits}, []
        for node in reversed(list(graph)):
            if not needed.isdisjoint(node.outputs) and not moving.isdisjoint(node.outputs):
                needed.update(read_by(node))
                nodes.append(node)
        return cls(graph, logits, tuple(reversed(nodes)))

    @cached_property
    def moving(self) -> frozenset[ir.Value]:
        """The moving values of the whole graph."""
        return frozenset(moving_values(self.graph))

    @cached_property
    def place(self) -> dict[ir.Node, int]:
        """Where a node stands in `nodes`."""
        return {node: index for index, node in enumerate(self.nodes)}

    @cached_property
    def channel_axes(self) -> dict[ir.Value, int]:
        """The axis that holds the channels, of moving values of which it is known."""
        axes: dict[ir.Value, int] = {}
        for node in self.nodes:
            axis = _channel_axis(node, axes)
            if axis is not None:
                axes.update((value, axis) for value in node.outputs)
        return axes

    def inputs(self, node: ir.Node) -> list[ir.Value]:
        """The moving values that a node reads, each once."""
        return list(dict.fromkeys(v for v in read_by(node) if v in self.moving))

    def weights(self, node: ir.Node) -> list[ir.Value]:
        """The values a node reads that stand still."""
        return [v for v in node.inputs if v is not None and v not in self.moving]

    def behind(self, value: ir.Value) -> list[ir.Node]:
        """The nodes between a value and the logits, in order."""
        after, found = {value}, []
        for node in self.nodes:
            if not after.isdisjoint(self.inputs(node)):
                after.update(node.outputs)
                found.append(node)
        return found

    def bottlenecks(self) -> list[ir.Value]:
        """The values through which all of the data passes on its way to the logits, last first."""
        last = self.logits.producer()
        if last is None or last not in self.place:
            return []
        used, found = {self.logits}, []
        # The heap's smallest is the node that stands last; a graph input stands before all.
        frontier = [-self.place[last]]
        waiting = set(frontier)
        while frontier:
            index = -heapq.heappop(frontier)
            waiting.discard(-index)
            if index < 0:
                break
            node = self.nodes[index]
            leaving = [value for value in node.outputs if value in used]
            if not frontier and len(leaving) == 1:
                found.append(leaving[0])
            for value in self.inputs(node):
                used.add(value)
                producer = value.producer()
                place = -1 if producer is None else self.place[producer]
                if -place not in waiting:
                    waiting.add(-place)
                    heapq.heappush(frontier, -place)
        return found

    def mixers(self) -> list[ir.Node]:
        """The nodes that mix channels."""
        return [node for node in self.nodes if node.op_type in MIXING]

    def classes(self) -> int | None:
        """K, where it is known."""
        sizes = dims(self.logits)
        free = [d for d in sizes[1:] if d != 1] if sizes else []
        return free[0] if len(free) == 1 and isinstance(free[0], int) else None


def read_by(node: ir.Node) -> Iterator[ir.Value]:
    """The values whose numbers a node reads, itself or in its subgraphs."""
    if node.op_type in _SIZES and node.domain == "":
        return
    yield from (value for value in node.inputs if value is not None)
    graphs = subgraphs(node)
    while graphs:
        graph = graphs.pop()
        for inner in graph:
            yield from (v for v in inner.inputs if v is not None)
            graphs += subgraphs(inner)
        yield from graph.outputs


def subgraphs(node: ir.Node) -> list[ir.Graph]:
    """The graphs in a node's attributes."""
    found: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            found.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            found += attribute.as_graphs()
    return found


def moving_values(graph: ir.Graph) -> set[ir.Value]:
    """The values of the main graph that depend on the numbers in its inputs."""
    moving = {value for value in graph.inputs if not value.is_initializer()}
    for node in graph:
        if not moving.isdisjoint(read_by(node)):
            moving.update(node.outputs)
    return moving


def dims(value: ir.Value) -> tuple[Size, ...] | None:
    """The shape: numbers, names of sizes that are free, `?`; None where the rank is not known."""
    if value.shape is None:
        return None
    return tuple(
        d if isinstance(d, int) else (d.value if d.value is not None else "?") for d in value.shape
    )


def is_float(value: ir.Value) -> bool:
    """Whether the element type is a float, or not known."""
    return value.dtype is None or value.dtype.is_floating_point()


def origin(value: ir.Value) -> ir.Value:
    """The value that this one is a copy of: before Identity, Cast, Dropout, or quantization."""
    while (node := value.producer()) is not None and node.inputs and node.inputs[0] is not None:
        before = node.inputs[0].producer()
        quantized = before is not None and before.op_type == "QuantizeLinear"
        if node.op_type not in _COPYING and not (node.op_type == "DequantizeLinear" and quantized):
            break
        value = node.inputs[0]
    return value


def integers(value: ir.Value | None) -> list[int] | None:
    """The numbers of a small constant; None where it is none."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.size > 16 or not tensor.dtype.is_integer():
        return None
    return [int(number) for number in tensor.numpy().reshape(-1)]


def named(node: ir.Node) -> str:
    """`Conv (its name, or else its output)`."""
    return f"{node.op_type} ({node.name or node.outputs[0].name})"


def _channel_axis(node: ir.Node, axes: dict[ir.Value, int]) -> int | None:
    shape = dims(node.outputs[0])
    kind = node.op_type
    if kind in _CHANNELS_SECOND:
        return 1
    if shape is None:
        return None
    if kind in _CHANNELS_LAST:
        return len(shape) - 1
    source = next((v for v in node.inputs if v is not None and v in axes), None)
    before = None if source is None else dims(source)
    if source is None or before is None:
        return None
    axis = axes[source]
    if kind == "Transpose":
        order = node.attributes.get_ints("perm", list(range(len(shape)))[::-1])
        return list(order).index(axis) if axis in order else None
    if len(shape) == len(before):
        return axis
    if shape[-1:] == before[-1:] and axis == len(before) - 1:
        return len(shape) - 1
    # The size of the batch often has another name behind a computed Reshape.
    return 1 if axis == 1 and len(shape) > 1 and shape[1] == before[1] else None
