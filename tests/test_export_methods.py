"""Every method that a graph can have, against the engine on the network in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from diffcam_export import Exported, OnnxExplainer, export_onnx
from diffcam_export.emit import Emitter
from diffcam_export.methods import FORMS, Form
from diffcam_export.methods.component import component
from diffcam_export.methods.form import Explained
from diffcam_export.methods.value import (
    linear_value,
    lost_value,
    of_whole_images,
    value,
)
from diffcam_export.verify import verify
from diffcam_fast import Contrast, Explainer
from diffcam_fast.cli.main import main
from diffcam_fast.methods import METHODS, GradientMethod
from diffcam_kernels import reference
from networks import pooled, relative_error, with_mlp

K = 5
CPU = ["CPUExecutionProvider"]
NETWORKS: dict[str, Callable[[], nn.Sequential]] = {"pooled": pooled, "mlp": with_mlp}
LINEAR_ONLY = ("cam", "recipro_cam", "ablation_cam")
REFUSED = ("score_cam", "decom_cam", "broad_cam", "re_cam")
EXPORTED = [name for name in METHODS if name not in REFUSED]
CASES = [
    (network, method)
    for network in NETWORKS
    for method in EXPORTED
    if network == "pooled" or method not in LINEAR_ONLY
]
CONTRASTS = {
    "mean": Contrast(math.inf),
    "log_odds": Contrast(1.0),
    "temperature": Contrast(0.3),
    "runner_up": Contrast(0.0),
    "none": Contrast(None),
    "reference": Contrast(1.0, reference=(3, 4)),
    "weights": Contrast(weights=torch.tensor([0.0, 0.0, 0.0, 0.25, 0.75])),
}
# Classes that the reference and the weights allow.
ASKED = torch.tensor([[0, 2], [1, 0], [2, 1]])


def images(n: int = 3, size: tuple[int, int] = (12, 16)) -> Tensor:
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Plain ONNX files of the networks; the batch is free, and of "any size" so is the size."""
    files = {}
    for name in (*NETWORKS, "any size"):
        files[name] = tmp_path_factory.mktemp("plain") / "plain.onnx"
        free = {0: "n"} | ({2: "h", 3: "w"} if name == "any size" else {})
        with pytest.warns(DeprecationWarning, match="legacy|removed"):
            torch.onnx.export(
                NETWORKS.get(name, pooled)(),
                (images(),),
                files[name],
                dynamo=False,
                input_names=["images"],
                output_names=["logits"],
                dynamic_axes={"images": free},
            )
    return files


def exported(plain: Path, out: Path, **options: Any) -> Exported:
    return export_onnx(plain, out / "explained.cam.onnx", verify=False, **options)


