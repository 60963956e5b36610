"""`diffcam bench engine` and `endurance`: what they compare, what they refuse, what they keep."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import networks
from diffcam_bench import endurance, engine, engine_cli, engine_gpu
from diffcam_bench.cli import bench
from diffcam_bench.measure import Timing
from diffcam_bench.methods import ParityError
from diffcam_bench.rows import read_rows
from diffcam_export import OnnxExplainer


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engine, "build", lambda name: networks.with_mlp())
    monkeypatch.setattr(engine, "size_of", lambda name, network: (32, 32))
    monkeypatch.setattr("diffcam_bench.engine_cli.results_folder", lambda: tmp_path)


def run(*arguments: str) -> list[dict[str, Any]]:
    options = ["--images", "5", "--batch-size", "2", "--rounds", "2", "--threads", "1", "--json"]
    result = CliRunner().invoke(bench, ["engine", "--model", "m", *options, *arguments])
    # 1: something is lost, as on a network that is no work at all.
    assert result.exit_code in (0, 1), result.output
    rows: list[dict[str, Any]] = json.loads(result.stdout)
    return rows


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("source", ["memory", "files"])
def test_all_take_part(tmp_path: Path, source: str) -> None:
    rows = run("--source", source, "--write")
    names = [row["name"] for row in rows]
    assert names[:3] == [engine.OURS, engine.HEATMAPS, engine.PLAIN]
    assert {"pytorch-grad-cam", "torch-cam", "captum"} <= set(names)
    assert (engine.READING in names) == (source == "files")
    assert rows[0]["ours_over"] == "1"
    assert all(float(row["images_per_s"]) > 0 and row["rounds"] == 2 for row in rows)
    kept = (tmp_path / "engine.csv").read_text().splitlines()
    assert len(kept) == 1 + len(rows)
    # Those of the same model, source and batch size make room.
    engine_cli._keep(rows, tmp_path / "engine.csv")
    assert (tmp_path / "engine.csv").read_text().splitlines() == kept
    engine_cli._keep([{**row, "batch_size": 3} for row in rows], tmp_path / "engine.csv")
    assert len((tmp_path / "engine.csv").read_text().splitlines()) == 1 + 2 * len(rows)


@pytest.mark.usefixtures("small")
def test_wrong_maps_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = engine.accelerate

    def forced(explainer: Any, **options: Any) -> Any:
        return whole(explainer, backend="onnxruntime", **options)

    monkeypatch.setattr(engine, "accelerate", forced)
    # Small enough to pass the check of the file itself.
    monkeypatch.setattr(OnnxExplainer, "_explanation", _smaller)
    with pytest.raises(ParityError, match=r"ours, accelerated: off by .* nothing is timed"):
        engine.contest("m", source="memory", images=4, batch_size=2, rounds=1, threads=1)


_whole = OnnxExplainer._explanation


def _smaller(self: Any, logits: Any, classes: Any, maps: Any) -> Any:
    return _whole(self, logits, classes, maps * 0.9995)


def timing(name: str, ratio: float) -> Timing:
    return Timing(name, 3, 100.0 * ratio, 90.0, 110.0, ratio, ratio, ratio)


def test_verdicts_read_the_ratios() -> None:
    timings = [
        timing(engine.OURS, 1.0),
        timing(engine.PLAIN, 0.96),
        timing("torch-cam", 1.71),
        timing("pytorch-grad-cam", 4.9),
        timing("diffcam-fast, 5 targets", 1.04),
        timing("diffcam-fast, layer3", 1.44),
    ]
    found = engine.Contest("m", "memory", 64, 16, "", timings, 1.2, 2)
    said = found.verdicts()
    assert [line.rsplit(": ", 1)[1] for line in said] == ["LOST", "holds", "LOST", "holds", "LOST"]
    assert said[-1].startswith("diffcam-fast, layer3: 1.250 of its share")
    assert found.rate(100.0) == 640


def test_flat_and_not_flat() -> None:
    def made(memory: float, speed: float) -> endurance.Endurance:
        tenths = [
            endurance.Tenth(1000 * (i + 1), 500 + memory * i, 100 - speed * i) for i in range(10)
        ]
        return endurance.Endurance(10_000, tuple(tenths), "")

    assert [line.endswith("holds") for line in made(0.9, 0.0).verdicts()] == [True, True]
    assert [line.endswith("holds") for line in made(1.1, 4.0).verdicts()] == [False, False]
    assert made(1.0, 0.0).growth_bytes == pytest.approx(2**20 / 1000)


@pytest.mark.slow
def test_a_short_run_is_watched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DIFFCAM_CACHE", str(tmp_path / "cache"))
    found = endurance.endure(600, pictures=20, progress=lambda done: None)
    assert [tenth.images for tenth in found.tenths][-1] <= 600
    assert all(tenth.memory_mib > 100 and tenth.images_per_s > 0 for tenth in found.tenths)
    assert found.backend.startswith("onnxruntime")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to time")
def test_no_gpu() -> None:
    asked = CliRunner().invoke(bench, ["engine-gpu"])
    assert asked.exit_code == 1
    assert "there is no CUDA device here" in asked.output


def test_verdicts_of_a_gpu() -> None:
    """Files are held against the slower of what reads and what computes, each alone."""
    common = ("m", "device", "bfloat16", 64, 8, "runs")
    timings = [
        timing(engine.OURS, 1.0),
        timing(engine.PLAIN, 0.96),
        timing("torch-cam", 4.5),
        timing(f"{engine.OURS}, {engine.TARGETS} targets", 1.02),
    ]
    lines = engine_gpu.GpuContest(*common, timings, 4).verdicts()
    assert [line.endswith("LOST") for line in lines] == [True, False, False]
    timings = [timing(engine_gpu.RESIDENT, 0.5), timing(engine.READING, 0.95)]
    files = replace(engine_gpu.GpuContest(*common, timings, 4), source="files")
    assert files.verdicts() == [
        "over the slower of decoder and backbone: 0.950, at least 0.9: holds"
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("source", ["device", "files"])
def test_all_take_part_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setattr(engine_gpu, "build", lambda name: networks.with_mlp())
    monkeypatch.setattr(engine_gpu, "size_of", lambda name, network: (32, 32))
    monkeypatch.setattr("diffcam_bench.engine_cli.results_folder", lambda: tmp_path)
    options = ["--model", "m", "--source", source, "--images", "8", "--batch-size", "4"]
    result = CliRunner().invoke(bench, ["engine-gpu", *options, "--rounds", "1", "--write"])
    assert result.exit_code in (0, 1), result.output
    rows = read_rows(tmp_path / "engine_gpu.csv")
    assert {engine.OURS, engine.PLAIN} <= {row["name"] for row in rows}
    assert all(float(row["images_per_s"]) > 0 for row in rows)
