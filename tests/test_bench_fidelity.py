"""`diffcam bench fidelity`: a tiny network through all of it, and the default one through a few
methods; that a study resumes, and that docs/fidelity.md says what the committed rows say.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image, ImageDraw
from torch import nn

from diffcam_bench import fidelity as study
from diffcam_bench import fidelity_cli, fidelity_scorer
from diffcam_bench.blocks import block
from diffcam_bench.cli import bench
from diffcam_bench.fidelity_data import Photographs, _chosen, stamped, unpack
from diffcam_bench.fidelity_entries import BASELINE, CONTROLS, SLOW, Entry, entries
from diffcam_bench.fidelity_metrics import BETTER, GROUPS, Subject, Values, Variant, statistic
from diffcam_bench.fidelity_plan import Plan
from diffcam_bench.fidelity_report import markdown, verdict
from diffcam_bench.rows import Row, read_rows, results_folder
from diffcam_fast.images.preprocess import Preprocess
from diffcam_fast.methods import METHODS
from diffcam_fast.models import loading
from networks import pooled

ROOT = Path(__file__).parents[1]
PREPROCESS = Preprocess(size=(32, 32), mean=(127 / 255,) * 3)


def tiny() -> nn.Module:
    """Its confidences differ from image to image."""
    net = pooled()
    with torch.no_grad():
        net[2].weight *= 40
    return net


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    # Two threads that wait for each other take far longer where other work has the processors.
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pictures() -> Photographs:
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return Photographs(images, "noise")


@pytest.fixture(scope="module")
def stamp_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stamps")
    for number in range(3):
        picture = Image.new("RGBA", (80 + 10 * number, 90))
        ImageDraw.Draw(picture).ellipse((10, 5, 60, 70), fill=(200, 40 * number, 30, 255))
        picture.save(folder / f"{number}.png")
    # neither is cut out of anything
    Image.new("RGB", (80, 80), "red").save(folder / "whole.png")
    Image.new("RGBA", (80, 80), (9, 9, 9, 255)).save(folder / "opaque.png")
    (folder / "cartoon").mkdir()
    picture.save(folder / "cartoon" / "drawn.png")
    return folder


PLAN = Plan(
    {"masked": 6, "curves": 3, "road": 2, "randomised": 2, "stamps": 3},
    slow=1,
    variant=Variant(step=128, percentiles=(30, 60)),
    resamples=100,
)


def new_study(
    pictures: Photographs, folder: Path, plan: Plan = PLAN, model: nn.Module | None = None
) -> study.Study:
    return study.Study(
        model or tiny(), name="tiny", photographs=pictures,
        stamps=stamped(folder, 3, PREPROCESS), plan=plan, threads=1,
    )  # fmt: skip


def run(one: study.Study, methods: str, rows: list[Row] | None = None) -> list[Row]:
    return [row for group in one.run(entries(methods), rows or []) for row in group]


def figures(rows: list[Row]) -> list[dict[str, str]]:
    """Without the date and such."""
    wanted = (
        *study.KEY,
        "mean",
        "low",
        "high",
        "over_grad_cam",
        "over_low",
        "over_high",
        "maps_as",
    )
    return [{key: str(row[key]) for key in wanted} for row in rows]


def test_every_method_and_metric_of_a_tiny_network(
    pictures: Photographs, stamp_folder: Path
) -> None:
    names = ",".join([*METHODS, *CONTROLS])
    rows = run(new_study(pictures, stamp_folder), names)
    found = {(str(row["method"]), str(row["contrast"])) for row in rows}
    assert {method for method, _ in found} == {*METHODS, *CONTROLS}
    assert {c for m, c in found if m == "diff_grad_cam"} == {"log_odds", "mean", "runner_up"}
    for entry in entries(names):
        mine = [row for row in rows if row["method"] == entry.method]
        mine = [row for row in mine if row["contrast"] == entry.contrast]
        missing = {m for group in GROUPS.values() for m in group} - {row["metric"] for row in mine}
        if entry.slow:
            assert missing == {*GROUPS["randomised"], *GROUPS["stamps"]}
            assert {row["images"] for row in mine} == {1}
        elif entry.control:
            assert missing == {*GROUPS["randomised"]}
        else:
            assert missing == set()
    for row in rows:
        assert float(str(row["low"])) <= float(str(row["mean"])) <= float(str(row["high"]))
        assert row["commit"] and row["machine"]
    # on a pooled linear head these are one map
    same = {row["method"]: row["maps_as"] for row in rows if row["metric"] == "road"}
    assert {m for m, other in same.items() if other == BASELINE} == {
        "cam",
        "hires_cam",
        "xgrad_cam",
    }
    assert same["layer_cam"] == "grad_cam_pp"
    energy = {row["method"]: row["mean"] for row in rows if row["metric"] == "coherency"}
    assert energy["centre"] == energy["random"] == 1


def test_maps_that_are_the_same_have_the_same_figures(
    pictures: Photographs, stamp_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repeated = run(new_study(pictures, stamp_folder), "cam")
    monkeypatch.setattr(study, "_SAME", -1.0)
    measured = run(new_study(pictures, stamp_folder), "cam")
    assert {row["maps_as"] for row in repeated} == {"", BASELINE}
    assert {row["maps_as"] for row in measured} == {""}
    for one, other in zip(repeated, measured, strict=True):
        assert one["method"] == other["method"]
        assert float(str(one["mean"])) == pytest.approx(float(str(other["mean"])), abs=2e-4)


def test_an_interrupted_study_measures_the_rest_alone(
    pictures: Photographs, stamp_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(new_study(pictures, stamp_folder), "diff_grad_cam,eigen_cam")
    again = run(new_study(pictures, stamp_folder), "diff_grad_cam,eigen_cam")
    assert figures(again) == figures(whole)

    groups = new_study(pictures, stamp_folder).run(entries("diff_grad_cam,eigen_cam"), [])
    kept = [row for _ in range(7) for row in next(groups)]
    # as they come back from a file
    kept = [{key: str(value) for key, value in row.items()} for row in kept]
    measured: list[tuple[str, str, str]] = []

    def watched(group: str, subject: Subject, variant: Variant) -> Values:
        measured.append((subject.entry.method, subject.entry.contrast, group))
        return original(group, subject, variant)

    original = study.measured
    monkeypatch.setattr(study, "measured", watched)
    rest = run(new_study(pictures, stamp_folder), "diff_grad_cam,eigen_cam", kept)
    assert figures(rest) == figures(whole)
    # the first two groups of diff_grad_cam are there; Grad-CAM is asked again for the differences
    assert ("diff_grad_cam", "log_odds", "masked") not in measured
    assert ("diff_grad_cam", "log_odds", "curves") not in measured
    assert ("diff_grad_cam", "log_odds", "road") in measured
    assert len(measured) == len(set(measured))

    measured.clear()
    text = [{key: str(value) for key, value in row.items()} for row in whole]
    assert figures(run(new_study(pictures, stamp_folder), "eigen_cam", text)) == [
        row for row in figures(whole) if row["method"] in ("grad_cam", "eigen_cam")
    ]
    assert measured == []


def other_weights() -> nn.Module:
    net = tiny()
    with torch.no_grad():
        net[2].bias += torch.arange(5)
    return net


@pytest.mark.parametrize("what", ["weights", "variant", "images", "pixels"])
def test_whatever_changes_a_figure_is_measured_again(
    what: str, pictures: Photographs, stamp_folder: Path
) -> None:
    first = run(new_study(pictures, stamp_folder), "grad_cam")
    seeded = replace(PLAN, variant=Variant(step=64, percentiles=(50,), seed=1))
    fewer = replace(PLAN, counts=dict.fromkeys(PLAN.counts, 2))
    brighter = Photographs(pictures.images + 0.01, "noise")
    changed, unchanged = {
        "weights": (new_study(pictures, stamp_folder, model=other_weights()), set()),
        "variant": (new_study(pictures, stamp_folder, seeded), {"masked", "stamps"}),
        "images": (new_study(pictures, stamp_folder, fewer), {"road", "randomised"}),
        "pixels": (new_study(brighter, stamp_folder), {"stamps"}),
    }[what]
    keys = {study.key_of(row) for row in first}
    for row in run(changed, "grad_cam", first):
        group = next(g for g, metrics in GROUPS.items() if row["metric"] in metrics)
        assert (study.key_of(row) in keys) == (group in unchanged)


def test_intervals_hold_the_mean_and_pair_the_images() -> None:
    random = np.random.default_rng(1)
    theirs = random.normal(0.5, 0.1, size=400)
    ours = theirs + 0.01
    found = study._figures("drop", ours, theirs, 2000)
    # of a mean of 400, 1.96 sigma / 20
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * 0.1 / 20, rel=0.15)
    # all images differ by as much: the difference is known exactly
    assert found["over_low"] == found["over_high"] == found["over_grad_cam"] == 0.01
    parts = np.array([[0.9, 0.5], [0.2, 0.4], [0.0, 0.6]])
    assert statistic("adcc_pooled", parts) == pytest.approx(3 / (1 / 0.7 + 1 / 0.7 + 1 / 0.7))
    assert statistic("adcc", parts[0]) == 0.7


def test_better_and_worse() -> None:
    row = {"metric": "deletion", "over_low": "-0.2", "over_high": "-0.1"}
    assert verdict(row) == 1
    assert verdict({**row, "metric": "insertion"}) == -1
    assert verdict({**row, "over_high": "0.1"}) == 0
    assert {*BETTER} == {metric for group in GROUPS.values() for metric in group}


def test_stamps_lie_where_their_masks_say(stamp_folder: Path) -> None:
    found = stamped(stamp_folder, 10, PREPROCESS)
    assert found.images.shape == (3, 3, 32, 32) and found.masks is not None
    share = found.masks.float().mean(dim=(1, 2))
    assert (share > 0.05).all() and (share < 0.5).all()
    grey = found.images.abs().amax(dim=1) < 0.05
    for image, mask in zip(grey, found.masks, strict=True):
        assert not (image & mask).any()
        # half-covered pixels of the rim lie outside of it
        assert image[~mask].float().mean() > 0.9
    assert torch.equal(stamped(stamp_folder, 10, PREPROCESS).images, found.images)
    assert not torch.equal(stamped(stamp_folder, 10, PREPROCESS, seed=1).images, found.images)
    with pytest.raises(click.ClickException, match="no PNG"):
        stamped(stamp_folder / "cartoon", 1, PREPROCESS)


def test_folders_share_the_photographs_evenly_as_far_as_they_go() -> None:
    few, many = ([Path(f"{name}/{i}") for i in range(n)] for name, n in (("few", 3), ("many", 50)))
    chosen = _chosen([many, few], 20, 0)
    assert len({*chosen}) == 20
    assert sum(path in few for path in chosen) == 3
    assert chosen == _chosen([many, few], 20, 0) != _chosen([many, few], 20, 1)


def test_photographs_out_of_wheels(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    data = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(data, "JPEG")
    table = io.BytesIO()
    columns = {"finegrained_cat": ["a", "b"], "image_data": [data.getvalue()] * 2}
    parquet.write_table(pa.table(columns), table)
    wheel = tmp_path / "some_photos-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("some/one.jpg", data.getvalue())
        archive.writestr("some/images2.parquet", table.getvalue())
        archive.writestr("some/other.parquet", _numbers())
    assert unpack(wheel, tmp_path / "direct") == 3
    done = CliRunner().invoke(bench, ["photographs", str(wheel), "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    files = sorted((tmp_path / "out" / "some_photos").iterdir())
    assert len(files) == 3 and all(Image.open(file).size == (8, 8) for file in files)


def _numbers() -> bytes:
    """A table without pictures."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = io.BytesIO()
    parquet.write_table(pa.table({"sales": [1, 2]}), table)
    return table.getvalue()


