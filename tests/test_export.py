"""From a model to an explained file: every option, against the engine, value by value."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from diffcam_export import OnnxExplainer, export_onnx, reductions
from diffcam_export.export import VerificationError
from diffcam_export.gradients import MissingRuleError
from diffcam_fast import Contrast, Explainer
from diffcam_fast.cli.main import main
from diffcam_fast.images.preprocess import Preprocess

K = 5


def classifier(head: nn.Module) -> nn.Sequential:
    """A small CNN with batch norm of its own statistics; its layers are 0 to 4."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8)
    nn.init.uniform_(norm.running_var, 0.5, 1.5)
    nn.init.normal_(norm.running_mean, 0, 0.2)
    body = [nn.Conv2d(3, 8, 3, stride=2), norm, nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU()]
    return nn.Sequential(*body, head).eval()


def linear() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, K))


def perceptron() -> nn.Module:
    last = nn.Linear(9, K)
    return nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(144, 9), nn.GELU(), last)


def images(n: int = 3, size: tuple[int, int] = (24, 24), seed: int = 1) -> Tensor:
    return torch.randn((n, 3, *size), generator=torch.Generator().manual_seed(seed))


def exported(model: nn.Module, tmp_path: Path, **options: Any) -> Path:
    path = tmp_path / "model.cam.onnx"
    export_onnx(model, path, example_inputs=images(), verify=False, **options)
    onnx.checker.check_model(str(path), full_check=True)
    return path


def run(path: Path, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def close(found: np.ndarray, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == tuple(expected.shape)
    bound = tolerance * float(expected.abs().max())
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=bound)


@pytest.mark.parametrize("head", [linear, perceptron])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "grad_cam", "inline": True},
        {"method": "hires_cam", "contrast": "runner_up", "relu": False},
    ],
    ids=["default", "grad_cam inline", "hires_cam signed"],
)
def test_maps_are_those_of_the_engine(
    head: Callable[[], nn.Module], options: dict[str, Any], tmp_path: Path
) -> None:
    model = classifier(head())
    path = exported(model, tmp_path, **options)
    engine = {k: v for k, v in options.items() if k != "inline"}
    x = images()
    expected = Explainer(model, example_inputs=images(), **engine)(x)
    found = run(path, images=x.numpy())
    assert list(found) == ["logits", "diffcam_map", "diffcam_target"]
    close(found["logits"], expected.logits)
    close(found["diffcam_map"], expected.maps)
    assert found["diffcam_target"].tolist() == expected.targets.tolist()


def test_reference_classes_at_an_earlier_layer(tmp_path: Path) -> None:
    model, x = classifier(perceptron()), images()
    predicted = set(model(x).argmax(dim=1).tolist())
    others = tuple(c for c in range(K) if c not in predicted)[:2]
    options: dict[str, Any] = {"contrast": Contrast(torch.inf, reference=others), "layer": "2"}
    expected = Explainer(model, example_inputs=x, **options)(x)
    path = exported(model, tmp_path, **options)
    close(run(path, images=x.numpy())["diffcam_map"], expected.maps)
    assert OnnxExplainer(path)(x).contrast == expected.contrast


def test_the_batch_is_free_and_may_be_empty(tmp_path: Path) -> None:
    path = exported(classifier(linear()), tmp_path, heatmap="float32")
    alone, many = (run(path, images=images(7)[:n].numpy()) for n in (1, 7))
    np.testing.assert_allclose(alone["diffcam_map"], many["diffcam_map"][:1], atol=1e-6)
    none = run(path, images=images(0).numpy())
    assert none["diffcam_map"].shape == (0, 1, 9, 9)
    assert none["diffcam_heatmap"].shape == (0, 1, 24, 24)


