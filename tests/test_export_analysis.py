"""Which layer, logits and head are found, in graphs of many exporters' styles."""

from __future__ import annotations

import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from diffcam_export.analysis import Found, OnnxAnalysisError, analyse
from diffcam_export.reading import read_onnx
from onnxfiles import LIGHT, C, K, Writer, image, pooled, run, saved


def found_in(model: onnx.ModelProto, folder: Path, **options: Any) -> tuple[ir.Model, Found]:
    read = read_onnx(saved(model, folder / "model.onnx"))
    return read, analyse(read.graph, **options)


def assert_pooled_linear(
    model: ir.Model, found: Found, x: np.ndarray, tolerance: float = 1e-4
) -> None:
    """z_n - z_m = W (mean A_n - mean A_m), by a run of the whole network on several images."""
    assert found.weight is not None, found.reason
    names = (str(found.layer.name), str(found.logits.name), str(found.weight.name))
    a, z, w = run(model, {str(model.graph.inputs[0].name): x}, *names)
    w = {"KC": w, "CK": w.T, "KC11": w.reshape(w.shape[:2])}[str(found.weight_layout)]
    mean = a.astype(np.float64).mean(axis=(2, 3) if found.channel_axis == 1 else (1, 2))
    z = z.reshape(len(z), -1).astype(np.float64)
    assert len(z) > 1
    np.testing.assert_allclose(z - z[:1], (mean - mean[:1]) @ w.T, atol=tolerance * np.abs(z).max())


def gap_gemm(w: Writer, x: str) -> str:
    x = w("Flatten", w("GlobalAveragePool", x))
    return w("Gemm", x, w.weight(K, C), w.weight(K), transB=1, beta=0.5)


def mean_matmul_add(w: Writer, x: str) -> str:
    x = w("ReduceMean", x, w.ints(-1, -2), keepdims=0)
    return w("Add", w.weight(K), w("MatMul", x, w.weight(C, K)))


def window_conv(w: Writer, x: str) -> str:
    x = w("AveragePool", x, kernel_shape=[5, 6])
    x = w("Conv", w("Dropout", x), w.weight(K, C, 1, 1), w.weight(K))
    return w("Squeeze", x, w.ints(2, 3))


def conv_first(w: Writer, x: str) -> str:
    x = w("Conv", x, w.weight(K, C, 1, 1), w.weight(K))
    return w("Reshape", w("GlobalAveragePool", x), w.ints(0, -1))


def keras(w: Writer, x: str) -> str:
    x = w("Transpose", x, perm=[0, 2, 3, 1], name="nhwc")
    x = w("ReduceMean", x, w.ints(1, 2), keepdims=0)
    return w("Softmax", w("Add", w("MatMul", x, w.weight(C, K)), w.weight(K)))


def sum_and_divide(w: Writer, x: str) -> str:
    x = w("ReduceSum", x, w.ints(2, 3), keepdims=0)
    x = w("Div", x, w.constant(np.float32(30)))
    return w("MatMul", x, w("Transpose", w.weight(K, C), perm=[1, 0]))


def sized_by_shape(w: Writer, x: str) -> str:
    """PyTorch's `x.view(x.size(0), -1)`, with the size of the image's batch."""
    n = w("Unsqueeze", w("Gather", w("Shape", "image"), w.constant(np.int64(0))), w.ints(0))
    x = w("Reshape", w("GlobalAveragePool", x), w("Concat", n, w.ints(-1), axis=0))
    return w("Gemm", x, w.weight(C, K))


def two_means(w: Writer, x: str) -> str:
    x = w("ReduceMean", w("ReduceMean", x, w.ints(3), keepdims=0), w.ints(2), keepdims=0)
    return w("LogSoftmax", w("Gemm", x, w.weight(K, C), transB=1), axis=1)


def flatten_mean(w: Writer, x: str) -> str:
    x = w("ReduceMean", w("Reshape", x, w.ints(0, C, -1)), w.ints(2), keepdims=0)
    return w("Gemm", w("Cast", x, to=TensorProto.FLOAT), w.weight(K, C), transB=1)