def test_onnx_runtime_gives_the_same_logits_or_nothing(
    pictures: Photographs, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny()
    with fidelity_scorer.scorer(model, pictures.images, runtime="torch", threads=1) as score:
        assert score is model
    with fidelity_scorer.scorer(model, pictures.images, runtime="onnxruntime", threads=1) as score:
        found = score(pictures.images[:3])
    torch.testing.assert_close(found, model(pictures.images[:3]).detach(), atol=1e-4, rtol=1e-4)
    monkeypatch.setattr(fidelity_scorer, "_TOLERANCE", -1.0)
    with (
        pytest.raises(click.ClickException, match="differ from PyTorch's"),
        fidelity_scorer.scorer(model, pictures.images, runtime="onnxruntime", threads=1),
    ):
        pass


@pytest.fixture
def tiny_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage", reason="the photographs come with scikit-image")

    def load(spec: str | None, *, weights: Path | None = None) -> loading.LoadedModel:
        return loading.LoadedModel(tiny(), PREPROCESS, None, spec or "tiny")

    monkeypatch.setattr(loading, "load_model", load)


@pytest.mark.usefixtures("tiny_is_loaded")
def test_the_command_keeps_rows_and_goes_on(
    tmp_path: Path, stamp_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fidelity_cli, "results_folder", lambda: tmp_path)
    options = ["fidelity", "--quick", "--threads", "1", "--stamps", str(stamp_folder), "--write"]
    first = CliRunner().invoke(bench, [*options, "--methods", "eigen_cam"])
    assert first.exit_code == 0, first.output
    kept = read_rows(tmp_path / "fidelity.csv")
    assert {row["method"] for row in kept} == {"grad_cam", "eigen_cam"}
    assert "randomised_all" in first.stdout and "eigen_cam" in first.stdout

    monkeypatch.setattr(study, "measured", lambda *a: pytest.fail("measured again"))
    picture = tmp_path / "fidelity.png"
    second = CliRunner().invoke(
        bench, [*options, "--methods", "eigen_cam", "--json", "--picture", str(picture)]
    )
    assert second.exit_code == 0, second.output
    assert json.loads(second.stdout) == kept == read_rows(tmp_path / "fidelity.csv")
    with Image.open(picture) as drawn:
        assert min(drawn.size) > 100 and len(drawn.convert("RGB").getcolors(1 << 24) or ()) > 10


@pytest.mark.usefixtures("tiny_is_loaded")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "no_cam"], "unknown no_cam"),
        (["--write", "--out", "a.csv"], "not both"),
    ],
)
def test_refusals(options: list[str], message: str) -> None:
    done = CliRunner().invoke(bench, ["fidelity", "--quick", *options])
    assert done.exit_code == 2 and message in done.output