@pytest.mark.parametrize("head", [linear, perceptron])
def test_targets_as_an_input(head: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = classifier(head())
    path = exported(model, tmp_path, targets="input")
    x, explain = images(), Explainer(model, example_inputs=images())
    close(run(path, images=x.numpy())["diffcam_map"], explain(x).maps)
    for classes in ([[0, 2]], [[0, 1], [2, 3], [4, 0]]):
        found = run(path, images=x.numpy(), targets=np.array(classes))
        expected = torch.tensor(classes).expand(3, 2)
        assert found["diffcam_target"].tolist() == expected.tolist()
        close(found["diffcam_map"], explain(x, expected).maps)
    mixed = run(path, images=x.numpy(), targets=np.array([[-1, K]]))
    close(mixed["diffcam_map"][:, :1], explain(x).maps)
    assert np.isnan(mixed["diffcam_map"][:, 1]).all()


@pytest.mark.parametrize("head", [linear, perceptron])
def test_topk(head: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = classifier(head())
    found = run(exported(model, tmp_path, topk=3), images=images().numpy())
    expected = Explainer(model, example_inputs=images())(images(), topk=3)
    close(found["diffcam_map"], expected.maps)
    assert found["diffcam_target"].tolist() == expected.targets.tolist()


def test_several_layers_and_heatmaps(tmp_path: Path) -> None:
    model = classifier(linear())
    found = run(
        exported(model, tmp_path, layer=["4", "2"], heatmap="uint8"), images=images().numpy()
    )
    for suffix, layer in (("", "4"), ("_1", "2")):
        expected = Explainer(model, layer=layer, example_inputs=images())(images())
        close(found[f"diffcam_map{suffix}"], expected.maps)
        heat = (expected.heatmaps((24, 24)) * 255).round().int().numpy()
        assert np.abs(found[f"diffcam_heatmap{suffix}"].astype(int) - heat).max() <= 1


def test_free_height_and_width(tmp_path: Path) -> None:
    model = classifier(linear())
    path = exported(model, tmp_path, dynamic_size=True, heatmap="float32")
    x = images(2, (31, 20))
    found = run(path, images=x.numpy())
    expected = Explainer(model, example_inputs=images())(x)
    close(found["diffcam_map"], expected.maps)
    np.testing.assert_allclose(
        found["diffcam_heatmap"], expected.heatmaps((31, 20)).numpy(), atol=1e-5
    )


@pytest.mark.parametrize("head", [linear, perceptron])
def test_half_precision(head: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = classifier(head())
    path = exported(model, tmp_path, dtype="float16")
    found = run(path, images=images().half().numpy())
    assert (found["logits"].dtype, found["diffcam_map"].dtype) == (np.float16, np.float32)
    close(found["diffcam_map"], Explainer(model, example_inputs=images())(images()).maps, 1e-2)
    assert next(model.parameters()).dtype == torch.float32


def test_a_softmax_is_looked_through(tmp_path: Path) -> None:
    model = classifier(nn.Sequential(linear(), nn.Softmax(dim=1)))
    path = exported(model, tmp_path)
    result = OnnxExplainer(path)(images())
    expected = Explainer(model, example_inputs=images())(images())
    close(result.maps.numpy(), expected.maps)
    close(result.scores.numpy(), expected.scores)


def test_photographs_in_the_graph(tmp_path: Path) -> None:
    from PIL import Image

    model = classifier(linear())
    preprocess = Preprocess(size=(24, 24))
    path = exported(model, tmp_path, preprocess=preprocess, bake_preprocess=True)
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    photo = Image.fromarray(coarse).resize((60, 44), Image.Resampling.BICUBIC)
    found = run(path, images=np.asarray(photo)[None])
    expected = Explainer(model, example_inputs=images())(preprocess(photo)[None])
    close(found["diffcam_map"], expected.maps, 1e-2)


def test_the_file_says_everything(tmp_path: Path) -> None:
    labels = [f"class {i}" for i in range(K)]
    model = classifier(linear())
    path = exported(model, tmp_path, labels=labels, preprocess=Preprocess((24, 24)))
    proto = onnx.load(path)
    facts = {p.key: p.value for p in proto.metadata_props}
    assert facts["diffcam.layer"] == "4"
    assert facts["diffcam.method"] == "diff_grad_cam"
    assert facts["diffcam.contrast"] == "log_odds"
    assert facts["diffcam.head"] == "closed form"
    assert json.loads(facts["diffcam.labels"]) == labels
    assert json.loads(facts["diffcam.preprocess"])["size"] == [24, 24]
    # One node that opens, and nothing of the machine that exported.
    [call] = [node for node in proto.graph.node if node.domain == "diffcam"]
    assert [f.name for f in proto.functions] == [call.op_type]
    assert str(Path(__file__).parent) not in str(proto)
    explainer = OnnxExplainer(path)
    assert (explainer.layer, explainer.labels) == ("4", tuple(labels))


def test_weights_of_a_contrast_are_kept(tmp_path: Path) -> None:
    model = classifier(linear())
    # 0 for the predicted class, whichever it is of these images.
    x = images(20)
    c = int(model(x)[0].argmax())
    x = x[[i for i, row in enumerate(model(x)) if int(row.argmax()) == c]]
    q = torch.full((K,), 1 / (K - 1))
    q[c] = 0
    path = exported(model, tmp_path, contrast=Contrast(weights=q))
    expected = Explainer(model, contrast=Contrast(weights=q), example_inputs=images())(x)
    result = OnnxExplainer(path)(x)
    close(result.maps.numpy(), expected.maps)
    close(result.scores.numpy(), expected.scores)


@pytest.mark.parametrize("dynamo", [True, False])
def test_from_an_onnx_file(dynamo: bool, tmp_path: Path) -> None:
    model, plain = classifier(linear()), tmp_path / "plain.onnx"
    torch.onnx.export(
        model,
        (images(),),
        plain,
        dynamo=dynamo,
        input_names=["x"],
        output_names=["scores"],
        **({"dynamic_shapes": ({0: "n"},)} if dynamo else {"dynamic_axes": {"x": {0: "n"}}}),
    )
    before = plain.read_bytes()
    out = tmp_path / "explained.onnx"
    done = export_onnx(plain, out)
    assert done.heads == ("closed form",)
    assert plain.read_bytes() == before
    found = run(out, x=images().numpy())
    assert list(found) == ["scores", "diffcam_map", "diffcam_target"]
    np.testing.assert_array_equal(found["scores"], run(plain, x=images().numpy())["scores"])
    close(found["diffcam_map"], Explainer(model, example_inputs=images())(images()).maps)
    kept = {t.name: t.raw_data for t in onnx.load(out).graph.initializer}
    for tensor in onnx.load(plain).graph.initializer:
        assert kept[tensor.name] == tensor.raw_data


def test_a_file_is_compared_with_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = classifier(perceptron()), tmp_path / "model.cam.onnx"
    done = export_onnx(model, out, example_inputs=images())
    assert done.report is not None
    assert {"checker", "own outputs", "map of 4"} <= {c.name for c in done.report.checks}
    wrong = reductions.REDUCTIONS["layer_cam"]
    monkeypatch.setitem(reductions.REDUCTIONS, "grad_cam", wrong)
    with pytest.raises(VerificationError, match=r"map of 4 +failed +relative error"):
        export_onnx(model, out, example_inputs=images())


def test_what_cannot_be_done_writes_nothing(tmp_path: Path) -> None:
    model, out = classifier(linear()), tmp_path / "no.onnx"

    def refused(match: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            export_onnx(options.pop("model", model), out, example_inputs=images(), **options)
        assert not out.exists()

    refused("topk must be from 1 to the 5 classes", topk=6)
    refused("excludes targets='input'", topk=2, targets="input")
    refused("not known how photographs are prepared", bake_preprocess=True)
    refused(
        "24 x 24 pixels, the preprocessing makes 32 x 32",
        bake_preprocess=True,
        preprocess=Preprocess((32, 32)),
    )
    refused("3 labels for 5 classes", labels=["a", "b", "c"])
    refused("no layer 'nowhere'", layer="nowhere")
    refused("heatmap must be", heatmap="png")

    class Cumulative(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(dim=(2, 3)).cumsum(dim=1)[:, :K]

    with pytest.raises(MissingRuleError, match="CumSum"):
        export_onnx(classifier(Cumulative()), out, example_inputs=images())
    assert not out.exists()
    done = export_onnx(model, out, example_inputs=images(), verify=False)
    with pytest.raises(ValueError, match="explains itself already"):
        export_onnx(done.path, tmp_path / "again.onnx")


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "net.cam.onnx"
    arguments = ["export", "torchvision:squeezenet1_1", "--weights", "random", "-o", str(out)]
    result = CliRunner().invoke(main, [*arguments, "--size", "64", "--no-verify"])
    assert result.exit_code == 0, result.output
    assert "backward of the head" in result.output
    assert len(json.loads(onnx_facts(out)["diffcam.labels"])) == 1000
    shown = CliRunner().invoke(main, ["inspect", str(out)])
    assert shown.exit_code == 0, shown.output
    wrong = CliRunner().invoke(main, ["export", str(out), "-o", str(tmp_path / "x.onnx")])
    assert wrong.exit_code == 2
    assert "explains itself already" in wrong.output
    assert not (tmp_path / "x.onnx").exists()


def onnx_facts(path: Path) -> dict[str, str]:
    return {p.key: p.value for p in onnx.load(path).metadata_props}
