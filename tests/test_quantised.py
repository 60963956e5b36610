"""int8 features with a float head: what is quantised, what is not, and how well it agrees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner, Result
from onnx_ir.passes.common import InlinePass
from torch import Tensor, nn

import networks
from commandline import MODEL, write_images, write_network
from diffcam_export import OnnxExplainer, quantised
from diffcam_export.candidate import Fastest
from diffcam_export.fastest import accelerate
from diffcam_fast import Explainer
from diffcam_fast.cli.main import main


def images(count: int, seed: int) -> Tensor:
    """Blobs of three colours at random places: what a small network can tell apart."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.rand(count, 3, 16, 16, generator=generator) * 0.3
    places = torch.randint(0, 10, (count, 2), generator=generator)
    for number, (top, left) in enumerate(places.tolist()):
        made[number, number % 3, top : top + 6, left : left + 6] += 1.0
    return made


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """Trained for a moment, so that its classes and maps mean something."""
    torch.manual_seed(0)
    model = networks.with_mlp(classes=3)
    optimiser = torch.optim.Adam(model.parameters(), 0.01)
    model.train()
    for step in range(60):
        loss = nn.functional.cross_entropy(model(images(24, seed=step)), torch.arange(24) % 3)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


@pytest.fixture(scope="module")
def made(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> tuple[Explainer, Fastest]:
    explainer = Explainer(network, example_inputs=images(2, 0))
    cache = tmp_path_factory.mktemp("cache")
    found = accelerate(
        explainer, precision="int8", calibration=images(40, 100), cache=cache, batch_size=4
    )
    return explainer, found


def test_maps_are_those_of_float32_but_for_the_steps(made: tuple[Explainer, Fastest]) -> None:
    explainer, found = made
    assert isinstance(found.explainer, OnnxExplainer)
    fresh = images(30, 200)
    ours, theirs = found.explainer(fresh), explainer(fresh)
    assert (ours.targets == theirs.targets).double().mean() > 0.95
    assert not torch.equal(ours.maps, theirs.maps)
    pairs = zip(ours.maps.flatten(1), theirs.maps.flatten(1), strict=True)
    correlations = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs])
    assert correlations.median() > 0.98
    assert (ours.layer, ours.method) == (theirs.layer, theirs.method)


def test_agreement_is_told(made: tuple[Explainer, Fastest]) -> None:
    _, found = made
    assert found.agreement is not None and found.agreement.images == 10
    assert found.agreement.same_class > 0.85
    assert 0.5 < found.agreement.worst <= found.agreement.correlation <= 1
    assert "int8 takes" in found.reason and "of 10 images" in found.reason


