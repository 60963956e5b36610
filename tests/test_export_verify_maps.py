"""What `verify` finds of each kind of file that the exporter makes, right and wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from diffcam_export import OnnxExplainer, export_onnx
from diffcam_export.verify import Report, verify
from diffcam_fast import Contrast
from diffcam_fast.images.preprocess import Preprocess
from networks import pooled

CPU = ["CPUExecutionProvider"]
PREPROCESS = Preprocess((32, 32))


def images(n: int = 2, seed: int = 1) -> Tensor:
    return torch.randn((n, 3, 32, 32), generator=torch.Generator().manual_seed(seed))


def network() -> nn.Sequential:
    """Its layers are 0 to 2, and its head is no linear map."""
    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 9), nn.ReLU(), nn.Linear(9, 5)]
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), *head
    ).eval()


def linear(channels: int, depth: int, *, norm: bool = False, classes: int = 5) -> nn.Sequential:
    """Convolutions and a linear head."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, 2, 1), nn.ReLU()]
    for _ in range(depth):
        layers.append(nn.Conv2d(channels, channels, 3, 1, 1, bias=not norm))
        layers += [nn.BatchNorm2d(channels)] if norm else []
        layers.append(nn.ReLU())
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, *pool, nn.Linear(channels, classes)).eval()


def written(model: nn.Module, path: Path) -> Path:
    """A plain ONNX file."""
    with pytest.warns(DeprecationWarning, match="legacy|removed"):
        torch.onnx.export(
            model,
            (images(),),
            path,
            dynamo=False,
            input_names=["x"],
            output_names=["y"],
            dynamic_axes={"x": {0: "n"}, "y": {0: "n"}},
        )
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(network(), tmp_path_factory.mktemp("plain") / "plain.onnx")


def explained(model: Any, tmp_path: Path, **options: Any) -> Path:
    path = tmp_path / "model.cam.onnx"
    export_onnx(model, path, verify=False, **options)
    return path


def checked(path: Path, against: Any = None) -> Report:
    return verify(path, against=against, providers=CPU, threads=1, rounds=0)


def verdicts(report: Report) -> dict[str, str]:
    return {check.name: check.verdict for check in report.checks}


def details(report: Report) -> dict[str, str]:
    return {check.name: check.detail for check in report.checks}


def edited(path: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    model = onnx.load(path)
    change(model)
    onnx.save(model, out := path.with_name("edited.onnx"))
    return out


def facts(model: onnx.ModelProto, **changed: str) -> None:
    told = {p.key: p.value for p in model.metadata_props}
    texts = {f"diffcam.{key}": text for key, text in changed.items()}
    onnx.helper.set_model_props(model, told | texts)


def scale(model: onnx.ModelProto, output: str, factor: Any, *, operator: str = "Mul") -> None:
    for node in model.graph.node:
        node.output[:] = [f"{output}_before" if name == output else name for name in node.output]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(factor), f"{output}_by"))
    inputs = [f"{output}_before", f"{output}_by"]
    model.graph.node.append(onnx.helper.make_node(operator, inputs, [output]))