@pytest.mark.usefixtures("tiny_is_loaded")
def test_too_few_photographs(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "one.png")
    options = ["fidelity", "--quick", "--methods", "grad_cam", "--data", str(tmp_path)]
    done = CliRunner().invoke(bench, options)
    assert done.exit_code == 2 and "there are 1 photographs" in done.output


def test_quick_on_the_default_network(tmp_path: Path, stamp_folder: Path) -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="the default network is an extra")
    out = tmp_path / "rows.csv"
    done = CliRunner().invoke(
        bench,
        ["fidelity", "--quick", "--threads", "1", "--stamps", str(stamp_folder), "--out", str(out),
         "--methods", "grad_cam,eigen_cam,random"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    rows = {(row["method"], row["metric"]): float(row["mean"]) for row in read_rows(out)}
    # A map that looks at the network beats noise where pixels are removed by it, and its mass lies
    # on the object; that of Grad-CAM hangs on the head, which EigenCAM does not look at.
    assert rows["grad_cam", "deletion"] < rows["random", "deletion"]
    assert rows["grad_cam", "road"] > rows["random", "road"]
    assert rows["grad_cam", "energy"] > rows["random", "energy"]
    assert rows["grad_cam", "randomised_head"] < 0.95 < rows["eigen_cam", "randomised_head"]


def committed() -> list[dict[str, str]]:
    return read_rows(results_folder() / "fidelity.csv")


def test_committed_rows_cover_every_method() -> None:
    rows = committed()
    [model] = {row["model"] for row in rows}
    for name in (*METHODS, *CONTROLS):
        metrics = {row["metric"] for row in rows if row["method"] == name}
        wanted = {m for group, all_of in GROUPS.items() for m in all_of if group in _groups(name)}
        assert wanted <= metrics, name
    assert all(row["commit"] and not row["commit"].endswith("+") for row in rows), model


def _groups(method: str) -> set[str]:
    left_out = {"randomised", "stamps"} if method in SLOW else set()
    return {*GROUPS} - left_out - ({"randomised"} if method in CONTROLS else set())


@pytest.mark.parametrize("randomised", [False, True])
def test_the_tables_of_the_documentation_are_those_of_the_rows(randomised: bool) -> None:
    text = (ROOT / "docs/fidelity.md").read_text(encoding="utf-8")
    shown = block(text, "randomised" if randomised else "fidelity")
    assert shown == markdown(committed(), "efficientnet-lite0", randomised=randomised)


def test_entries_put_grad_cam_first_and_slow_methods_last() -> None:
    found = entries(None)
    assert found[0] == Entry(BASELINE, "none")
    assert [entry.slow for entry in found] == sorted(entry.slow for entry in found)
    assert [entry.name for entry in entries("diff_grad_cam")] == [
        "grad_cam",
        "diff_grad_cam",
        "diff_grad_cam mean",
        "diff_grad_cam runner_up",
    ]
