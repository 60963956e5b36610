"""The fastest runtime: the same maps, a file that is kept, and reasons where there is none."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

import networks
from commandline import MODEL, environment, write_images, write_network
from diffcam_export import candidate as module
from diffcam_export.cache import Cache, digest_of
from diffcam_export.candidate import Fastest
from diffcam_export.fastest import accelerate
from diffcam_export.trial import Trial
from diffcam_fast import Augment, Contrast, Explainer, OnnxExplainer
from diffcam_fast.cli.main import main
from diffcam_fast.compiled import CompiledExplainer
from diffcam_fast.compiled.steps import Step
from diffcam_fast.explanation import Explanation

IMAGES = networks.images(4, size=16)


def explainer_of(model: nn.Module | None = None, **options: Any) -> Explainer:
    model = networks.pooled() if model is None else model
    return Explainer(model, example_inputs=IMAGES, **options)


def timed(monkeypatch: pytest.MonkeyPatch, file: float, torch_: float) -> None:
    monkeypatch.setattr(module.Candidate, "_timed", lambda self, path: (file, torch_))


@pytest.fixture
def fast_file(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, 0.5, 1.0)


@pytest.mark.usefixtures("fast_file")
@pytest.mark.parametrize("network", [networks.pooled, networks.with_mlp])
@pytest.mark.parametrize(
    "options",
    [{}, {"method": "layer_cam"}, {"contrast": Contrast(reference=(1, 3))}, {"relu": False}],
)
def test_the_same_maps_from_a_file(tmp_path: Path, network: Any, options: dict[str, Any]) -> None:
    explainer = explainer_of(network(), **options)
    found = accelerate(explainer, targets="input", cache=tmp_path, batch_size=2)
    assert isinstance(found.explainer, OnnxExplainer)
    assert found.reason == "onnxruntime takes 0.50 of the time of torch (2 images at a time)"
    choices: list[Any] = [[[0, 2]] * 4]
    if "contrast" not in options:
        choices.append(None)
    for targets in choices:
        expected, made = explainer(IMAGES, targets), found.explainer(IMAGES, targets)
        assert networks.relative_error(made.maps, expected.maps) < 1e-5
        torch.testing.assert_close(made.scores, expected.scores, rtol=1e-4, atol=1e-5)
        assert torch.equal(made.targets, expected.targets)
        assert (made.layer, made.method, made.contrast) == (
            expected.layer,
            expected.method,
            expected.contrast,
        )


@pytest.mark.usefixtures("fast_file")
def test_the_k_best(tmp_path: Path) -> None:
    explainer = explainer_of()
    found = accelerate(explainer, cache=tmp_path, topk=3)
    expected, made = explainer(IMAGES, topk=3), found.explainer(IMAGES, topk=3)
    assert torch.equal(made.targets, expected.targets)
    assert networks.relative_error(made.maps, expected.maps) < 1e-5


@pytest.mark.usefixtures("fast_file")
def test_a_contrast_with_classes_of_its_own(tmp_path: Path) -> None:
    explainer = explainer_of(networks.with_mlp(), contrast=Contrast(reference=(1, 3)))
    found = accelerate(explainer, cache=tmp_path)
    assert isinstance(found.explainer, OnnxExplainer)
    made, expected = found.explainer(IMAGES, 0), explainer(IMAGES, 0)
    assert networks.relative_error(made.maps, expected.maps) < 1e-5
    assert isinstance(accelerate(explainer, topk=2, cache=tmp_path).explainer, Explainer)
    with pytest.raises(ValueError, match="topk=2 excludes targets='input'"):
        accelerate(explainer, topk=2, targets="input", cache=tmp_path)


@pytest.mark.usefixtures("fast_file")
def test_a_model_is_exported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    whole = module.Candidate._make
    monkeypatch.setattr(
        module.Candidate, "_make", lambda self, path: (made.append(path), whole(self, path))[1]
    )
    model = networks.pooled()
    first = accelerate(explainer_of(model), cache=tmp_path)
    assert first.path is not None and first.path.parent == tmp_path
    again = accelerate(explainer_of(networks.pooled()), cache=tmp_path)
    assert again.path == first.path and len(made) == 1
    # Other weights, and other options, are other files.
    with torch.no_grad():
        model[2].bias += 1
    assert accelerate(explainer_of(model), cache=tmp_path).path != first.path
    assert accelerate(explainer_of(method="layer_cam"), cache=tmp_path).path != first.path
    # A file that lost its end is made again.
    first.path.write_bytes(first.path.read_bytes()[:-1])
    assert accelerate(explainer_of(), cache=tmp_path).path == first.path
    assert len(made) == 4


class Secret(nn.Module):
    """Code that no digest sees."""

    factor = 1.0

    def forward(self, images: Tensor) -> Tensor:
        return images * type(self).factor


@pytest.mark.usefixtures("fast_file")
def test_a_kept_file_is_held_against_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def model() -> nn.Module:
        return nn.Sequential(Secret(), *networks.pooled())

    first = accelerate(explainer_of(model()), cache=tmp_path)
    assert isinstance(first.explainer, OnnxExplainer)
    monkeypatch.setattr(Secret, "factor", 1.5)
    stale = accelerate(explainer_of(model()), cache=tmp_path)
    assert isinstance(stale.explainer, Explainer)
    assert stale.reason.startswith("torch, because its exported maps are off by")
    # It is not asked again: the next one is made anew.
    fresh = accelerate(explainer_of(model()), cache=tmp_path)
    assert isinstance(fresh.explainer, OnnxExplainer)


def test_where_torch_is_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, 2.0, 1.0)
    explainer = explainer_of()
    found = accelerate(explainer, cache=tmp_path, batch_size=4)
    assert found.explainer is explainer
    assert found.reason == (
        "torch, because onnxruntime takes 2.00 of the time of torch (4 images at a time)"
    )
    forced = accelerate(explainer, backend="onnxruntime", cache=tmp_path, batch_size=4)
    assert isinstance(forced.explainer, OnnxExplainer)
    assert forced.reason == "onnxruntime was asked for"


def test_the_time_is_measured(tmp_path: Path) -> None:
    class Slow(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            if not torch.compiler.is_exporting():
                import time

                time.sleep(0.02)
            return images

    found = accelerate(explainer_of(nn.Sequential(Slow(), *networks.pooled())), cache=tmp_path)
    assert isinstance(found.explainer, OnnxExplainer)
    [note] = tmp_path.glob("*.json")
    facts = json.loads(note.read_text())
    assert facts["torch_s"] > 0.02 > facts["onnxruntime_s"]


class Unexportable(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images * float(images.detach().sum().tolist() < torch.inf)


@pytest.mark.parametrize(
    ("explainer", "reason"),
    [
        (lambda: explainer_of(method="score_cam"), "it cannot be exported: score_cam"),
        (lambda: explainer_of(layer=["0.2", "0.4"]), "the maps of several layers are fused"),
        (lambda: explainer_of(augment=Augment()), "the maps of several views are averaged"),
        (
            lambda: explainer_of(output=lambda made: made.flatten(1)),
            "the logits are found by a function of the caller's",
        ),
        (
            lambda: explainer_of(nn.Sequential(Unexportable(), *networks.pooled())),
            "it cannot be exported: PyTorch cannot export the model",
        ),
    ],
)
def test_reasons_for_torch(tmp_path: Path, explainer: Any, reason: str) -> None:
    made = explainer()
    found = accelerate(made, cache=tmp_path)
    assert found.explainer is made
    assert found.reason.startswith(f"torch, because {reason}")
    with pytest.raises(ValueError, match="onnxruntime cannot run this explainer"):
        accelerate(made, backend="onnxruntime", cache=tmp_path)
    assert not list(tmp_path.glob("*.onnx"))


@pytest.mark.usefixtures("fast_file")
@pytest.mark.parametrize("moment", ["_make", "_checked"])
def test_a_file_that_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    whole = getattr(module.Candidate, moment)

    def broken(self: Any, given: Any) -> Any:
        whole(self, given)
        raise RuntimeError("ONNX Runtime failed: a shape does not fit")

    monkeypatch.setattr(module.Candidate, moment, broken)
    explainer = explainer_of()
    found = accelerate(explainer, cache=tmp_path)
    assert found.explainer is explainer
    assert "its exported file does not run: ONNX Runtime failed" in found.reason
    assert list(tmp_path.iterdir()) == []


def test_torch_and_an_unknown_backend(tmp_path: Path) -> None:
    explainer = explainer_of()
    assert accelerate(explainer, backend="torch") == Fastest(explainer, "torch was asked for")
    with pytest.raises(ValueError, match="backend must be one of auto, torch, onnx"):
        accelerate(explainer, backend="tensorrt")  # type: ignore[arg-type]


@pytest.mark.parametrize("asked", [{}, {"targets": "input"}, {"topk": 2}])
def test_compiled(monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]) -> None:
    # Which is the faster at this size is the machine's to say, and not what is tested here.
    monkeypatch.setattr(Trial, "in_turn", lambda *_: (0.25, 1.0))
    explainer = explainer_of(networks.with_mlp())
    fast = accelerate(explainer, backend="compiled", batch_size=4, **asked)
    assert isinstance(fast.explainer, CompiledExplainer)
    assert fast.reason.endswith("compiled, takes 0.25 of the time of torch (4 images at a time)")
    made, expected = fast.explainer(IMAGES), explainer(IMAGES)
    assert torch.equal(made.targets, expected.targets)
    torch.testing.assert_close(made.maps, expected.maps, rtol=1e-4, atol=1e-5)


def test_compiled_but_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trial, "in_turn", lambda *_: (3.0, 1.0))
    explainer = explainer_of(networks.with_mlp())
    fast = accelerate(explainer, backend="compiled", batch_size=4)
    assert fast.explainer is explainer
    assert fast.reason.startswith("torch, because") and "3.00 of the time" in fast.reason


def test_what_cannot_be_compiled() -> None:
    explainer = explainer_of(networks.with_mlp(), contrast=Contrast(reference=(0, 1)))
    with pytest.raises(ValueError, match=r"compiled: .* is no fixed graph of operators"):
        accelerate(explainer, backend="compiled", targets="input", batch_size=4)


@pytest.mark.parametrize(
    ("factor", "options"),
    [
        (2.0, {}),
        # float64 must judge by what was asked for: one layer alone is off by far more than this.
        (0.8, {"layer": ["0.1", "0.4"]}),
        (0.8, {"augment": Augment(flip=True)}),
    ],
)
def test_wrong_maps_are_not_taken(
    monkeypatch: pytest.MonkeyPatch, factor: float, options: dict[str, Any]
) -> None:
    def scaled(step: Step, tensors: list[Tensor], how: str) -> Explanation:
        made = right(step, tensors, how)
        return replace(made, maps=made.maps * factor)

    right = Step.explanation
    monkeypatch.setattr(Step, "explanation", scaled)
    with pytest.raises(ValueError, match=r"its maps are off by .*: off float64 by"):
        accelerate(explainer_of(**options), backend="compiled", batch_size=4)


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    found = accelerate(explainer_of(), cache=tmp_path / "file")
    assert isinstance(found.explainer, Explainer)
    assert "cannot be written" in found.reason


def test_old_files_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setattr("diffcam_export.cache.MAX_BYTES", 250)
    cache = Cache(tmp_path)

    def make(path: Path) -> dict[str, Any]:
        path.write_bytes(b"x" * 100)
        return {}

    for age, name in ((30, "oldest"), (20, "old")):
        kept = cache.put({"name": name}, make)
        then = kept.path.stat().st_mtime - age
        os.utime(kept.path.with_suffix(".json"), (then, then))
    # What was used last is not what goes.
    assert cache.get({"name": "oldest"}) is not None
    cache.put({"name": "new"}, make)
    names = [name for name in ("oldest", "old", "new") if cache.get({"name": name})]
    assert names == ["oldest", "new"]


def test_a_digest_tells_models_apart() -> None:
    model = networks.pooled()
    digest = digest_of(model)
    assert digest_of(networks.pooled()) == digest
    assert digest_of(networks.pooled().double()) != digest
    # The same weights, another setting of a module.
    model[0][2].kernel_size = 3
    assert digest_of(model) != digest


# On the command line.


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("DIFFCAM_CACHE", str(tmp_path / "cache"))
    write_network(tmp_path)
    write_images(tmp_path / "photos", 4)
    return tmp_path


def explain(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["explain", "photos", "-o", "out", "--json", *arguments])


def backend_of(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return str(json.loads(result.stdout)["backend"])


@pytest.mark.usefixtures("folder")
def test_few_images_are_not_worth_an_export(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend_of(explain("-m", MODEL)).startswith("torch (cpu)")
    monkeypatch.setattr("diffcam_fast.cli.backend.WORTH", 4)
    timed(monkeypatch, 0.5, 1.0)
    result = explain("-m", MODEL, "-v")
    assert backend_of(result).startswith("onnxruntime (CPUExecutionProvider)")
    assert "runtime: onnxruntime takes 0.50 of the time of torch" in result.stderr
    assert backend_of(explain("-m", MODEL, "--backend", "torch")).startswith("torch (cpu)")


@pytest.mark.usefixtures("folder")
def test_a_method_without_a_graph() -> None:
    result = explain("-m", MODEL, "--backend", "onnxruntime", "--method", "score_cam")
    assert result.exit_code == 2
    assert "onnxruntime cannot run this explainer: it cannot be exported" in result.stderr


HEAVY = ("torch._dynamo", "sympy", "onnx", "onnx_ir", "onnxscript", "torchvision", "pandas")


def test_a_warm_start_imports_little(folder: Path) -> None:
    """What takes seconds to import has no part in a run whose file is kept."""
    script = f"""
