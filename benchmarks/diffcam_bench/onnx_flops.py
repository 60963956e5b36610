"""Multiplications and additions of an ONNX file, from the shapes of its linear operators."""

import math
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass
from torch import Tensor

from diffcam_bench.onnx_files import CPU
from diffcam_export.running import run
from diffcam_export.session import open_session

_LINEAR = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
Shape = tuple[int, ...]


def flops(path: Path, images: Tensor, *, threads: int) -> int:
    """Two for each multiplication of Conv, ConvTranspose, Gemm and MatMul.

    The file runs once, so that shapes are known which no inference tells.

    Args:
        path: the file; its functions are written out, subgraphs are not looked into.
        images: (N, C, H, W) for its first input; the count is for all N.
        threads: of ONNX Runtime.
    """
    model = InlinePass()(ir.load(path)).model
    nodes = [node for node in model.graph if node.op_type in _LINEAR and node.domain == ""]
    known: dict[str, Shape] = {}
    asked: dict[str, ir.Value] = {}
    for value in (value for node in nodes for value in _operands(node)):
        name = str(value.name)
        if value.const_value is not None:
            known[name] = tuple(value.const_value.shape.numpy())
        elif value.is_graph_input():
            known[name] = tuple(images.shape)
        else:
            asked[name] = value
    model.graph.outputs[:] = list(asked.values())
    for value in asked.values():
        # What is declared may be a name that the run contradicts.
        value.shape = None
    shown = path.with_suffix(".shapes.onnx")
    ir.save(model, shown, external_data=f"{shown.name}.data")
    opened = open_session(shown, providers=CPU, threads=threads, optimise=False)
    feeds = {opened.session.get_inputs()[0].name: images.contiguous()}
    names = list(asked)
    known |= {n: tuple(v.shape) for n, v in zip(names, run(opened, feeds, names), strict=True)}
    return sum(_flops(node, [known[str(v.name)] for v in _operands(node)]) for node in nodes)


def _operands(node: ir.Node) -> Iterator[ir.Value]:
    """Both factors, and the product."""
    for value in (*node.inputs[:2], node.outputs[0]):
        assert value is not None
        yield value


def _flops(node: ir.Node, shapes: list[Shape]) -> int:
    first, weight, result = shapes
    if node.op_type == "ConvTranspose":
        # Each input cell meets the weights of its channel.
        return 2 * math.prod(first) * math.prod(weight[1:])
    if node.op_type == "Conv":
        return 2 * math.prod(result) * math.prod(weight[1:])
    inner = first[0 if node.attributes.get_int("transA", 0) else -1]
    return 2 * math.prod(result) * inner
