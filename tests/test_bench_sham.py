"""The study of fooled maps: hoaxes, losses, rows, resuming, and the rule of the contrast."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from scipy import stats

from diffcam_bench.blocks import block
from diffcam_bench.cli import bench
from diffcam_bench.rows import read_rows
from diffcam_bench.sham import honest as sham_honest
from diffcam_bench.sham import many
from diffcam_bench.sham.fooling import ADAPTIVE, FIXED, WEIGHTS, Hoax, fool, grad_cam, remembered
from diffcam_bench.sham.hoaxes import border, entropy, hoax, similarities
from diffcam_bench.sham.looks import LOOKS
from diffcam_bench.sham.networks import NETWORKS
from diffcam_bench.sham.pictures import Pictures, Sizes, planes
from diffcam_bench.sham.study import ARMS, Study
from diffcam_bench.sham.table import markdown
from diffcam_bench.sham.verdict import standings
from diffcam_fast import Explainer
from diffcam_fast.images.preprocess import Preprocess
from diffcam_fast.models import load_model


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads of PyTorch wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


ROOT = Path(__file__).resolve().parents[1]
TINY = Sizes(epochs=1, steps=2, batch=16, images=12)


def pictures(count: int = 96, classes: int = 4) -> Pictures:
    """A bright square whose corner tells the class."""
    random = np.random.default_rng(0)
    labels = random.integers(classes, size=count)
    labels[:classes] = range(classes)
    images = random.integers(0, 90, size=(count, 32, 32, 3), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        top, left = 16 * (label // 2), 16 * (label % 2)
        image[top + 4 : top + 12, left + 4 : left + 12] = 230
    half = count // 2
    return Pictures(images, labels, images[:half], labels[:half])


def saved(folder: Path) -> Path:
    path, made = folder / "pictures.npz", pictures()
    np.savez(
        path,
        train_images=made.train,
        train_labels=made.train_labels,
        test_images=made.test,
        test_labels=made.test_labels,
    )
    return path


def test_hoax_has_the_entropy_in_nats() -> None:
    made = hoax(7, 7, 3.332)
    assert int(made.sum()) == 28
    assert float(entropy(made[None])) == pytest.approx(math.log(28))
    assert torch.equal(made * border(7, 7), border(7, 7)), "the border is part of it"
    assert made[1, 1] == made[1, 5] == made[5, 1] == made[5, 5] == 1, "and the next ring's corners"
    assert int(hoax(7, 7, math.log(24)).sum()) == 24


def test_similarities_are_those_of_scipy() -> None:
    one, two = torch.rand(2, 5, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    found = similarities(one, two)
    for n in range(5):
        a, b = one[n].flatten().numpy(), two[n].flatten().numpy()
        assert found["pearson"][n] == pytest.approx(stats.pearsonr(a, b).statistic)
        assert found["rank"][n] == pytest.approx(stats.spearmanr(a, b).statistic)
    same = similarities(one, one)
    for values in same.values():
        np.testing.assert_allclose(values, 1)
    constant = similarities(torch.ones(1, 8, 8), one[:1])
    assert constant["pearson"] == constant["rank"] == 0


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("contrast", ["none", *ADAPTIVE])
def test_attacked_map_is_the_engines(name: str, contrast: str) -> None:
    torch.manual_seed(0)
    network, images = NETWORKS[name](5).eval(), torch.randn(3, 3, 32, 32)
    classes = torch.tensor([0, 3, 4])
    activations = network.features(images)
    ours = grad_cam(activations, network.head(activations), classes, contrast, differentiable=True)
    explainer = Explainer(
        network, layer="features", method="grad_cam", contrast=contrast, relu=False
    )
    expected = explainer(images, classes[:, None]).maps[:, 0]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("arm", ARMS)
def test_training_lowers_the_loss_of_its_hoax(arm: str) -> None:
    torch.manual_seed(0)
    honest, network = (NETWORKS["residual"](4).eval() for _ in range(2))
    network.load_state_dict(honest.state_dict())
    images = torch.randn(16, 3, 32, 32)
    labels = honest(images).argmax(1)
    contrasts = ADAPTIVE if arm == "adaptive" else ("none",)
    made = Hoax(arm, hoax(8, 8, 3.4), contrasts)

    def loss() -> float:
        values = []
        for contrast in contrasts:
            both = []
            for one in (network, honest):
                activations = one.features(images)
                logits = one.head(activations)
                name = contrast if one is network else "none"
                both.append(grad_cam(activations, logits, labels, name, differentiable=False))
            values.append(float(made.loss(*both).detach()))
        return sum(values)

    before = loss()
    fool(
        network,
        honest,
        made,
        "true",
        remembered(honest, [(images, labels)] * 25),
        weight=20,
        seed=0,
    )
    assert loss() < before - 0.01


def test_quick_mode_gives_rows_and_pictures(tmp_path: Path) -> None:
    options = ["--data", str(saved(tmp_path)), "--quick", "--networks", "plain", "--threads", "1"]
    grids = tmp_path / "grids"
    done = CliRunner().invoke(bench, ["sham", *options, "--json", "--pictures", str(grids)])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert len(rows) == (2 + len(ARMS)) * len(LOOKS)
    assert {row["pearson"] for row in rows if row["arm"] == "clean"} == {"1.0000"}
    for row in rows:
        assert float(row["hoax_low"]) <= float(row["hoax"]) <= float(row["hoax_high"])
    assert len(list(grids.glob("*.png"))) == 2 + len(ARMS)
    assert "| `adaptive` |" in markdown(rows) and "| `log_odds` |" in markdown(rows)


def test_strongest_hoax_that_keeps_the_decisions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sham_honest.Honest, "_kept", lambda self, network: kept.pop(0))
    honest = sham_honest.Honest.train("plain", 0, pictures(), TINY)
    kept = [0.5, 0.89, 0.9, 1.0]
    assert honest.fooled("location", "predicted")[1] == WEIGHTS[2]
    kept = [0.0] * len(WEIGHTS)
    assert honest.fooled("location", "predicted")[1] == WEIGHTS[-1]
    kept = [0.0]
    network, weight = honest.fooled("control", "")
    assert weight == 0 and network is not honest.network


def test_interrupted_study_goes_on_and_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study(pictures(), TINY, ("residual",), (0,), ("sham",), ("all",))
    whole = study.run(tmp_path / "whole.csv")
    trained = []
    real = sham_honest.Honest.rows

    def cut_off(self: sham_honest.Honest, network: torch.nn.Module, arm: str) -> object:
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(network)
        return real(self, network, arm)

    monkeypatch.setattr(sham_honest.Honest, "rows", cut_off)
    path = tmp_path / "parts.csv"
    with pytest.raises(KeyboardInterrupt):
        study.run(path)
    monkeypatch.setattr(sham_honest.Honest, "rows", real)
    resumed = study.run(path)
    assert [{k: str(v) for k, v in row.items()} for row in resumed] == [
        {k: str(v) for k, v in row.items()} for row in whole
    ]


def test_rows_of_other_pictures_are_no_rows_of_these(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    study = Study(pictures(), TINY, ("residual",), (0,), ("sham",), ("all",))
    first = study.run(path)
    second = replace(study, pictures=pictures(count=80)).run(path)
    assert {row["data"] for row in first}.isdisjoint(row["data"] for row in second)
    assert len(read_rows(path)) == len(first) + len(second)
    assert len(study.run(path)) == len(first)


def row(contrast: str, arm: str, *, grad_cam: float = 0.0, pearson: float = 0.0) -> dict[str, str]:
    return {
        "network": "n",
        "method": "diff_grad_cam",
        "contrast": contrast,
        "arm": arm,
        "grad_cam": str(grad_cam),
        "pearson": str(pearson),
    }


def test_rule_of_the_default() -> None:
    rows = [
        row("mean", "clean", grad_cam=0.95),
        row("log_odds", "clean", grad_cam=0.90),
        row("runner_up", "clean", grad_cam=0.50),
        row("mean", "sham", pearson=0.7),
        row("mean", "location", pearson=0.2),
        row("log_odds", "sham", pearson=0.4),
        row("log_odds", "location", pearson=0.5),
        row("runner_up", "sham", pearson=0.9),
        row("runner_up", "location", pearson=0.9),
        row("log_odds", "control", pearson=0.0),
    ]
    found = standings(rows)
    assert [one.contrast for one in found] == ["log_odds", "mean", "runner_up"]
    assert [one.admitted for one in found] == [True, True, False]
    assert found[1].arm == "n, location"
    with pytest.raises(ValueError, match="clean"):
        standings(rows[3:])


def test_document_has_the_committed_rows() -> None:
    text = (ROOT / "docs/robustness.md").read_text(encoding="utf-8")
    rows = read_rows(ROOT / "benchmarks/results/sham.csv")
    assert block(text, "sham") == markdown(rows)


def test_bad_input_says_what_is_needed(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", train_images=np.zeros(1))
    done = CliRunner().invoke(bench, ["sham", "--data", str(tmp_path / "x.npz")])
    assert done.exit_code == 2 and "test_labels" in done.output
    done = CliRunner().invoke(bench, ["sham", "--data", str(saved(tmp_path)), "--arms", "x"])
    assert done.exit_code == 2 and "centre_of_mass" in done.output
    done = CliRunner().invoke(bench, ["sham", "--quick", "--write"])
    assert done.exit_code == 2 and "--quick" in done.output


def test_hoaxes_of_fixed_size_have_their_entropies() -> None:
    for name, cells in FIXED.items():
        made = hoax(7, 7, math.log(cells))
        assert int(made.sum()) == cells, name
        assert float(entropy(made[None])) == pytest.approx(math.log(cells), abs=1e-6)
    assert torch.equal(hoax(7, 7, math.log(24)), border(7, 7))


def test_many_classes_quickly() -> None:
    done = CliRunner().invoke(bench, ["sham", "--many-classes", "--quick", "--json"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    arms = {(row["arm"], row["attacked"]) for row in rows}
    assert {("clean", ""), ("sham_24", "predicted"), ("sham_28", "predicted")} <= arms
    cells = {row["arm"]: row["hoax_cells"] for row in rows}
    assert (cells["sham_24"], cells["sham_28"]) == (24, 28)
    # Nobody labelled the photographs.
    assert {row["accuracy"] for row in rows} == {""}
    assert "photographs without labels" in markdown(rows)


def test_photographs_of_a_folder_are_the_same_in_any_order(tmp_path: Path) -> None:
    for folder, order in (("a", range(20)), ("b", reversed(range(20)))):
        (tmp_path / folder).mkdir()
        for number in order:
            colour = (number * 12, 100, 50)
            Image.new("RGB", (40, 30), colour).save(tmp_path / folder / f"{number}.png")
    small = Preprocess(size=(28, 28))
    one, other = (many.unlabelled(tmp_path / name, 12, 8, small) for name in "ab")
    assert one.digest == other.digest
    assert len(one.train) == 12 and len(one.test) == 8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--many-classes", "--weights", "vgg=x"], "give NAME=FILE"),
        (["--photographs", "."], "go with --many-classes"),
    ],
)
def test_options_of_many_classes(arguments: list[str], words: str) -> None:
    refused = CliRunner().invoke(bench, ["sham", *arguments])
    assert refused.exit_code == 2
    assert words in refused.output


def test_a_pretrained_network_is_split_before_its_head() -> None:
    """The default network, cut in two, gives the logits that it gave."""
    made = many.Pretrained()("efficientnet-lite0", 0, Pictures(*[np.zeros(0)] * 4), Sizes())
    pictures = np.random.default_rng(0).integers(256, size=(2, 224, 224, 3), dtype=np.uint8)
    whole = load_model(None)
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in (whole.preprocess.mean, whole.preprocess.std)
    )
    prepared = (torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        logits, expected = made(planes(pictures, "cpu")), whole.model(prepared)
        assert made.features(planes(pictures, "cpu")).shape == (2, 1280, 7, 7)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
