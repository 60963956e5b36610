"""Small ONNX models, written node by node as different exporters would."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper

LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
"""Networks of the model zoo, with weights that are computed, in onnx's own wheel."""

K, C = 5, 8


class Writer:
    """A model in the making: `writer("Relu", x)` adds a node and returns its output's name."""

    def __init__(self, opset: int = 18, seed: int = 0) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._random = np.random.default_rng(seed)

    def __call__(self, kind: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        output = name or f"{kind.lower()}{len(self.nodes)}"
        node = helper.make_node(kind, list(inputs), [output], name=f"n{len(self.nodes)}")
        node.attribute.extend(
            helper.make_attribute(key, value)
            for key, value in attributes.items()
            if key != "domain"
        )
        node.domain = attributes.get("domain", "")
        self.nodes.append(node)
        return output

    def weight(self, *shape: int) -> str:
        return self.constant(self._random.standard_normal(shape).astype(np.float32))

    def constant(self, array: Any) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(onnx.numpy_helper.from_array(np.asarray(array), name))
        return name

    def ints(self, *numbers: int) -> str:
        return self.constant(np.array(numbers, np.int64))

    def features(self, image: str = "image") -> str:
        """(N, 3, 10, 12) to (N, 8, 5, 6)."""
        x = self("Relu", self("Conv", image, self.weight(6, 3, 3, 3), pads=[1, 1, 1, 1]))
        x = self("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
        x = self("Conv", x, self.weight(C, 6, 3, 3), pads=[1, 1, 1, 1])
        return self("Relu", x, name="A")

    def model(
        self,
        *outputs: str,
        image: Sequence[int | str] = ("N", 3, 10, 12),
        kind: int = TensorProto.FLOAT,
        **options: Any,
    ) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "graph",
            [helper.make_tensor_value_info("image", kind, image)],
            [helper.make_empty_tensor_value_info(name) for name in outputs],
            self.weights,
        )
        domains = {node.domain for node in self.nodes if node.domain}
        imports = [helper.make_opsetid("", self.opset)]
        imports += [helper.make_opsetid(domain, 1) for domain in sorted(domains)]
        options = {"ir_version": 8, **options}
        return helper.make_model(graph, opset_imports=imports, **options)


def pooled(opset: int = 18) -> onnx.ModelProto:
    """GlobalAveragePool, Flatten, Gemm."""
    w = Writer(opset)
    x = w("Flatten", w("GlobalAveragePool", w.features()))
    return w.model(w("Gemm", x, w.weight(K, C), w.weight(K), transB=1, name="logits"))


def saved(model: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def run(
    model: ir.Model | onnx.ModelProto, feeds: dict[str, np.ndarray], *names: str
) -> list[np.ndarray]:
    """What ONNX Runtime computes, also for values that are no outputs."""
    proto = ir.serde.serialize_model(model) if isinstance(model, ir.Model) else model
    proto = onnx.ModelProto.FromString(proto.SerializeToString())
    own = {value.name for value in proto.graph.output}
    # A weight is no output of a node.
    held = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    for name in names:
        if name not in own and name not in held:
            proto.graph.output.append(helper.make_empty_tensor_value_info(name))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    # Quantized operators must not be fused away: their values are asked for.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    wanted = list(names) or [value.name for value in session.get_outputs()]
    computed = [name for name in wanted if name not in held]
    results = dict(zip(computed, session.run(computed, feeds), strict=True))
    return [held[name] if name in held else results[name] for name in wanted]


def image(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape or (2, 3, 10, 12)).astype(np.float32)