import sys
from click.testing import CliRunner
from diffcam_fast.cli.main import main
from diffcam_fast.compiled import CompiledExplainer
from diffcam_fast.compiled.steps import Step
from diffcam_fast.explanation import Explanation
result = CliRunner().invoke(main, ["explain", "photos", "-o", "out", "--backend", "onnxruntime"])
assert result.exit_code == 0, result.output
print([name for name in {HEAVY} if name in sys.modules])
"""
    said = [
        subprocess.run(
            [sys.executable, "-c", script],
            cwd=folder,
            env=environment(),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for _ in range(2)
    ]
    # The first run makes the network and exports it.
    assert "torch._dynamo" in said[0]
    assert said[1] == "[]\n"


def test_a_later_run_needs_no_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of a model that names its weights is opened before the model is made."""
    from diffcam_fast.cli import backend, opening

    options = ("--size", "64", "--backend", "onnxruntime")
    first = explain(*options)
    assert backend_of(first).startswith("onnxruntime")

    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(opening, "load_model", never)
    again = explain(*options)
    assert backend_of(again) == backend_of(first)
    told, retold = (json.loads(result.stdout) for result in (first, again))
    assert {key: told[key] for key in ("layer", "method", "contrast", "model")} == {
        key: retold[key] for key in ("layer", "method", "contrast", "model")
    }
    # A run may go on in another runtime: settings do not name it.
    assert explain(*options, "--resume").exit_code == 0
    # Another version of the package that has the weights has other weights.
    monkeypatch.setattr(backend, "_version", lambda name: "2")
    with pytest.raises(AssertionError, match="the model was loaded"):
        CliRunner().invoke(
            main, ["explain", "photos", "-o", "out", *options], catch_exceptions=False
        )
