"""The kernels as compiled, what they cost, and the gate in front of their timing."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from diffcam_bench.cli import bench
from diffcam_bench.rows import read_rows, results_folder
from diffcam_kernels import cost

pytest.importorskip("triton")
kernels = pytest.importorskip("diffcam_bench.kernels")
aot = pytest.importorskip("diffcam_bench.aot")


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("sample", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_kernels_compile_to_what_the_committed_table_says(sample: bool) -> None:
    rows = aot.compile_all(os.cpu_count() or 1, sample=sample)
    assert aot.complaints(rows) == []
    assert aot.differences(rows, results_folder() / "aot.csv", table=aot.keys()) == []


def test_the_committed_table_holds_its_own_gates() -> None:
    assert aot.complaints([dict(row) for row in read_rows(results_folder() / "aot.csv")]) == []


def test_the_committed_table_covers_operators_and_architectures() -> None:
    rows = read_rows(results_folder() / "aot.csv")
    assert {row["sm"] for row in rows} == {"80", "90", "100"}
    named = {row["kernel"].partition(" ")[0] for row in rows}
    assert named >= set(kernels.EAGER)


def test_gates_object(tmp_path: Path) -> None:
    [row, *_] = read_rows(results_folder() / "aot.csv")
    good = {**row, "spills": "0", "load_bytes": "16", "aligned": "yes"}
    assert aot.complaints([good]) == []
    assert "spills registers, 3 times" in aot.complaints([{**good, "spills": "3"}])[0]
    assert "loads 4 bytes" in aot.complaints([{**good, "load_bytes": "4"}])[0]
    assert aot.complaints([{**good, "load_bytes": "4", "aligned": "no"}]) == []
    path = tmp_path / "aot.csv"
    assert "not in the table" in aot.differences([good], path)[0]
    from diffcam_bench.rows import write_rows

    write_rows(path, [good])
    assert aot.differences([good], path) == []
    assert "registers" in aot.differences([{**good, "registers": "999"}], path)[0]
    assert "no longer compiled" in aot.differences([], path)[0]


def test_costs_are_those_of_the_operands() -> None:
    case = kernels.Case("pooled_cam", "resnet50", 2, 5, 0, "float16", "nhwc")
    a, w, _ = kernels.operands(case, "cpu", torch.Generator())
    done = kernels.work(case)
    assert done.bytes == a.numel() * 2 + w.numel() * 4 + 2 * 5 * 49 * 4
    assert done.flops == 2 * 2 * 5 * 2048 * 49
    assert done.floor_seconds(1e9) == done.bytes / 1e9
    assert done.floor_seconds(1e9, rate=1e6) == done.flops / 1e6
    gradient = kernels.work(replace(case, op="gradient_cam grad_cam"))
    assert gradient.bytes == a.numel() * 2 * 6 + 2 * 5 * 49 * 4
    assert cost.preprocess(1, 3, 4, 5, 2).bytes == 60 * 3


def test_every_operator_has_cases_of_every_size() -> None:
    found = kernels.cases()
    assert {case.op.partition(" ")[0] for case in found} == set(kernels.EAGER)
    for name in kernels.EAGER:
        assert {c.n for c in found if c.op.partition(" ")[0] == name} == set(kernels.BATCHES)
    assert {c.k for c in found if c.op == "head_cam"} == set(kernels.CLASSES)
    assert all(kernels.work(case).bytes > 0 for case in found)


@pytest.mark.parametrize("op", list(kernels.EAGER))
def test_each_operator_passes_the_gate_in_the_interpreter(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFCAM_KERNELS", "triton")
    case = (
        next(
            c
            for c in kernels.cases()
            if c.op.startswith(op) and c.dtype == "float16" and c.k in (0, 10) and c.n == 1
        )
        if op != "overlay"
        else kernels.cases("overlay")[0]
    )
    arguments = kernels.operands(case, DEVICE, torch.Generator(DEVICE).manual_seed(0))
    assert kernels.check_parity(case, arguments) < 1e-2


def test_cases_are_chosen_by_all_texts_and_not_measured_twice() -> None:
    found = kernels.cases("pooled_cam resnet50 ", "N=64 ", " float16 ", "nhwc")
    assert {case.t for case in found} == {1, 5} and len(found) == 2
    from dataclasses import asdict

    row = {name: str(value) for name, value in asdict(found[0]).items()}
    assert kernels.is_among(found[0], [row]) and not kernels.is_among(found[1], [row])


def test_the_gate_stops_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    case = kernels.Case("pooled_cam", "vgg16", 1, 1, 0, "float32", "nchw")
    arguments = kernels.operands(case, DEVICE, torch.Generator(DEVICE).manual_seed(0))
    right = kernels.EAGER["pooled_cam"]
    monkeypatch.setattr(kernels.ops, "pooled_cam", lambda *a: right(*a) * 1.0001)
    with pytest.raises(kernels.ParityError, match="pooled_cam"):
        kernels.check_parity(case, arguments)
    monkeypatch.setattr(kernels.ops, "pooled_cam", lambda *a: right(*a) * torch.nan)
    with pytest.raises(kernels.ParityError):
        kernels.check_parity(case, arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to time")
def test_without_a_gpu_the_command_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFCAM_KERNELS", "auto")
    done = CliRunner().invoke(bench, ["kernels"])
    assert done.exit_code == 1
    assert "--device cpu" in done.stderr
    asked = CliRunner().invoke(bench, ["kernels", "--device", "cuda"])
    assert asked.exit_code == 2
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "1"))
    checked = CliRunner().invoke(bench, ["kernels", "--device", "cpu", "--only", "overlay"])
    assert checked.exit_code == 0
    assert "all 1 small cases agree" in checked.stderr


@pytest.mark.gpu
def test_a_case_is_timed_beside_its_baselines() -> None:
    case = kernels.Case("pooled_cam", "resnet50", 8, 1, 0, "float16", "nhwc")
    found = {m.name: m for m in kernels.measure(case, rounds=5, compiled=False)}
    assert set(found) == {"diffcam", "eager"}
    assert all(0 < m.ms_p20 <= m.ms <= m.ms_p80 for m in found.values())
    assert found["diffcam"].launches == 1
    rows = kernels.rows_of(case, list(found.values()), kernels.copy_bandwidth(3))
    assert next(float(row["speedup_of_diffcam"]) for row in rows) == 1
