"""A graph of one node with its gradient, run and compared with PyTorch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from diffcam_export.emit import Emitter
from diffcam_export.gradients import vjp

Reference = Callable[..., Tensor]
DIMENSIONS = ["fixed", "named", "unknown"]


def session(model: ir.Model) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    proto = ir.serde.serialize_model(model)
    return onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def differentiated(proto: onnx.ModelProto, wrt: Sequence[str], output: str = "y") -> ir.Model:
    """The model with the cotangent of its output as one more input, those of wrt as outputs."""
    model = ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    values = {value.name: value for value in model.graph.inputs}
    y = next(value for value in model.graph.outputs if value.name == output)
    # Of GroupNormalization nothing is inferred.
    if y.shape is None:
        y.shape = values[wrt[0]].shape.copy()
    g = ir.val("g", dtype=y.dtype, shape=y.shape)
    emit = Emitter("grad")
    found = vjp({y: g}, [values[name] for name in wrt], emit)
    assert all(value is not None for value in found)
    model.graph.inputs.append(g)
    model.graph.extend(emit.nodes)
    for value in found:
        if value in model.graph.outputs or value is g:
            shape, value = value.shape, emit("Identity", value)
            value.shape = shape
            model.graph.append(emit.nodes[-1])
        model.graph.outputs.append(value)
    for name, value in zip(wrt, found, strict=True):
        assert value.dtype == values[name].dtype
    onnx.checker.check_model(ir.serde.serialize_model(model))
    return model


def close(actual: np.ndarray, expected: Tensor, tolerance: float = 1e-5) -> None:
    wanted = expected.detach().double().numpy()
    assert actual.shape == wanted.shape
    error = np.abs(actual - wanted).max(initial=0.0)
    assert error <= tolerance * max(np.abs(wanted).max(initial=0.0), 1e-3), error


@dataclass(frozen=True)
class Case:
    """One node; reference computes the same in PyTorch, of the arrays that are differentiated.

    Inputs are arrays, shapes of random ones, or None; those whose place is in wrt are inputs of the
    graph, the others constants.
    """

    operator: str
    reference: Reference
    inputs: Sequence[Any]
    wrt: Sequence[int] = (0,)
    attributes: dict[str, Any] = field(default_factory=dict)
    outputs: int = 1
    opset: int = 18

    def __str__(self) -> str:
        shown = {k: v for k, v in self.attributes.items() if not isinstance(v, onnx.TensorProto)}
        return f"{self.operator}-{shown}-{[getattr(v, 'shape', v) for v in self.inputs]}"


def arrays_of(case: Case, seed: int = 0) -> list[np.ndarray | None]:
    random = np.random.default_rng(seed)
    return [
        random.normal(size=value).astype(np.float32) if isinstance(value, tuple) else value
        for value in case.inputs
    ]


def size_of(kind: str, place: int, axis: int, size: int) -> int | str | None:
    if kind == "fixed" or size == 1:
        return size
    return None if kind == "unknown" else f"d{place}_{axis}"


def graph_of(case: Case, arrays: Sequence[np.ndarray | None], kind: str) -> onnx.ModelProto:
    names = ["" if array is None else f"x{i}" for i, array in enumerate(arrays)]
    outputs = ["y", *[f"y{i}" for i in range(1, case.outputs)]]
    node = helper.make_node(case.operator, names, outputs, "the node", **case.attributes)
    inputs, constants = [], []
    for i, array in enumerate(arrays):
        if array is None:
            continue
        if i in case.wrt:
            sizes = [size_of(kind, i, a, n) for a, n in enumerate(array.shape)]
            dtype = helper.np_dtype_to_tensor_dtype(array.dtype)
            inputs.append(helper.make_tensor_value_info(f"x{i}", dtype, sizes))
        else:
            constants.append(numpy_helper.from_array(array, f"x{i}"))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "g", inputs, [y], constants)
    opsets = [helper.make_opsetid("", case.opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def check(case: Case, kind: str, *, seed: int = 0, tolerance: float = 1e-5) -> None:
    arrays = arrays_of(case, seed)
    names = [f"x{i}" for i in case.wrt]
    run = session(differentiated(graph_of(case, arrays, kind), names))
    leaves = [torch.from_numpy(arrays[i]).double().requires_grad_() for i in case.wrt]
    y = case.reference(*leaves)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).float()
    feeds = {name: arrays[i] for name, i in zip(names, case.wrt, strict=True)}
    forward, *found = run.run(None, feeds | {"g": g.numpy()})
    close(forward, y)
    for actual, expected in zip(found, torch.autograd.grad(y, leaves, g.double()), strict=True):
        close(actual, expected, tolerance)


def ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


def number(value: float) -> np.ndarray:
    return np.array(value, dtype=np.float32)