@pytest.mark.parametrize(
    "options",
    [
        {"targets": "input", "heatmap": "uint8"},
        {"topk": 3, "heatmap": "float32", "inline": True},
        {"method": "hires_cam", "relu": False, "contrast": "runner_up"},
    ],
    ids=["targets", "topk", "signed"],
)
def test_a_file_made_of_onnx(plain: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    path = explained(plain, tmp_path, **options)
    report = checked(path, plain)
    assert report.ok, report.lines()
    layer = f"map of {OnnxExplainer(path, providers=CPU).layer}"
    assert "a head made anew from the plain graph" in details(report)[layer]
    heat = [name for name in verdicts(report) if name.startswith("heatmap of")]
    assert len(heat) == ("heatmap" in options)


def test_a_wrong_map_of_an_onnx_file(plain: Path, tmp_path: Path) -> None:
    path = explained(plain, tmp_path, topk=3, heatmap="float32")

    def failed(change: Callable[[onnx.ModelProto], None]) -> list[str]:
        report = checked(edited(path, change), plain)
        return [
            name.split()[0] for name, verdict in verdicts(report).items() if verdict == "failed"
        ]

    def negative(model: onnx.ModelProto) -> None:
        [relu] = [node for node in model.functions[0].node if node.op_type == "Relu"][-1:]
        relu.op_type = "Neg"

    one, half = np.array([1, 1, 1.5], np.float32), np.float32(0.5)
    assert failed(negative) == ["runs", "runs", "map"]
    # The last of the three classes alone.
    assert failed(lambda model: scale(model, "diffcam_map", one[:, None, None])) == ["map"]
    assert failed(lambda model: scale(model, "diffcam_heatmap", half)) == ["heatmap"]
    shift = np.array([0, 0, 1])
    assert failed(lambda m: scale(m, "diffcam_target", shift, operator="Add"))[:1] == ["runs"]


def test_float16_on_the_cpu(tmp_path: Path) -> None:
    # Of so many logits one at least is rounded otherwise.
    model = linear(16, 1, norm=True, classes=100)
    path = explained(model, tmp_path, example_inputs=images(), dtype="float16")
    report = checked(path, model)
    assert report.ok, report.lines()
    assert "rounds what is read" in details(report)["own outputs"]
    wrong = edited(path, lambda proto: scale(proto, "logits", np.float16(1.02)))
    assert verdicts(checked(wrong, path))["own outputs"] == "failed"


def test_quantized_files(tmp_path: Path) -> None:
    plain = written(linear(8, 2), tmp_path / "plain.onnx")
    quantization = pytest.importorskip("onnxruntime.quantization")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self._left = iter([{"x": images(seed=seed).numpy()} for seed in range(3)])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._left, None)

    quantization.quantize_static(str(plain), str(tmp_path / "q.onnx"), Reader())
    path = explained(tmp_path / "q.onnx", tmp_path)
    report = checked(path, tmp_path / "q.onnx")
    assert report.ok, report.lines()
    # Whether a value that is read costs an operator its fusion is up to the processor: on one the
    # outputs are those of the plain file, on another they are so without fused operators.
    said = details(report)["own outputs"]
    assert said.endswith(", bit for bit") or "bit for bit not at all where" in said
    wrong = edited(path, lambda model: scale(model, "y", np.float32(1.01)))
    assert verdicts(checked(wrong, tmp_path / "q.onnx"))["own outputs"] == "failed"


def test_photographs_are_compared_with_pillow(plain: Path, tmp_path: Path) -> None:
    model = network()
    options = {"preprocess": PREPROCESS, "bake_preprocess": True}
    path = explained(model, tmp_path, example_inputs=images(), heatmap="float32", **options)
    report = checked(path, model)
    assert report.ok, report.lines()
    assert "to PyTorch" in details(report)["map of 2"]

    def other_crop(proto: onnx.ModelProto) -> None:
        told = {p.key: p.value for p in proto.metadata_props}
        preprocess = json.loads(told["diffcam.preprocess"]) | {"crop_pct": 1.0}
        facts(proto, preprocess=json.dumps(preprocess))

    assert verdicts(checked(edited(path, other_crop), model))["map of 2"] == "failed"
    path = explained(plain, tmp_path, **options)
    report = checked(path, plain)
    assert report.ok, report.lines()
    assert "came from Pillow" in details(report)["own outputs"]
    assert verdicts(checked(edited(path, other_crop), plain))["own outputs"] == "failed"