@pytest.mark.parametrize(
    ("head", "layout", "layer", "probabilities"),
    [
        (gap_gemm, "KC", "A", False),
        (mean_matmul_add, "CK", "A", False),
        (window_conv, "KC11", "A", False),
        (conv_first, "KC11", "A", False),
        (keras, "CK", "nhwc", True),
        (sum_and_divide, "CK", "A", False),
        (sized_by_shape, "CK", "A", False),
        (two_means, "KC", "A", False),
        (flatten_mean, "KC", "A", False),
    ],
)
def test_pooled_linear_heads(
    tmp_path: Path,
    head: Callable[[Writer, str], str],
    layout: str,
    layer: str,
    probabilities: bool,
) -> None:
    w = Writer()
    model, found = found_in(w.model(head(w, w.features())), tmp_path)
    assert found.layer.name == layer
    assert found.channel_axis == (3 if layer == "nhwc" else 1)
    assert (found.weight_layout, found.probabilities) == (layout, probabilities)
    assert found.output is model.graph.outputs[0]
    assert_pooled_linear(model, found, image(3, 3, 10, 12))


def mlp(w: Writer, x: str) -> str:
    x = w("Relu", w("Gemm", w("Flatten", w("GlobalAveragePool", x)), w.weight(C, 7)))
    return w("Gemm", x, w.weight(7, K))


def flat(w: Writer, x: str) -> str:
    return w("Gemm", w("Flatten", x), w.weight(C * 30, K))


def two_linear(w: Writer, x: str) -> str:
    x = w("Gemm", w("Flatten", w("GlobalAveragePool", x)), w.weight(C, 7))
    return w("Gemm", x, w.weight(7, K))


def scaled(w: Writer, x: str) -> str:
    return w("Gemm", w("Flatten", w("GlobalAveragePool", x)), w.weight(C, K), alpha=2.0)


def max_pooled(w: Writer, x: str) -> str:
    return w("Gemm", w("Flatten", w("GlobalMaxPool", x)), w.weight(C, K))


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (mlp, "Relu (n8) is neither pooling nor a linear map"),
        (flat, "it has no weight of shape (K, C) = (5, 8)"),
        (two_linear, "it has no weight of shape (K, C) = (5, 8)"),
        (scaled, "its logits are not W mean(A) + b for its weight w2"),
        (max_pooled, "GlobalMaxPool (n5) is neither pooling nor a linear map"),
    ],
)
def test_other_heads_say_why(
    tmp_path: Path, head: Callable[[Writer, str], str], reason: str
) -> None:
    w = Writer()
    _, found = found_in(w.model(head(w, w.features())), tmp_path)
    assert (found.layer.name, found.weight) == ("A", None)
    assert reason in found.reason


def test_products_of_the_activation_are_not_linear(tmp_path: Path) -> None:
    w = Writer()
    x = w.features()
    _, found = found_in(w.model(gap_gemm(w, w("Mul", x, x))), tmp_path, layer="A")
    assert "Mul (n5) combines two values that depend on the layer" in found.reason


def test_a_window_smaller_than_the_map_is_no_closed_form(tmp_path: Path) -> None:
    w = Writer()
    x = w("AveragePool", w.features(), kernel_shape=[4, 5], strides=[4, 5])
    model = w.model(w("Gemm", w("Flatten", x), w.weight(C, K)))
    _, found = found_in(model, tmp_path)
    assert found.layer.name == "A"
    assert found.head == "AveragePool -> Gemm"
    assert "its logits are not W mean(A) + b" in found.reason


def test_a_window_is_no_closed_form_where_the_size_is_free(tmp_path: Path) -> None:
    w = Writer()
    x = w("AveragePool", w.features(), kernel_shape=[3, 4])
    x = w("ReduceMean", x, w.ints(2, 3), keepdims=0)
    model = w.model(w("Gemm", x, w.weight(C, K)), image=("N", 3, "H", "W"))
    _, found = found_in(model, tmp_path)
    assert found.layer.name == "A"
    assert "its logits are not W mean(A) + b" in found.reason


@pytest.mark.parametrize("shape", [(1, 3, 10, 12), ("N", 3, "H", "W"), (None, None, None, None)])
def test_sizes_may_be_fixed_or_free(tmp_path: Path, shape: tuple[Any, ...]) -> None:
    w = Writer()
    _, found = found_in(w.model(gap_gemm(w, w.features()), image=shape), tmp_path)
    assert found.layer.name == "A"
    assert found.weight_layout == "KC"


def test_a_map_of_class_scores_is_passed_over(tmp_path: Path) -> None:
    w = Writer()
    x = w("Relu", w("Conv", w("Dropout", w.features()), w.weight(K, C, 1, 1)))
    model = w.model(w("Flatten", w("GlobalAveragePool", x)))
    _, found = found_in(model, tmp_path)
    assert found.layer.name == "A"
    assert found.candidates[0].note.startswith("no weights between it and the logits")
    assert "Relu (n7) is neither pooling nor a linear map" in found.reason


