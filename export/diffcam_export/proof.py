"""Running a head by itself, on random activations."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from diffcam_export import apart
from diffcam_export.flow import Flow, dims, named, subgraphs

# Numbers in one value: hostile files ask for more.
_LARGEST = 2**26
_IR_VERSION = 10


class Unproven(Exception):
    """The head is not known to be a pooled linear map; the message says why."""


@dataclass(frozen=True)
class Run:
    """A head at two activations.

    Attributes:
        means: (N, C), the difference of the activations' spatial means.
        logits: (N, K), the difference of the logits.
        weights: the weights in question, as arrays.
        tolerance: relative, by the element type of the head.
    """

    means: np.ndarray
    logits: np.ndarray
    weights: list[np.ndarray]
    tolerance: float

    def agrees(self, index: int, *, transposed: bool) -> bool:
        """Whether the logits are the weight times the mean, up to a constant.

        Args:
            index: of the weight.
            transposed: it is (C, K), not (K, C) or (K, C, 1, 1).
        """
        weight = self.weights[index].astype(np.float64)
        weight = weight if transposed else weight.reshape(weight.shape[:2]).T
        expected = self.means @ weight
        error = np.linalg.norm(self.logits - expected)
        return bool(error <= self.tolerance * np.linalg.norm(expected)) and bool(expected.any())


def differences(
    flow: Flow, nodes: list[ir.Node], layer: ir.Value, axis: int, weights: list[ir.Value]
) -> list[Run]:
    """Runs an affine head at every size that its layer may have, or at two of them.

    Args:
        flow: of the graph.
        nodes: the head's, in order; rounding between them is left out.
        layer: the activation (N, C, h, w) or (N, h, w, C).
        axis: of its channels.
        weights: those to return with each run; one may stand more than once.

    Raises:
        Unproven: it could not be run.
    """
    shape = dims(layer)
    assert shape is not None
    spatial = (2, 3) if axis == 1 else (1, 2)
    fixed = all(isinstance(shape[d], int) for d in spatial)
    dtype = layer.dtype or ir.DataType.FLOAT
    tolerance = 1e-4 if dtype in (ir.DataType.FLOAT, ir.DataType.DOUBLE) else 2e-2
    generator = np.random.default_rng(0)
    runs = []
    for cells in [(3, 4)] if fixed else [(3, 4), (6, 5)]:
        free = dict(zip(spatial, cells, strict=True))
        sizes = [d if isinstance(d, int) else free.get(i, 2) for i, d in enumerate(shape)]
        if math.prod(sizes) > _LARGEST:
            raise Unproven(f"the layer is too large to run the head by itself: {shape}")
        names = {d: n for d, n in zip(shape, sizes, strict=True) if isinstance(d, str)}
        run = _session(flow, nodes, layer, list(dict.fromkeys(weights)), names, sizes)
        a, b = (generator.standard_normal(sizes).astype(dtype.numpy()) for _ in range(2))
        [za, *arrays], [zb, *_] = run(a), run(b)
        of = dict(zip(dict.fromkeys(weights), arrays, strict=True))
        means = (a.astype(np.float64) - b.astype(np.float64)).mean(axis=spatial)
        logits = (za.astype(np.float64) - zb.astype(np.float64)).reshape(len(za), -1)
        if logits.shape[0] != means.shape[0]:
            raise Unproven("the head changes the number of images")
        runs.append(Run(means, logits, [of[value] for value in weights], tolerance))
    return runs


def _session(
    flow: Flow,
    nodes: list[ir.Node],
    layer: ir.Value,
    weights: list[ir.Value],
    names: dict[str, int],
    sizes: list[int],
) -> Callable[[np.ndarray], list[np.ndarray]]:
    """The head as a function of the activation that returns the logits and the weights."""
    import onnxruntime

    model = _Copy(flow, set(nodes), layer, names, sizes).model([flow.logits, *weights])
    proto = ir.serde.serialize_model(model)
    _check_sizes(proto)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4

    def run(activation: np.ndarray) -> list[np.ndarray]:
        arrays: list[np.ndarray] = session.run(None, {"layer": activation})
        return arrays

    try:
        session = onnxruntime.InferenceSession(
            proto.SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
        )
        # Errors of shapes come only when it runs.
        run(np.zeros(sizes, (layer.dtype or ir.DataType.FLOAT).numpy()))
    # Every error of the runtime has a class of its own.
    except Exception as error:
        text = str(error).splitlines()[0][:200]
        raise Unproven(f"the head could not be run by itself ({text})") from error
    return run


def _check_sizes(proto: onnx.ModelProto) -> None:
    """No value may be larger than the files that people have; what the file declares is not asked.

    Without this, a small file could ask for any amount of memory.
    """
    del proto.graph.value_info[:]
    graph = apart.infer(proto).graph
    shapes = {info.name: info.type.tensor_type.shape.dim for info in graph.value_info}
    shapes |= {info.name: info.type.tensor_type.shape.dim for info in graph.output}
    for node in proto.graph.node:
        for name in filter(None, node.output):
            known = name in shapes and all(d.HasField("dim_value") for d in shapes[name])
            if not known or math.prod(d.dim_value for d in shapes[name]) > _LARGEST:
                raise Unproven(f"{node.op_type} in it gives a value of unknown or too large size")


class _Copy:
    """A model of the head and of the constants it needs, with the activation as its input."""

    def __init__(
        self,
        flow: Flow,
        head: set[ir.Node],
        layer: ir.Value,
        names: dict[str, int],
        sizes: list[int],
    ) -> None:
        self._flow, self._head, self._names, self._batch = flow, head, names, sizes[0]
        self._layer = layer
        self._new: dict[ir.Value, ir.Value] = {
            layer: ir.val("layer", dtype=layer.dtype or ir.DataType.FLOAT, shape=sizes)
        }
        self._initializers: list[ir.Value] = []

    def model(self, results: list[ir.Value]) -> ir.Model:
        """The model that computes these values."""
        needed = self._needed(results)
        copies = [
            copy for node in self._flow.graph if node in needed for copy in self._copied(node)
        ]
        # A value may be asked for that is an initializer, or the layer itself.
        outputs = []
        for index, value in enumerate(results):
            node = ir.node("Identity", [self._copy_of(value)], num_outputs=1)
            node.outputs[0].name = f"result{index}"
            node.outputs[0].type = value.type
            copies.append(node)
            outputs.append(node.outputs[0])
        graph = ir.Graph(
            [self._new[self._layer]],
            outputs,
            nodes=copies,
            initializers=self._initializers,
            opset_imports={"": self._flow.graph.opset_imports[""]},
            name="head",
        )
        return ir.Model(graph, ir_version=_IR_VERSION)

    def _needed(self, results: list[ir.Value]) -> set[ir.Node]:
        needed: set[ir.Node] = set()
        waiting = list(results)
        while waiting:
            value = waiting.pop()
            node = value.producer()
            if value is self._layer or node is None or node in needed:
                continue
            if node not in self._head:
                self._check(node)
            needed.add(node)
            if not self._reads_size_outside(node):
                waiting += [v for v in node.inputs if v is not None]
        return needed

    def _check(self, node: ir.Node) -> None:
        """A constant must be computed by plain operators."""
        if subgraphs(node) or node.domain != "" or "Random" in node.op_type:
            raise Unproven(f"{named(node)} computes a constant in a way that is not followed")

    def _reads_size_outside(self, node: ir.Node) -> bool:
        """A Shape or Size of a value that is not part of the head."""
        value = node.inputs[0] if node.inputs else None
        if node.op_type not in ("Shape", "Size") or value is None or value is self._layer:
            return False
        return value in self._flow.moving and value.producer() not in self._head

    def _size(self, d: int | str) -> int:
        return d if isinstance(d, int) else self._names.get(d, self._batch)

    def _copied(self, node: ir.Node) -> list[ir.Node]:
        if self._reads_size_outside(node):
            return [self._size_of(node)]
        moving = node.outputs[0] in self._flow.moving
        if moving and node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert node.inputs[0] is not None
            self._new[node.outputs[0]] = self._copy_of(node.inputs[0])
            return []
        copy = ir.Node(
            node.domain,
            node.op_type,
            [None if value is None else self._copy_of(value) for value in node.inputs],
            list(node.attributes.values()),
            num_outputs=len(node.outputs),
        )
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            # An output that is left out has no name.
            new.name = f"value{len(self._new)}" if old.name else ""
            new.type = old.type
            self._new[old] = new
        return [copy]

    def _size_of(self, node: ir.Node) -> ir.Node:
        """The size that a value before the head has at this size of the layer."""
        value = node.inputs[0]
        shape = None if value is None else dims(value)
        if shape is None:
            raise Unproven(f"{named(node)} reads a size that is not known")
        start = node.attributes.get_int("start", 0)
        end = node.attributes.get_int("end", len(shape))
        sizes = np.array([self._size(d) for d in shape], np.int64)
        sizes = sizes.prod() if node.op_type == "Size" else sizes[start:end]
        copy = ir.node("Constant", [], attributes={"value": ir.tensor(np.asarray(sizes))})
        copy.outputs[0].name = f"value{len(self._new)}"
        self._new[node.outputs[0]] = copy.outputs[0]
        return copy

    def _copy_of(self, value: ir.Value) -> ir.Value:
        if value not in self._new:
            tensor = value.const_value
            if tensor is None or tensor.size > _LARGEST:
                raise Unproven(f"{value.name} is not known, or too large")
            # In memory: the head's model is not in the folder of external data.
            held = ir.tensor(tensor.numpy(), dtype=tensor.dtype)
            new = ir.Value(
                name=f"value{len(self._new)}",
                shape=ir.Shape(tensor.shape.numpy()),
                type=ir.TensorType(tensor.dtype),
                const_value=held,
            )
            self._new[value] = new
            self._initializers.append(new)
        return self._new[value]
