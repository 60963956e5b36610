"""Timing, result rows, the parity gate, and the sweep's bounds."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from diffcam_bench import measure
from diffcam_bench.cli import bench
from diffcam_bench.families import holds, sweep
from diffcam_bench.methods import ParityError, _check_parity
from diffcam_bench.rows import provenance, read_rows, write_rows
from diffcam_bench.zoo import Network
from diffcam_fast import Explainer
from networks import images, pooled

pytest.importorskip("timm")
pytest.importorskip("torchvision")


def test_ratios_are_taken_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    # The machine slows down by ten after the first round; the ratio stays 2.
    base, other = iter([1.0, 10.0, 10.0]), iter([2.0, 20.0, 20.0])

    def run(seconds: float) -> None:
        nonlocal clock
        clock += seconds

    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock)
    cases = {"plain": lambda: run(next(base)), "twice": lambda: run(next(other))}
    plain, twice = measure.alternate(cases, baseline="plain", rounds=3, warmup=0)
    assert (twice.ratio, twice.ratio_p20, twice.ratio_p80) == (2, 2, 2)
    assert (plain.ratio, plain.median_ms, twice.median_ms) == (1, 10_000, 20_000)
    assert twice.p20_ms == pytest.approx(9_200)


def test_order_of_the_candidates_turns_round_each_round() -> None:
    order: list[str] = []
    cases = {name: lambda name=name: order.append(name) for name in "abc"}
    measure.alternate(cases, baseline="a", rounds=2, warmup=1)
    assert "".join(order) == "cbaabccba"


def test_rows_come_back_as_written_and_differing_columns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "results" / "one.csv"
    rows = [{"name": "a, b", **provenance("timm", "onnxruntime", "no-such-package", threads=2)}]
    write_rows(path, rows)
    [row] = read_rows(path)
    assert row == {key: str(value) for key, value in rows[0].items()}
    assert row["machine"]
    assert row["timm"]
    assert row["onnxruntime"]
    assert row["no-such-package"] == ""
    assert row["commit"]
    with pytest.raises(ValueError, match="share their columns"):
        write_rows(path, [{"a": 1}, {"b": 1}])
    assert read_rows(path) == [row]


def test_parity_gate_names_the_library_whose_maps_differ() -> None:
    ours = Explainer(pooled(), method="grad_cam")
    x, targets = images(), [0, 1, 2]
    maps = ours(x, targets).heatmaps((x.shape[2], x.shape[3]))[:, 0]
    assert _check_parity(ours, {"torch-cam": lambda x, t: maps + 1e-6}, x, targets)[
        "torch-cam"
    ] == pytest.approx(1e-6, rel=0.2)
    with pytest.raises(ParityError, match=r"captum's .* 1\.0e-05"):
        _check_parity(ours, {"captum": lambda x, t: maps + 1e-5}, x, targets)
    with pytest.raises(ParityError, match="captum"):
        _check_parity(ours, {"captum": lambda x, t: maps * torch.nan}, x, targets)


def test_sweep_resumes_and_lists_what_takes_too_long(tmp_path: Path) -> None:
    path = tmp_path / "families.csv"
    networks = [
        Network("torchvision:resnet18", "torchvision/resnet", (224, 224), 11_689_512),
        Network("torchvision:squeezenet1_1", "torchvision/squeezenet", (224, 224), 1_235_496),
    ]
    [late] = sweep(networks[:1], path, limit_s=0.01, threads=1, memory_gib=8)
    assert late.supported == "no"
    assert late.reason == "not checked: it takes more than 0.01 s"
    # What took too long is tried again, what was checked is not.
    both = list(sweep(networks, path, limit_s=120, threads=1, memory_gib=8))
    assert [result.model for result in both] == [n.name for n in networks]
    assert all(map(holds, both))
    assert [row["model"] for row in read_rows(path)] == [n.name for n in networks]
    assert list(sweep(networks, path, limit_s=120, threads=1, memory_gib=8)) == []


def test_families_command() -> None:
    done = CliRunner().invoke(bench, ["families", "--only", "torchvision/squeezenet", "--json"])
    assert done.exit_code == 0
    [line] = done.stdout.splitlines()
    assert json.loads(line)["model"] == "torchvision:squeezenet1_1"
    nothing = CliRunner().invoke(bench, ["families", "--only", "no such family"])
    assert nothing.exit_code == 2
    assert "no such family" in nothing.stderr