def run(path: Path, **inputs: np.ndarray) -> dict[str, Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(str(path), options, providers=CPU)
    names = [value.name for value in session.get_outputs()]
    found = session.run(names, inputs)
    return {name: torch.from_numpy(array) for name, array in zip(names, found, strict=True)}


def engine(model: nn.Module, **options: Any) -> Explainer:
    return Explainer(copy.deepcopy(model).double(), layer="0", **options)


@pytest.mark.parametrize(
    ("network", "method", "contrast"),
    [
        (network, method, contrast)
        for network, method in CASES
        for contrast in CONTRASTS
        if contrast != "none" or not METHODS[method].needs_contrast
    ],
)
def test_maps_are_those_of_the_engine(
    network: str, method: str, contrast: str, plain: dict[str, Path], tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "method": method,
        "contrast": CONTRASTS[contrast],
        "relu": contrast == "mean",
    }
    expected = engine(NETWORKS[network](), **options)
    x = images()
    done = exported(plain[network], tmp_path, targets="input", **options)
    onnx.checker.check_model(str(done.path), full_check=True)
    found = run(done.path, images=x.numpy(), targets=ASKED.numpy())
    assert found["diffcam_target"].tolist() == ASKED.tolist()
    assert relative_error(found["diffcam_map"], expected(x, ASKED).maps) < 1e-5
    if contrast in ("reference", "weights"):
        return
    found = run(done.path, images=x.numpy())
    assert relative_error(found["diffcam_map"], expected(x).maps) < 1e-5
    for topk in (1, 3):
        best = exported(plain[network], tmp_path, topk=topk, **options)
        found = run(best.path, images=x.numpy())
        result = expected(x, topk=topk)
        assert found["diffcam_target"].tolist() == result.targets.tolist()
        assert relative_error(found["diffcam_map"], result.maps) < 1e-5


@pytest.mark.parametrize(("network", "method"), CASES)
def test_nan_stays_with_its_image(
    network: str, method: str, plain: dict[str, Path], tmp_path: Path
) -> None:
    x = images()
    broken = x.clone()
    broken[1, 0, 3, 3] = math.nan
    for contrast in ("log_odds", "runner_up", "mean"):
        options: dict[str, Any] = {"method": method, "contrast": contrast, "relu": False}
        for targets in ({"topk": 2}, {}):
            path = exported(plain[network], tmp_path, **options, **targets).path
            found, clean = (run(path, images=i.numpy())["diffcam_map"] for i in (broken, x))
            assert found[1].isnan().all()
            assert torch.allclose(found[[0, 2]], clean[[0, 2]], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("contrast", ["log_odds", "mean"])
@pytest.mark.parametrize(("network", "method"), CASES)
def test_a_class_that_is_none_gives_nan(
    network: str, method: str, contrast: str, plain: dict[str, Path], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"method": method, "contrast": contrast, "targets": "input"}
    path = exported(plain[network], tmp_path, **options).path
    x = images().numpy()
    found = run(path, images=x, targets=np.array([[-1, K, -2, 0]]))["diffcam_map"]
    assert found[:, 1:3].isnan().all()
    assert found[:, [0, 3]].isfinite().all()
    assert relative_error(found[:, :1], run(path, images=x)["diffcam_map"]) < 1e-5


@pytest.mark.parametrize("method", EXPORTED)
def test_the_size_is_free(method: str, plain: dict[str, Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": method, "contrast": "log_odds"}
    expected = engine(pooled(), **options)
    path = exported(plain["any size"], tmp_path, topk=2, **options).path
    for x in (images(1), images(7, (31, 20))):
        found = run(path, images=x.numpy())["diffcam_map"]
        assert relative_error(found, expected(x, topk=2).maps) < 1e-5


@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize(("network", "method"), CASES)
def test_a_batch_may_be_empty(
    network: str, method: str, topk: int, plain: dict[str, Path], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"method": method, "contrast": "log_odds"}
    path = exported(plain[network], tmp_path, topk=topk, **options).path
    assert run(path, images=images(0).numpy())["diffcam_map"].shape == (0, topk, 6, 8)


@pytest.mark.parametrize("method", EXPORTED)
def test_a_file_says_how_and_is_checked(
    method: str, plain: dict[str, Path], tmp_path: Path
) -> None:
    model = pooled()
    options: dict[str, Any] = {"method": method, "heatmap": "uint8", "targets": "input"}
    done = exported(plain["pooled"], tmp_path, **options)
    head = "principal component" if method == "eigen_cam" else "closed form"
    assert done.heads == (head,)
    assert ("gradient is d W" in done.reasons[0]) == (head == "closed form")
    explain = OnnxExplainer(done.path, providers=CPU)
    result = explain(images(), [0, 1, 2])
    expected = Explainer(model, method=method)(images(), [0, 1, 2])
    assert result.backend == f"onnxruntime (CPUExecutionProvider), {head}"
    assert (result.method, result.contrast) == (method, expected.contrast)
    assert explain.inspect().relu == (method != "recipro_cam")
    assert relative_error(result.maps, expected.maps) < 1e-5
    assert torch.allclose(result.scores, expected.scores, atol=1e-5)
    report = verify(done.path, against=plain["pooled"], providers=CPU, rounds=0)
    assert report.ok, report.lines()
    assert any("made anew" in check.detail for check in report.checks), report.lines()


@pytest.mark.parametrize("method", ["eigen_cam", "eigen_grad_cam", "recipro_cam", "ablation_cam"])
@pytest.mark.parametrize(
    "options",
    [{"dtype": "float16"}, {"opset": 21, "topk": 2}, {"inline": True, "targets": "input"}],
    ids=["half", "opset", "inline"],
)
def test_a_pytorch_model_and_its_file_agree(
    method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "model.cam.onnx"
    chosen: dict[str, Any] = {"method": method, "contrast": "log_odds", **options}
    done = export_onnx(pooled(), out, example_inputs=images(), **chosen)
    assert done.report is not None
    assert any("to PyTorch" in check.detail for check in done.report.checks), done.report.lines()


def test_two_layers(plain: dict[str, Path], tmp_path: Path) -> None:
    model, x = with_mlp(), images()
    file = onnx.load(plain["mlp"])
    layers = [
        next(n.output[0] for n in file.graph.node if n.op_type == k) for k in ("Conv", "MaxPool")
    ]
    path = exported(plain["mlp"], tmp_path, layer=layers, method="eigen_grad_cam", topk=2).path
    found = run(path, images=x.numpy())
    for suffix, layer in (("", "0.1"), ("_1", "0")):
        expected = Explainer(copy.deepcopy(model).double(), layer=layer, method="eigen_grad_cam")
        assert relative_error(found[f"diffcam_map{suffix}"], expected(x, topk=2).maps) < 1e-5


@pytest.mark.parametrize(
    "contrast",
    [*CONTRASTS.values(), Contrast(1e-30), Contrast(50.0), Contrast(math.inf, reference=(3, 4))],
    ids=lambda contrast: contrast.name,
)
def test_values_are_those_of_the_contrast(contrast: Contrast) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = 4 * torch.randn(5, K, generator=generator)
    rows = logits[..., None] + torch.randn(5, K, 6, generator=generator) / 8
    rows[..., 0] = logits
    # A class that takes no part, a tie, and what is far away or broken.
    rows[1, 3] = logits[1, 3] = -math.inf
    rows[2] = logits[2] = 1.0
    rows[3, 2], logits[3, 2] = 80.0, 80.0
    rows[4, 4] = logits[4, 4] = math.nan
    targets = torch.tensor([[0], [1], [0], [2], [1]])

    def made(write: Callable[[Explained, ir.Value], ir.Value]) -> Tensor:
        emit = Emitter("test")
        z, c = ir.val("z", ir.DataType.FLOAT, [5, K]), ir.val("c", ir.DataType.INT64, [5, 1])
        x = ir.val("x", ir.DataType.FLOAT, [5, K, 6])
        at = Explained(emit, METHODS["ablation_cam"], z, c, contrast, several=False, checked=False)
        found = write(at, x)
        graph = ir.Graph([z, c, x], [found], nodes=emit.nodes, opset_imports={"": 18}, name="test")
        proto = ir.to_proto(ir.Model(graph, ir_version=9))
        session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=CPU)
        feeds = {"z": logits.numpy(), "c": targets.numpy(), "x": rows.numpy()}
        return torch.from_numpy(session.run(None, feeds)[0])[:, 0]

    flat = rows.double().mT.flatten(0, 1)
    expected = contrast.value(flat, targets.repeat_interleave(6, 0)).view(5, 6)
    options: dict[str, Any] = {"equal_nan": True, "rtol": 1e-5, "atol": 1e-5}
    if contrast.is_linear:
        one = made(lambda at, x: linear_value(at, at.logits))
        assert torch.allclose(one.double(), expected[:, :1], **options)
        return
    found = made(lambda at, x: of_whole_images(at, value(at.emit, at, x, at.classes)))
    assert torch.allclose(found.double(), expected, **options)
    lost = made(lambda at, x: of_whole_images(at, lost_value(at.emit, at, x, at.classes)))
    assert torch.allclose(lost.double(), expected[:, :1] - expected[:, 1:], **options)


def targets_of(at: Explained) -> ir.Value:
    """(N, 1)."""
    return at.classes


def component_of(a: Tensor, *, of_cells: bool) -> Tensor:
    """The nodes' component of A (N, C, h, w)."""
    emit = Emitter("test")
    x = ir.val("x", ir.DataType.FLOAT, ["n", 1, *a.flatten(2).shape[1:]])
    result = component(emit, x, of_cells=of_cells)
    graph = ir.Graph([x], [result], nodes=emit.nodes, opset_imports={"": 18}, name="test")
    proto = ir.to_proto(ir.Model(graph, ir_version=9))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=CPU)
    [found] = session.run(None, {"x": a.flatten(2)[:, None].numpy()})
    return torch.from_numpy(found).view(-1, *a.shape[2:])


def spectrum(gap: float, c: int = 40, h: int = 4, w: int = 6) -> Tensor:
    """Activations (3, C, h, w) whose second singular value is 1 - gap of the first."""
    generator = torch.Generator().manual_seed(3)
    rank = min(c, h * w) - 1
    # A first direction of all ones, which centring takes away.
    u = torch.randn(3, h * w, rank + 1, generator=generator, dtype=torch.float64)
    u[:, :, 0] = 1
    v = torch.randn(3, c, rank, generator=generator, dtype=torch.float64)
    s = torch.linspace(0.9, 0.01, rank, dtype=torch.float64)
    s[0], s[1] = 1, 1 - gap
    x = (torch.linalg.qr(u)[0][:, :, 1:] * s) @ torch.linalg.qr(v)[0].mT
    return x.mT.reshape(3, c, h, w).float()


@pytest.mark.parametrize("of_cells", [True, False])
@pytest.mark.parametrize("gap", [0.3, 1e-2, 1e-4, 1e-6])
def test_components_that_are_almost_equal_are_told_apart(gap: float, of_cells: bool) -> None:
    for a in (spectrum(gap), spectrum(gap, c=9), 1e-12 * spectrum(gap), 1e15 * spectrum(gap)):
        expected = reference.eigen_cam(a.double(), True)
        assert relative_error(component_of(a, of_cells=of_cells), expected) < 1e-6


@pytest.mark.parametrize("of_cells", [True, False])
def test_components_of_nothing_and_of_equal_ones(of_cells: bool) -> None:
    a = spectrum(0.1)
    clean = component_of(a, of_cells=of_cells)
    # Of no exact binary fraction: no rounding may be taken for a component.
    a[0] = 0.1
    a[1, 3, 2, 2] = math.nan
    found = component_of(a, of_cells=of_cells)
    assert (found[0] == 0).all()
    assert found[1].isnan().all()
    assert torch.allclose(found[2], clean[2], rtol=1e-6)
    # Exactly equal: any direction, but of their length, and the largest cell is positive.
    equal = torch.zeros(1, 2, 2, 2)
    equal[0, 0], equal[0, 1] = torch.tensor([[1.0, -1], [0, 0]]), torch.tensor([[0.0, 0], [1, -1]])
    found = component_of(equal, of_cells=of_cells)
    assert float(found.norm()) == pytest.approx(2**0.5, abs=1e-6)
    assert float(found.max()) == float(found.abs().max())


def test_of_equal_magnitudes_the_first_cell_is_positive() -> None:
    a = torch.tensor([[[[-1.0, 1.0]]], [[[1.0, -1.0]]]])
    assert component_of(a, of_cells=True).tolist() == [[[1, -1]], [[1, -1]]]


def test_every_method_has_a_form_or_a_reason() -> None:
    assert set(FORMS) == {type(method) for method in METHODS.values()}
    for name, method in METHODS.items():
        assert isinstance(FORMS[type(method)], Form) == (name not in REFUSED)


def test_what_a_graph_cannot_have(plain: dict[str, Path], tmp_path: Path) -> None:
    def refused(match: str, method: str) -> None:
        with pytest.raises(ValueError, match=match):
            exported(plain["mlp"], tmp_path, method=method)
        assert not (tmp_path / "explained.cam.onnx").exists()

    refused("score_cam cannot be .* a pass of the whole network for each channel", "score_cam")
    refused("decom_cam cannot be .* ten passes .*; there are diff_grad_cam, ", "decom_cam")
    refused("broad_cam cannot be .*: its weights are fitted on labelled images", "broad_cam")
    refused("cam is defined for a pooled linear head only; behind layer .* Tanh", "cam")
    refused(
        "a pass of the head for each cell .* in PyTorch, or export diff_grad_cam", "recipro_cam"
    )
    refused("a pass of the head for each channel there", "ablation_cam")


def test_the_command(plain: dict[str, Path], tmp_path: Path) -> None:
    from PIL import Image

    out, photo = tmp_path / "net.cam.onnx", tmp_path / "photo.png"
    Image.fromarray(np.zeros((12, 16, 3), np.uint8)).save(photo)
    given = ["export", str(plain["pooled"]), "-o", str(out), "--preprocess", "tf:12x16"]
    result = CliRunner().invoke(main, [*given, "--method", "eigen_cam"])
    assert result.exit_code == 0, result.output
    assert "principal component" in result.output
    explain = [
        "explain",
        str(photo),
        "-m",
        str(out),
        "-o",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]
    shown = CliRunner().invoke(main, explain)
    assert shown.exit_code == 0, shown.output
    assert CliRunner().invoke(main, ["verify", str(out)]).exit_code == 0
    wrong = CliRunner().invoke(main, [*given, "--method", "score_cam"])
    assert wrong.exit_code == 2
    assert [line for line in wrong.output.splitlines() if "score_cam cannot be written" in line]


def test_a_method_without_a_closed_form_gets_a_backward_everywhere(
    plain: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = GradientMethod("backward_grad_cam", "none", "a test", pooled=None)
    monkeypatch.setitem(METHODS, method.name, method)
    theirs = Explainer(pooled(), method=method)(images(), 1)
    assert "backward of the head" in theirs.backend
    closed = Explainer(pooled(), method="grad_cam")(images(), 1)
    assert relative_error(theirs.maps, closed.maps) < 1e-5
    done = exported(plain["pooled"], tmp_path, method=method.name, targets="input")
    assert done.heads == ("backward of the head",)
    assert "has no shorter form" in done.reasons[0]
    ours = OnnxExplainer(done.path, providers=CPU)(images(), 1)
    assert relative_error(ours.maps, closed.maps) < 1e-5