def test_images_that_are_too_large_are_not_made(plain: Path, tmp_path: Path) -> None:
    def enlarge(model: onnx.ModelProto) -> None:
        for dim in model.graph.input[0].type.tensor_type.shape.dim[2:]:
            dim.dim_value = 2**31 - 1

    report = checked(edited(explained(plain, tmp_path), enlarge), plain)
    found = verdicts(report)
    assert found["own outputs"] == found["latency"] == "skipped"
    [name] = [name for name in found if name.startswith("runs 1 x 3")]
    assert found[name] == "skipped"
    assert "over the 16,777,216 tried here" in details(report)[name]


@pytest.mark.parametrize("kind", ["reference", "weights"])
@pytest.mark.parametrize("targets", ["predicted", "input"])
def test_a_contrast_with_the_predicted_class(
    plain: Path, tmp_path: Path, kind: str, targets: str
) -> None:
    path = explained(plain, tmp_path)
    c = int(OnnxExplainer(path, providers=CPU)(images()).targets[0, 0])
    weights = torch.zeros(5)
    weights[c] = 1
    contrast = Contrast(reference=(c,)) if kind == "reference" else Contrast(weights=weights)
    report = checked(explained(plain, tmp_path, contrast=contrast, targets=targets), plain)
    assert report.ok, report.lines()


def test_no_image_has_a_contrast(tmp_path: Path) -> None:
    model = pooled()
    last = model[2]
    assert isinstance(last, nn.Linear)
    last.bias.data[3] = 1e3
    reference = Contrast(reference=(3, 4))
    path = explained(model, tmp_path, example_inputs=images(), contrast=reference)
    report = checked(path, model)
    assert report.ok, report.lines()
    assert verdicts(report)["map of 0"] == "skipped"
    assert "holds others against (3, 4" in details(report)["map of 0"]
    path = explained(model, tmp_path, example_inputs=images(), contrast=reference, targets="input")
    report = checked(path, model)
    assert report.ok, report.lines()
    assert verdicts(report)["map of 0"] == "ok"


class Rows(nn.Module):
    """Takes (N, H, W, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.network(x.permute(0, 3, 1, 2))
        return y


def test_a_pytorch_model_of_rows(tmp_path: Path) -> None:
    model, x = Rows(), images().permute(0, 2, 3, 1)
    path = explained(model, tmp_path, example_inputs=x)
    report = checked(path, model)
    assert report.ok, report.lines()
    assert verdicts(report)["map of network.2"] == "ok"
    explainer = OnnxExplainer(path, providers=CPU, threads=1)
    assert explainer(x).maps.equal(explainer(images()).maps)


def cancelling() -> nn.Sequential:
    """Maps are sums of numbers near 30,000 that nearly cancel: float32 leaves three digits."""
    model = linear(32, 1)
    last, head = model[2], model[-1]
    assert isinstance(last, nn.Conv2d) and isinstance(head, nn.Linear) and last.bias is not None
    with torch.no_grad():
        last.bias.add_(3e4)
        head.weight.sub_(head.weight.mean(1, keepdim=True))
    return model


def test_float64_judges_where_float32_is_unsure(tmp_path: Path) -> None:
    model, path = cancelling(), tmp_path / "x.cam.onnx"
    export_onnx(model, path, example_inputs=images(), verify=False)
    report = verify(path, against=model, rounds=0)
    [check] = [c for c in report.checks if c.name.startswith("map of")]
    assert check.verdict == "ok", check.detail
    assert "off float64 by" in check.detail
    assert float(check.detail.split()[2]) > 1e-4


def test_float64_does_not_excuse_another_model(tmp_path: Path) -> None:
    model, path = cancelling(), tmp_path / "x.cam.onnx"
    export_onnx(model, path, example_inputs=images(), verify=False)
    with torch.no_grad():
        model[-1].weight.mul_(torch.linspace(0.9, 1.1, 5)[:, None])
    report = verify(path, against=model, rounds=0)
    [check] = [c for c in report.checks if c.name.startswith("map of")]
    assert check.verdict == "failed", check.detail