def test_named_layers(tmp_path: Path) -> None:
    model = pooled()
    _, found = found_in(model, tmp_path, layer="maxpool2")
    assert found.layer.name == "maxpool2"
    assert found.head == "Conv -> Relu -> GlobalAveragePool -> Gemm"
    assert found.weight is None
    for name, message in [
        ("maxpool3", "did you mean maxpool2"),
        ("flatten6", r"has the shape \('N', 8\), and is no spatial activation"),
    ]:
        with pytest.raises(OnnxAnalysisError, match=message):
            found_in(model, tmp_path, layer=name)


def test_a_layer_that_data_passes_by(tmp_path: Path) -> None:
    w = Writer()
    x = w.features()
    y = w("Conv", x, w.weight(C, C, 1, 1), name="branch")
    _, found = found_in(w.model(gap_gemm(w, w("Add", x, y, name="sum"))), tmp_path, layer="branch")
    assert "also reads A, which does not pass through the layer" in found.reason
    _, found = found_in(w.model("gemm9"), tmp_path)
    assert found.layer.name == "sum"


def test_several_outputs(tmp_path: Path) -> None:
    w = Writer()
    x = w.features()
    features = w("Flatten", w("GlobalAveragePool", x), name="features")
    logits = w("Gemm", features, w.weight(C, K), name="logits")
    prob = w("Softmax", logits, name="prob")
    aux = w("Gemm", w("Flatten", "maxpool2"), w.weight(6 * 30, K), name="aux")
    w("ArgMax", logits, axis=1, name="class")
    _, found = found_in(w.model(features, prob, logits, "class", x), tmp_path)
    assert (found.logits.name, found.output.name) == ("logits", "logits")
    assert not found.probabilities
    _, found = found_in(w.model(features, prob), tmp_path)
    assert (found.logits.name, found.output.name, found.probabilities) == ("logits", "prob", True)
    with pytest.raises(OnnxAnalysisError, match=r"2 outputs that could be logits.*--logits"):
        found_in(w.model(logits, aux), tmp_path)
    _, found = found_in(w.model(logits, aux), tmp_path, logits="aux")
    assert (found.logits.name, found.layer.name) == ("aux", "maxpool2")
    with pytest.raises(OnnxAnalysisError, match="no output holds logits"):
        found_in(w.model("class"), tmp_path)
    _, found = found_in(w.model("class"), tmp_path, logits="logits")
    assert (found.logits.name, found.output.name) == ("logits", "class")
    with pytest.raises(OnnxAnalysisError, match="did you mean logits"):
        found_in(w.model("class"), tmp_path, logits="logit")
    with pytest.raises(OnnxAnalysisError, match="must be floats"):
        found_in(w.model("class"), tmp_path, logits="A")


def test_outputs_that_are_made_of_the_logits(tmp_path: Path) -> None:
    w = Writer()
    features = w("Flatten", w("GlobalAveragePool", w.features()), name="features")
    logits = w("Gemm", features, w.weight(C, K), name="logits")
    prob = w("Softmax", logits, name="prob")
    scaled = w("Mul", logits, w.constant(np.float32(100)))
    ends = [w("ReduceMax", logits, w.ints(1)), w("ReduceMin", logits, w.ints(1))]
    widest = w("Concat", *ends, axis=1)
    indices = helper.make_node("TopK", [prob, w.ints(3)], ["best", "indices"])
    w.nodes.append(indices)
    for made in (w("Sigmoid", logits), scaled, w("Softmax", scaled), widest, "best"):
        for first, name in ((logits, "logits"), (prob, "prob")):
            _, found = found_in(w.model(features, first, made, "indices"), tmp_path)
            assert (found.logits.name, found.output.name) == ("logits", name), made
            assert found.layer.name == "A"
    # With weights of its own it may be the classifier.
    distance = w("Sub", w("Unsqueeze", features, w.ints(1)), w.weight(K, C))
    near = w("ReduceSum", w("Abs", distance), w.ints(2), keepdims=0)
    with pytest.raises(OnnxAnalysisError, match=r"2 outputs that could be logits.*--logits"):
        found_in(w.model(features, near), tmp_path)


def test_logits_with_spare_axes(tmp_path: Path) -> None:
    w = Writer()
    x = w("Conv", w("GlobalAveragePool", w.features()), w.weight(K, C, 1, 1))
    model, found = found_in(w.model(w("Softmax", x, axis=1)), tmp_path)
    assert found.logits.shape is not None
    assert list(found.logits.shape)[1:] == [K, 1, 1]
    assert found.probabilities
    assert_pooled_linear(model, found, image())