def test_agreement_is_of_images_that_it_was_not_fitted_to(
    network: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: list[Tensor] = []
    held: list[Tensor] = []
    write, compare = quantised.write_quantised, quantised.agreement

    def writing(setup: Any, path: Path, calibration: Tensor, **options: Any) -> None:
        fitted.append(calibration)
        write(setup, path, calibration, **options)

    def comparing(floats: Any, file: Any, given: Tensor, target: int | None) -> Any:
        held.append(given)
        return compare(floats, file, given, target)

    monkeypatch.setattr(quantised, "write_quantised", writing)
    monkeypatch.setattr(quantised, "agreement", comparing)
    calibration = images(12, 5)
    explainer = Explainer(network, example_inputs=images(2, 0))
    options = {"precision": "int8", "calibration": calibration, "cache": tmp_path}
    first = accelerate(explainer, **options)  # type: ignore[arg-type]
    both = torch.cat([fitted[0], held[0]])
    assert (len(fitted[0]), len(held[0])) == (9, 3)
    assert torch.equal(both.sum(dim=(1, 2, 3)).sort()[0], calibration.sum(dim=(1, 2, 3)).sort()[0])
    # Kept, with what was found; other images make another file.
    again = accelerate(explainer, **options)  # type: ignore[arg-type]
    assert (again.path, again.agreement) == (first.path, first.agreement) and len(fitted) == 1
    other = accelerate(explainer, precision="int8", calibration=images(12, 6), cache=tmp_path)
    assert other.path != first.path


def test_what_is_quantised_and_what_is_not(made: tuple[Explainer, Fastest]) -> None:
    _, found = made
    assert found.path is not None
    graph = InlinePass()(ir.load(found.path)).model.graph
    convolutions = [node for node in graph if node.op_type == "Conv"]
    assert convolutions
    for node in convolutions:
        for value in node.inputs[:2]:
            assert value is not None
            producer = value.producer()
            assert producer is not None and producer.op_type == "DequantizeLinear"
    # Behind the layer, and in the maps, everything is float.
    for node in graph:
        if node.op_type in ("Gemm", "MatMul", "Tanh"):
            producers = [v.producer() for v in node.inputs if v is not None]
            kinds = [p.op_type for p in producers if p is not None]
            assert not {"DequantizeLinear", "QuantizeLinear"} & set(kinds), node


def test_an_earlier_layer(network: nn.Module, tmp_path: Path) -> None:
    explainer = Explainer(network, layer="0.0", example_inputs=images(2, 0))
    found = accelerate(explainer, precision="int8", calibration=images(16, 3), cache=tmp_path)
    fresh = images(12, 9)
    assert found.explainer.layer == "0.0"
    assert found.explainer(fresh).maps.shape == explainer(fresh).maps.shape
    assert found.agreement is not None and found.agreement.correlation > 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int4"}, "precision must be 'float32' or 'int8', got 'int4'"),
        ({"precision": "int8"}, r"int8 needs 8 images \(N, 3, 16, 16\) .*; got none"),
        ({"precision": "int8", "calibration": images(7, 0)}, r"got \(7, 3, 16, 16\)"),
        ({"precision": "int8", "calibration": torch.rand(9, 3, 8, 8)}, r"got \(9, 3, 8, 8\)"),
        (
            {"precision": "int8", "calibration": images(8, 0), "backend": "torch"},
            "int8 runs in onnxruntime",
        ),
    ],
)
def test_errors(network: nn.Module, options: dict[str, Any], message: str) -> None:
    explainer = Explainer(network, example_inputs=images(2, 0))
    with pytest.raises(ValueError, match=message):
        accelerate(explainer, **options)


def test_a_method_without_a_graph(network: nn.Module, tmp_path: Path) -> None:
    explainer = Explainer(network, method="score_cam", example_inputs=images(2, 0))
    with pytest.raises(ValueError, match="onnxruntime cannot run this explainer"):
        accelerate(explainer, precision="int8", calibration=images(8, 0), cache=tmp_path)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([1.0, 1.0, 1.0], [2.0, 2.0, 2.0], 1.0),
        ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], 0.0),
        ([0.0, 1.0, 2.0], [0.0, 2.0, 4.0], 1.0),
        ([0.0, 1.0, 2.0], [2.0, 1.0, 0.0], -1.0),
    ],
)
def test_correlation(one: list[float], other: list[float], expected: float) -> None:
    found = quantised._correlation(torch.tensor(one), torch.tensor(other))
    assert float(found) == pytest.approx(expected)


# On the command line.


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import sys

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tiny_network", raising=False)
    monkeypatch.setenv("DIFFCAM_CACHE", str(tmp_path / "cache"))
    write_network(tmp_path)
    write_images(tmp_path / "photos", 12)
    return tmp_path


def explain(*more: str) -> Result:
    return CliRunner().invoke(main, ["explain", "photos", "-m", MODEL, "-o", "out", *more])


def test_on_the_command_line(folder: Path) -> None:
    (folder / "photos" / "005-broken.png").write_bytes(b"")
    result = explain("--precision", "int8", "--json")
    assert result.exit_code == 3, result.output
    told = json.loads(result.stdout)
    assert told["agreement"]["images"] == 3 and told["agreement"]["same_class"] == 1.0
    assert "runtime: int8 takes" in result.stderr
    assert told["backend"].startswith("onnxruntime")
    # What is float32 and what is int8 does not meet in one folder.
    mixed = explain("--resume")
    assert mixed.exit_code == 2
    assert 'precision was "int8, fitted to images ' in mixed.stderr
    # Neither do networks that were fitted to other images.
    assert explain("--precision", "int8", "--resume").exit_code == 3
    (folder / "photos" / "000-red.png").unlink()
    other = explain("--precision", "int8", "--resume")
    assert other.exit_code == 2 and "fitted to images" in other.stderr


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backend", "torch"], "--precision int8 does not go with --backend torch"),
        (["--dtype", "bfloat16"], "--precision int8 does not go with --dtype"),
    ],
)
def test_what_does_not_go_with_it(options: list[str], message: str) -> None:
    result = explain("--precision", "int8", *options)
    assert result.exit_code == 2
    assert message in result.stderr
