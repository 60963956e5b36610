"""Gradients that are written into ONNX graphs, against PyTorch's own."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnxscript.optimizer import fold_constants
from torch import Tensor, nn

from diffcam_export.emit import Emitter
from diffcam_export.gradients import RULES, MissingRuleError, vjp
from diffcam_export.gradients.registry import NO_GRADIENT
from gradient_cases import CASES, VECTOR, X
from gradient_checks import (
    DIMENSIONS,
    Case,
    check,
    close,
    differentiated,
    graph_of,
    ints,
    number,
    session,
)


@pytest.mark.parametrize("kind", DIMENSIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rule(case: Case, kind: str) -> None:
    check(case, kind)


NUMBERS = st.integers(0, 2**16)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Case, str]:
    flat = draw(st.booleans())
    axes = 1 if flat else 2
    each = [
        draw(st.lists(st.integers(1, most), min_size=axes, max_size=axes)) for most in (3, 3, 2)
    ]
    kernel, strides, dilations = each
    auto = draw(st.sampled_from(["NOTSET", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    # ONNX Runtime has no dilated SAME padding.
    dilations = dilations if not auto.startswith("SAME") else [1] * axes
    pads = draw(st.lists(st.integers(0, 3), min_size=2 * axes, max_size=2 * axes))
    sizes = draw(st.lists(st.integers(5, 9), min_size=axes, max_size=axes))
    group = draw(st.sampled_from([1, 2, 4]))
    weight = np.random.default_rng(0).normal(size=(8, 4 // group, *kernel)).astype(np.float32)
    if auto.startswith("SAME"):
        totals = [
            max((-(-n // s) - 1) * s + k - n, 0)
            for n, s, k in zip(sizes, strides, kernel, strict=True)
        ]
        less, more = [t // 2 for t in totals], [t - t // 2 for t in totals]
        used = [*less, *more] if auto == "SAME_UPPER" else [*more, *less]
    else:
        used = pads if auto == "NOTSET" else [0] * 2 * axes
    ends = [n for i in reversed(range(axes)) for n in (used[i], used[axes + i])]
    convolve = F.conv1d if flat else F.conv2d

    def reference(x: Tensor) -> Tensor:
        w = torch.from_numpy(weight).double()
        return convolve(F.pad(x, ends), w, stride=strides, dilation=dilations, groups=group)

    attributes: dict[str, Any] = {"strides": strides, "dilations": dilations, "group": group}
    attributes |= {"pads": pads} if auto == "NOTSET" else {"auto_pad": auto}
    case = Case("Conv", reference, [(2, 4, *sizes), weight], (0,), attributes)
    return case, draw(st.sampled_from(DIMENSIONS))


@given(drawn=convolutions(), seed=NUMBERS)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_convolution(drawn: tuple[Case, str], seed: int) -> None:
    check(*drawn, seed=seed)


@st.composite
def pools(draw: st.DrawFn) -> tuple[Case, str]:
    kernel = draw(st.lists(st.integers(1, 3), min_size=2, max_size=2))
    strides = draw(st.lists(st.integers(1, 3), min_size=2, max_size=2))
    pads = [draw(st.integers(0, k // 2)) for k in kernel]
    sizes = draw(st.lists(st.integers(5, 9), min_size=2, max_size=2))
    ceil = draw(st.booleans())
    attributes: dict[str, Any] = {
        "kernel_shape": kernel,
        "strides": strides,
        "pads": pads + pads,
        "ceil_mode": int(ceil),
    }
    if ceil:
        # Shape inference, not the runtime, counts windows that would begin behind the padding.
        for size, k, stride, pad in zip(sizes, kernel, strides, pads, strict=True):
            assume(-(-(size + 2 * pad - k) // stride) * stride < size + pad)
    if draw(st.booleans()):
        dilations = draw(st.lists(st.integers(1, 2), min_size=2, max_size=2))
        attributes["dilations"] = dilations

        def reference(x: Tensor) -> Tensor:
            return F.max_pool2d(x, kernel, strides, pads, dilations, ceil)

        operator = "MaxPool"
    else:
        counted = draw(st.booleans())
        attributes["count_include_pad"] = int(counted)

        def reference(x: Tensor) -> Tensor:
            return F.avg_pool2d(x, kernel, strides, pads, ceil, counted)

        operator = "AveragePool"
    case = Case(operator, reference, [(2, 3, *sizes)], (0,), attributes, opset=19)
    return case, draw(st.sampled_from(DIMENSIONS))


@given(drawn=pools(), seed=NUMBERS)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_pool(drawn: tuple[Case, str], seed: int) -> None:
    check(*drawn, seed=seed)


@st.composite
def transposed_convolutions(draw: st.DrawFn) -> tuple[Case, str]:
    kernel, stride = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    pad = draw(st.integers(0, (kernel - 1) // 2))
    extra = draw(st.integers(0, stride - 1))
    group = draw(st.sampled_from([1, 2]))
    size = (4, 3, kernel, kernel)
    weight = np.random.default_rng(0).normal(size=size).astype(np.float32)

    def reference(x: Tensor) -> Tensor:
        w = torch.from_numpy(weight).double()
        return F.conv_transpose2d(x, w, None, stride, pad, extra, group)

    attributes = {
        "strides": [stride] * 2,
        "pads": [pad] * 4,
        "output_padding": [extra] * 2,
        "group": group,
    }
    case = Case("ConvTranspose", reference, [(2, 4, 4, 5), weight], (0,), attributes)
    return case, draw(st.sampled_from(DIMENSIONS))


@given(drawn=transposed_convolutions())
@settings(max_examples=20, deadline=None, derandomize=True)
def test_transposed_convolution(drawn: tuple[Case, str]) -> None:
    check(*drawn)


@st.composite
def slices(draw: st.DrawFn) -> tuple[Case, str]:
    axes = draw(st.lists(st.sampled_from([0, 1, -1]), min_size=1, max_size=3, unique=True))
    starts = [draw(st.integers(-7, 7)) for _ in axes]
    steps = [draw(st.sampled_from([1, 1, 2, 3, -1, -2])) for _ in axes]
    # ONNX Runtime takes an end beyond the first cell to mean all of them, forwards or backwards.
    beyond = [2**63 - 1 if step > 0 else -(2**63) for step in steps]
    ends = [draw(st.integers(-7, 7) | st.just(end)) for end in beyond]
    inputs = [X, ints(*starts), ints(*ends), ints(*axes), ints(*steps)]
    # PyTorch has no negative steps: the node itself says where each element comes from.
    numbers = np.arange(60, dtype=np.float32).reshape(X)
    run = session(
        ir.serde.deserialize_model(
            graph_of(Case("Slice", torch.clone, inputs), [numbers, *inputs[1:]], "fixed")
        )
    )
    places = torch.from_numpy(run.run(None, {"x0": numbers})[0]).long()

    def reference(x: Tensor) -> Tensor:
        return x.flatten()[places]

    return Case("Slice", reference, inputs), draw(st.sampled_from(DIMENSIONS))


@given(drawn=slices())
@settings(max_examples=50, deadline=None, derandomize=True)
def test_slice(drawn: tuple[Case, str]) -> None:
    check(*drawn)


@st.composite
def broadcasts(draw: st.DrawFn) -> tuple[Case, str]:
    whole = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    shapes = []
    for _ in range(2):
        sizes = [draw(st.sampled_from([size, 1])) for size in whole]
        shapes.append(tuple(sizes[draw(st.integers(0, len(sizes) - 1)) :]))
    operator = draw(st.sampled_from(["Add", "Mul", "Sub"]))
    reference = {"Add": torch.add, "Mul": torch.mul, "Sub": torch.sub}[operator]
    return Case(operator, reference, shapes, (0, 1)), draw(st.sampled_from(DIMENSIONS))


@given(drawn=broadcasts())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_broadcast(drawn: tuple[Case, str]) -> None:
    check(*drawn)


def test_sizes_that_turn_out_to_be_one_are_summed() -> None:
    graph = helper.make_graph(
        [helper.make_node("Mul", ["a", "b"], ["y"])],
        "g",
        [
            helper.make_tensor_value_info("a", TensorProto.FLOAT, ["p", "q"]),
            helper.make_tensor_value_info("b", TensorProto.FLOAT, ["r", "s"]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    run = session(differentiated(proto, ["a", "b"]))
    for shapes in [((3, 1), (1, 4)), ((3, 4), (1, 1)), ((3, 4), (3, 4))]:
        a, b = leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
        g = torch.randn((a * b).shape)
        feeds = {"a": a.detach().numpy(), "b": b.detach().numpy(), "g": g.numpy()}
        _, *found = run.run(None, feeds)
        for actual, expected in zip(found, torch.autograd.grad(a * b, leaves, g), strict=True):
            close(actual, expected)


def test_one_graph_serves_every_size() -> None:
    """The sizes that leave a remainder of the stride and those that do not."""
    weight = np.random.default_rng(0).normal(size=(2, 3, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node(
            "AveragePool", ["r"], ["y"], kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1,
            pads=[1, 1, 1, 1],
        ),
    ]  # fmt: skip
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, "H", "W"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [x], [y], [numpy_helper.from_array(weight, "w")])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    run = session(differentiated(proto, ["x"]))
    for shape in [(1, 3, 7, 8), (3, 3, 8, 9), (2, 3, 10, 11), (1, 3, 12, 5)]:
        x = torch.randn(shape, requires_grad=True)
        hidden = F.relu(F.conv2d(x, torch.from_numpy(weight), stride=2, padding=1))
        y = F.avg_pool2d(hidden, 3, 2, 1, ceil_mode=True, count_include_pad=False)
        g = torch.randn(y.shape)
        _, found = run.run(None, {"x": x.detach().numpy(), "g": g.numpy()})
        close(found, torch.autograd.grad(y, x, g)[0])


def node_graph(*nodes: onnx.NodeProto, sizes: Sequence[int | str] = ("N", 4)) -> onnx.ModelProto:
    """From x of the given sizes to y, float32."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, sizes)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    constants = [
        numpy_helper.from_array(number(0.1), "scale"),
        numpy_helper.from_array(np.array(3, np.int8), "zero"),
        numpy_helper.from_array(ints(1), "one"),
    ]
    graph = helper.make_graph(nodes, "g", [x], [y], constants)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("acme", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def gradient(proto: onnx.ModelProto, x: np.ndarray, g: np.ndarray) -> np.ndarray:
    return session(differentiated(proto, ["x"])).run(None, {"x": x, "g": g})[-1]


def test_a_value_that_is_used_twice_gets_both_cotangents() -> None:
    proto = node_graph(
        helper.make_node("Mul", ["x", "x"], ["s"]),
        helper.make_node("Exp", ["x"], ["e"]),
        helper.make_node("Add", ["s", "e"], ["y"]),
    )
    x, g = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    close(gradient(proto, x, g), torch.from_numpy(g * (2 * x + np.exp(x))))


def test_several_outputs_and_inner_values() -> None:
    """d(a + b) where b comes of a as well: the whole derivative, and None where no path leads."""
    a, unused = (ir.val(n, dtype=ir.DataType.FLOAT, shape=[2, 3]) for n in ("a", "unused"))
    b = ir.node("Exp", [a]).outputs[0]
    c = ir.node("Neg", [b]).outputs[0]
    for value in (b, c):
        value.dtype, value.shape = a.dtype, a.shape
    gb, gc = (ir.val(n, dtype=ir.DataType.FLOAT, shape=[2, 3]) for n in ("gb", "gc"))
    emit = Emitter("grad")
    da, db, none, dc = vjp({b: gb, c: gc}, [a, b, unused, c], emit)
    assert none is None and dc is gc
    assert [node.op_type for node in emit.nodes] == ["Neg", "Add", "Mul"]
    assert db is emit.nodes[1].outputs[0] and da is emit.nodes[2].outputs[0]


def test_whole_numbers_stop_the_gradient() -> None:
    proto = node_graph(
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Reshape", ["x", "s"], ["r"]),
        helper.make_node("Greater", ["x", "scale"], ["b"]),
        helper.make_node("Cast", ["b"], ["m"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["r", "m"], ["y"]),
    )
    x, g = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    close(gradient(proto, x, g), torch.from_numpy(g * (x > 0.1)))


def test_casts_and_dropout_pass() -> None:
    proto = node_graph(
        helper.make_node("Cast", ["x"], ["c"], to=TensorProto.DOUBLE),
        helper.make_node("Dropout", ["c"], ["d", "mask"]),
        helper.make_node("Exp", ["d"], ["e"]),
        helper.make_node("CastLike", ["e", "x"], ["y"]),
    )
    x, g = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    close(gradient(proto, x, g), torch.from_numpy(g * np.exp(x)))


def test_dropout_in_training_is_refused() -> None:
    proto = node_graph(helper.make_node("Dropout", ["x", "scale", "true"], ["y"]))
    proto.graph.initializer.append(numpy_helper.from_array(np.array(True), "true"))
    with pytest.raises(MissingRuleError, match="in training mode"):
        differentiated(proto, ["x"])


def test_quantization_passes_inside_its_range() -> None:
    proto = node_graph(
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("Transpose", ["q"], ["t"]),
        helper.make_node("DequantizeLinear", ["t", "scale", "zero"], ["d"]),
        helper.make_node("Mul", ["d", "d"], ["y"]),
    )
    x = np.array([[-14.0, -13.14, -13.06, 0.31], [1.0, 12.4, 12.44, 12.5]], np.float32)
    leaf = torch.from_numpy(x).requires_grad_()
    y = torch.fake_quantize_per_tensor_affine(leaf, 0.1, 3, -128, 127).T ** 2
    g = torch.randn(4, 2)
    close(gradient(proto, x, g.numpy()), torch.autograd.grad(y, leaf, g)[0])


@pytest.mark.parametrize("outputs", [("a", None), (None, "a"), ("a", "b")])
def test_split(outputs: tuple[str | None, str | None]) -> None:
    used = [name for name in outputs if name]
    proto = node_graph(
        helper.make_node("Split", ["x"], [n or f"unused{i}" for i, n in enumerate(outputs)],
                         num_outputs=2, axis=1),
        helper.make_node("Mul" if len(used) == 2 else "Identity", used, ["y"]),
    )  # fmt: skip
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    leaf = torch.from_numpy(x).requires_grad_()
    parts = [p for p, n in zip(leaf.chunk(2, 1), outputs, strict=True) if n]
    y = parts[0] * parts[1] if len(parts) == 2 else parts[0] * 1
    g = torch.randn(3, 2)
    close(gradient(proto, x, g.numpy()), torch.autograd.grad(y, leaf, g)[0])


def test_half_precision_keeps_its_type() -> None:
    """Layer normalisation of numbers whose squares float16 cannot hold."""
    nodes = [
        helper.make_node("LayerNormalization", ["x", "w"], ["n"]),
        helper.make_node("Gelu", ["n"], ["y"]),
    ]
    weight = numpy_helper.from_array(VECTOR.astype(np.float16), "w")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["N", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)
    graph = helper.make_graph(nodes, "g", [x], [y], [weight])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    inputs = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float16)
    x, g = inputs[0] * np.float16(1000), inputs[1]
    found = gradient(proto, x, g)
    leaf = torch.from_numpy(x).double().requires_grad_()
    y = F.gelu(F.layer_norm(leaf, (4,), torch.from_numpy(VECTOR.astype(np.float16)).double()))
    assert found.dtype == np.float16
    close(found, torch.autograd.grad(y, leaf, torch.from_numpy(g).double())[0], 5e-3)


def test_a_missing_rule_names_operator_node_tensor_and_module() -> None:
    proto = node_graph(helper.make_node("Det", ["x"], ["y"], "the node"))
    properties = {
        "pkg.torch.onnx.name_scopes": "['', 'head', 'head.volume', 'det_1']",
        "pkg.torch.onnx.class_hierarchy": "['acme.Net', 'acme.Head', 'acme.Volume', 'aten.det']",
    }
    for key, value in properties.items():
        proto.graph.node[0].metadata_props.add(key=key, value=value)
    with pytest.raises(MissingRuleError) as error:
        differentiated(proto, ["x"])
    assert str(error.value) == (
        "no gradient through Det (node 'the node', tensor 'y', from module 'head.volume' (Volume)):"
        " there is no rule for this operator. Choose a layer behind it."
    )


def test_a_function_of_the_model_has_to_be_inlined() -> None:
    proto = node_graph(
        helper.make_node("Swirl", ["x"], ["s"], "a", domain="acme"),
        helper.make_node("Neg", ["s"], ["y"]),
    )
    with pytest.raises(MissingRuleError, match=r"acme\.Swirl .* has to be inlined first"):
        differentiated(proto, ["x"])


def test_a_branch_that_reads_the_layer_is_refused() -> None:
    branch = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["n"])], "b", [],
        [helper.make_tensor_value_info("n", TensorProto.FLOAT, None)],
    )  # fmt: skip
    proto = node_graph(
        helper.make_node("Cast", ["one"], ["c"], to=TensorProto.BOOL),
        helper.make_node("If", ["c"], ["y"], "i", then_branch=branch, else_branch=branch),
    )
    with pytest.raises(MissingRuleError, match="no gradient through If"):
        differentiated(proto, ["x"])