def test_custom_operators(tmp_path: Path) -> None:
    w = Writer()
    x = w("Reorder", w("Relu", "image"), domain="com.acme")
    found_in(w.model(gap_gemm(w, w.features()), x), tmp_path)
    w = Writer()
    x = w("Flatten", w("GlobalAveragePool", w.features()))
    logits = w("FusedGemm", x, w.weight(C, K), domain="com.microsoft", name="logits")
    model = w.model(logits)
    model.graph.output[0].CopyFrom(
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", K])
    )
    _, found = found_in(model, tmp_path)
    assert found.layer.name == "A"
    assert "FusedGemm (n7) is an operator of com.microsoft" in found.reason


@pytest.mark.parametrize("style", ["vector", "tokens", "regression"])
def test_what_is_no_image_classifier(tmp_path: Path, style: str) -> None:
    w = Writer()
    if style == "vector":
        model = w.model(w("Gemm", "image", w.weight(4, K)), image=("N", 4))
        message = "no layer found.*The model has no candidates"
    elif style == "tokens":
        x = w("Gather", w.weight(50, C), "image")
        model = w.model(w("MatMul", x, w.weight(C, 50)), image=("N", "T"), kind=TensorProto.INT64)
        message = r"no output holds logits.*\(N, T, 50\)"
    else:
        x = w("Flatten", w("GlobalAveragePool", w.features()))
        model = w.model(w("Gemm", x, w.weight(C, 1)))
        message = "no output holds logits.*of two or more classes"
    with pytest.raises(OnnxAnalysisError, match=message):
        found_in(model, tmp_path)


def test_a_network_of_tokens_says_so(tmp_path: Path) -> None:
    w = Writer()
    x = w("Transpose", w("Reshape", "image", w.ints(0, 3, 120)), perm=[0, 2, 1])
    x = w("Relu", w("MatMul", x, w.weight(3, C)), name="tokens")
    x = w("Gather", x, w.constant(np.int64(0)), axis=1)
    model = w.model(w("Gemm", x, w.weight(C, K)))
    with pytest.raises(OnnxAnalysisError, match=r"ends in tokens, tokens \('N', 120, 8\)"):
        found_in(model, tmp_path)


def quantized(folder: Path, model: onnx.ModelProto) -> onnx.ModelProto:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter([{"image": image(4, 3, 10, 12)}])

        def get_next(self) -> Any:
            return next(self.batches, None)

    quantize_static(
        saved(model, folder / "float.onnx"),
        folder / "quantized.onnx",
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
    )
    return onnx.load(folder / "quantized.onnx")


def test_quantized_models(tmp_path: Path) -> None:
    proto = quantized(tmp_path, pooled())
    kinds = {node.op_type for node in proto.graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    model, found = found_in(proto, tmp_path)
    producer, weights = found.layer.producer(), found.weight
    assert producer is not None
    assert producer.op_type == "DequantizeLinear"
    assert weights is not None
    assert weights.producer() is not None
    # The logits are rounded to 8 bits.
    assert_pooled_linear(model, found, image(3, 3, 10, 12), tolerance=0.05)
    integers = producer.inputs[0]
    assert integers is not None
    with pytest.raises(OnnxAnalysisError, match="take the value behind its DequantizeLinear"):
        analyse(model.graph, layer=integers.name)


@pytest.mark.parametrize(
    ("name", "layer", "head", "closed"),
    [
        ("bvlc_alexnet", "r14", "Gemm -> Relu -> Gemm -> Relu -> Gemm", False),
        ("densenet121", "r907", "GlobalAveragePool -> Conv", True),
        ("inception_v1", "r137", "AveragePool -> Gemm", True),
        ("inception_v2", "r504", "AveragePool -> Gemm", True),
        ("resnet50", "r171", "AveragePool -> Gemm", True),
        ("shufflenet", "r198", "AveragePool -> Gemm", True),
        ("squeezenet", "r60", "Conv -> Relu -> GlobalAveragePool", False),
        ("vgg19", "r36", "Gemm -> Relu -> Gemm -> Relu -> Gemm", False),
        ("zfnet512", "r14", "Gemm -> Relu -> Gemm -> Relu -> Gemm", False),
    ],
)
def test_model_zoo(name: str, layer: str, head: str, closed: bool) -> None:
    found = analyse(read_onnx(LIGHT / f"light_{name}.onnx").graph)
    assert (found.layer.name, found.head) == (layer, head)
    assert (found.weight is not None) == closed
    assert found.probabilities == (name != "densenet121")


def exported(model: nn.Module, path: Path, *, dynamo: bool, opset: int, size: int) -> Path:
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"dynamic_axes": {"image": {0: "n"}}, "input_names": ["image"]}
    if dynamo:
        batch = torch.export.Dim("n")
        options = {"dynamic_shapes": ({0: batch},), "external_data": False, "verbose": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), path, dynamo=dynamo, opset_version=opset, **options)
    return path


# A layer of the graph is a value, not a module's result: DenseNet's last ReLU is one.
TORCHVISION = [
    ("squeezenet1_1", (512, 13, 13), False),
    ("mobilenet_v3_small", (576, 7, 7), False),
    ("shufflenet_v2_x0_5", (1024, 7, 7), True),
    ("resnet18", (512, 7, 7), True),
    ("mnasnet0_5", (1280, 7, 7), True),
]
LARGER = [
    ("densenet121", (1024, 7, 7), True),
    ("efficientnet_b0", (1280, 7, 7), True),
    ("googlenet", (1024, 7, 7), True),
    ("inception_v3", (2048, 8, 8), True),
    ("vgg11", (512, 7, 7), False),
    ("convnext_tiny", (768, 7, 7), False),
    ("swin_t", (768, 7, 7), True),
]


def check_torchvision(
    folder: Path, name: str, grid: tuple[int, ...], closed: bool, *, dynamo: bool, opset: int
) -> None:
    torch.manual_seed(0)
    options = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
    model = pytest.importorskip("torchvision").models.get_model(name, weights=None, **options)
    size = 299 if name == "inception_v3" else 224
    path = exported(model.eval(), folder / "model.onnx", dynamo=dynamo, opset=opset, size=size)
    read = read_onnx(path)
    found = analyse(read.graph)
    x = image(2, 3, size, size)
    key, layer = str(read.graph.inputs[0].name), str(found.layer.name)
    # The conversion to opset 18 changes no result.
    own = run(onnx.load(path), {key: x})[0]
    a, z = run(read, {key: x}, layer, str(found.output.name))
    np.testing.assert_allclose(z, own, rtol=1e-5, atol=1e-6 * np.abs(own).max())
    c, h, w = grid
    assert a.shape == ((2, c, h, w) if found.channel_axis == 1 else (2, h, w, c))
    assert (found.weight is not None) == closed, found.reason
    if closed:
        assert_pooled_linear(read, found, x, 1e-3)


@pytest.mark.parametrize(("name", "grid", "closed"), TORCHVISION)
def test_torchscript_exports(
    tmp_path: Path, name: str, grid: tuple[int, ...], closed: bool
) -> None:
    check_torchvision(tmp_path, name, grid, closed, dynamo=False, opset=13)


@pytest.mark.parametrize(("name", "grid", "closed"), [TORCHVISION[0], TORCHVISION[3]])
def test_dynamo_exports(tmp_path: Path, name: str, grid: tuple[int, ...], closed: bool) -> None:
    check_torchvision(tmp_path, name, grid, closed, dynamo=True, opset=18)


@pytest.mark.slow
@pytest.mark.parametrize(("dynamo", "opset"), [(False, 14), (False, 17), (True, 18), (True, 20)])
@pytest.mark.parametrize(("name", "grid", "closed"), TORCHVISION + LARGER)
def test_all_exports(
    tmp_path: Path, name: str, grid: tuple[int, ...], closed: bool, dynamo: bool, opset: int
) -> None:
    check_torchvision(tmp_path, name, grid, closed, dynamo=dynamo, opset=opset)


@pytest.mark.slow
def test_a_third_party_file(tmp_path: Path) -> None:
    """SqueezeNet 1.1 of the model zoo, opset 7, in the source archive of skl2onnx."""
    import subprocess
    import sys

    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "skl2onnx"]
    done = subprocess.run([*command, "skl2onnx==1.14.0", "-d", tmp_path], capture_output=True)
    if done.returncode:
        pytest.skip(f"skl2onnx 1.14.0 cannot be downloaded: {done.stderr.decode()[-200:]}")
    member = "skl2onnx-1.14.0/docs/tutorial/squeezenet1.1-7.onnx"
    with tarfile.open(tmp_path / "skl2onnx-1.14.0.tar.gz") as archive:
        archive.extract(member, tmp_path, filter="data")
    path = tmp_path / member
    read = read_onnx(path)
    found = analyse(read.graph)
    assert found.layer.name == "squeezenet0_concat7"
    assert "Relu (squeezenet0_relu25_fwd)" in found.reason
    x = image(1, 3, 224, 224)
    np.testing.assert_array_equal(run(read, {"data": x})[0], run(onnx.load(path), {"data": x})[0])