def test_a_weight_that_depends_on_the_layer_is_refused() -> None:
    proto = node_graph(helper.make_node("Conv", ["x", "x"], ["y"], "c"), sizes=(2, 2, 1, 1))
    with pytest.raises(MissingRuleError, match="its input 1 depends on the layer too"):
        differentiated(proto, ["x"])


def test_every_rule_is_tested_or_stands_here() -> None:
    elsewhere = {"Cast", "CastLike", "Dropout", "Slice", "Conv", "ConvTranspose"}
    elsewhere |= {"QuantizeLinear", "DequantizeLinear"}
    assert set(RULES) == {case.operator for case in CASES} | elsewhere
    assert not set(RULES) & NO_GRADIENT


class Stage(nn.Module):
    """Convolutions of all kinds, squeeze and excitation, pools, a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=6)
        self.squeeze = nn.Conv2d(6, 6, 1)
        self.group = nn.GroupNorm(2, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.down(x))
        y = F.hardswish(self.depthwise(F.relu6(x)))
        y = y * F.hardsigmoid(self.squeeze(F.adaptive_avg_pool2d(y, 1)))
        first, second = (x + y).chunk(2, 1)
        z = torch.cat([F.max_pool2d(first, 3, 2, 1), F.avg_pool2d(second, 3, 2, 1)], 1)
        z = torch.cat([z, F.avg_pool2d(z, 3, 1, 1, count_include_pad=False)], 1)
        return self.head(F.silu(self.group(z)).mean((2, 3)))


class Block(nn.Module):
    """Attention over shifted cells, layer normalisation and GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.qkv = nn.Linear(4, 12)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.roll(x.permute(0, 2, 3, 1), (-1, 2), (1, 2)).flatten(1, 2)
        q, k, v = self.qkv(self.norm(rows)).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        rows = rows + mixed
        rows = rows + self.mlp(F.normalize(rows, dim=-1))
        return self.head(rows[:, 1:].amax(1) + rows[:, 0])


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("module", [Stage, Block])
def test_exported_module(module: type[nn.Module], dynamo: bool, tmp_path: Path) -> None:
    """At other batch sizes than the one of the export, and an odd number of cells."""
    torch.manual_seed(0)
    net = module().eval()
    x = torch.randn(2, 4, 11, 9)
    if isinstance(net, Stage):
        net.norm.running_mean.normal_()
        net.norm.running_var.uniform_(0.5, 2.0)
    path = tmp_path / "net.onnx"
    with warnings.catch_warnings():
        # The older exporter is deprecated; files of it are not.
        warnings.simplefilter("ignore")
        named = {"input_names": ["x"], "output_names": ["y"], "opset_version": 18}
        named["external_data"] = False
        if dynamo:
            batch = ({0: torch.export.Dim.DYNAMIC},)
            torch.onnx.export(
                net, (x,), path, dynamo=True, dynamic_shapes=batch, verbose=False, **named
            )
        else:
            torch.onnx.export(net, (x,), path, dynamo=False, dynamic_axes={"x": {0: "N"}}, **named)
    model = ir.load(path)
    # The older exporter computes shapes in the graph; behind those nothing is inferred.
    fold_constants(model, onnx_shape_inference=True)
    run = session(differentiated(ir.serde.serialize_model(model), ["x"]))
    for count in (1, 3):
        x = torch.randn(count, 4, 11, 9, requires_grad=True)
        y = net(x)
        g = torch.randn(y.shape)
        forward, found = run.run(None, {"x": x.detach().numpy(), "g": g.numpy()})
        close(forward, y)
        close(found, torch.autograd.grad(y, x, g)[0], 2e-5)


def test_zeros_are_put_back_under_layout_passes() -> None:
    """A Pad that named one axis alone was moved past a Transpose by ONNX Runtime as if for all."""
    nodes = [
        helper.make_node("Transpose", ["x"], ["turned"], perm=[2, 0, 1]),
        helper.make_node("Gather", ["turned", "place"], ["taken"], axis=0),
        helper.make_node("Transpose", ["taken"], ["y"], perm=[1, 0]),
    ]
    proto = node_graph(*nodes, sizes=("N", 4, 3))
    proto.graph.initializer.append(numpy_helper.from_array(np.array(1, dtype=np.int64), "place"))
    x, g = np.zeros((2, 4, 3), np.float32), np.arange(8, dtype=np.float32).reshape(4, 2)
    expected = np.zeros_like(x)
    expected[:, :, 1] = g.T
    np.testing.assert_array_equal(gradient(proto, x, g), expected)
