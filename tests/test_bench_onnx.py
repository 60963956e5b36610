"""Explained ONNX files of known networks against the float64 engine, and what is measured of
them.
"""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from diffcam_bench import onnx_parity
from diffcam_bench.cli import bench
from diffcam_bench.onnx_activations import call_that_makes, float64_maps, returned, same
from diffcam_bench.onnx_cost import Cost
from diffcam_bench.onnx_files import value_of, write_plain
from diffcam_bench.onnx_flops import flops
from diffcam_bench.onnx_networks import EARLIER, ROUTES, TIMM, Case, cases
from diffcam_bench.onnx_parity import Row, check, holds, sweep
from diffcam_bench.rows import read_rows, results_folder
from diffcam_export import export_onnx
from networks import expected_maps, images, pooled, relative_error

pytest.importorskip("timm")
pytest.importorskip("torchvision")

FAMILIES = {row["model"]: row for row in read_rows(results_folder() / "families.csv")}
COMMITTED = read_rows(results_folder() / "onnx_parity.csv")


def committed(row: dict[str, str]) -> Row:
    return Row(*(row[field.name] for field in fields(Row)))


def test_the_sweep_covers_torchvision_and_families_that_are_explained() -> None:
    found = cases()
    assert len(found) >= 80 + 40
    assert len(set(TIMM)) == 40
    assert [n for n in TIMM if FAMILIES[f"timm:{n}"]["supported"] != "yes"] == []
    assert {c.model for c in found if c.layers} == set(EARLIER)
    assert [c.model for c in cases("resnet18")] == [
        "timm:legacy_seresnet18",
        "timm:skresnet18",
        "torchvision:resnet18",
    ]


def test_networks_through_the_sweep(tmp_path: Path) -> None:
    path = tmp_path / "parity.csv"
    small = [
        Case("torchvision:squeezenet1_1", ("features.10",)),
        Case("timm:starnet_s050"),
    ]
    bounds = {"threads": 1, "memory_gib": 8}
    late = list(sweep(small[:1], path, limit_s=0.01, **bounds))
    assert {row.reason for row in late} == {"not checked: it takes more than 0.01 s"}
    rows = list(sweep(small, path, limit_s=300, **bounds))
    assert [row.key for row in rows] == [key for case in small for key in case.rows()]
    assert [row for row in rows if not holds(row)] == []
    heads = {(row.model.partition(":")[2], row.route): row.head for row in rows if not row.asked}
    assert heads["starnet_s050", "onnx-torchscript"] == "closed form"
    assert heads["squeezenet1_1", "pytorch"] == "backward of the head"
    assert [row.layer for row in rows if row.asked] == ["features.10"]
    # All that was checked is in the file, and is not checked again.
    assert {committed(row).key for row in read_rows(path)} == {row.key for row in rows}
    assert list(sweep(small, path, limit_s=300, **bounds)) == []


def test_a_wrong_map_is_no_row_that_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    good = Row("m", "", "pytorch", error="1.0e-06", targets_equal="yes")
    assert holds(good)
    assert not holds(replace(good, error="2.0e-04"))
    assert not holds(replace(good, error="nan"))
    assert not holds(replace(good, targets_equal="no"))
    assert not holds(replace(good, reason="it does not work"))

    def scaled(*args: object, **options: object) -> object:
        done = export_onnx(*args, **options)  # type: ignore[arg-type]
        model = ir.load(done.path)
        [maps] = [v for v in model.graph.outputs if v.name == "diffcam_map"]
        double = ir.node("Add", [maps, maps])
        model.graph.append(double)
        maps.name, double.outputs[0].name = "half", "diffcam_map"
        double.outputs[0].type, double.outputs[0].shape = maps.type, maps.shape
        model.graph.outputs[:] = [
            double.outputs[0] if v is maps else v for v in model.graph.outputs
        ]
        ir.save(model, done.path)
        return done

    monkeypatch.setattr(onnx_parity, "export_onnx", scaled)
    rows = check(Case("torchvision:squeezenet1_1"))
    assert [row.error for row in rows] == ["1.0e+00"] * len(ROUTES)
    assert all(row.reason.startswith("its maps are not those of float64") for row in rows)
    # Whether it is the file or float32 itself.
    assert re.search(r"; PyTorch's in float32 are off by \d\.\de-0[5-9]$", rows[0].reason)


class _Functional(nn.Module):
    """Its last activation is no module's output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Conv2d(3, 8, 3)
        self.classifier = nn.Linear(8, 5)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu(self.features(x), inplace=True)
        return self.classifier(x.mean((2, 3)))  # type: ignore[no-any-return]


def test_an_activation_that_no_module_returns_is_found_by_its_values() -> None:
    model, inputs = _Functional().double(), images().double()
    targets = torch.tensor([[0], [3], [4]])
    before = returned(model, "features", inputs).numpy()
    behind = before.clip(0)
    assert not same(before, torch.from_numpy(behind))
    calls = [call_that_makes(model, inputs, values) for values in (before, behind)]
    assert None not in calls
    assert calls[0] != calls[1]
    assert call_that_makes(model, inputs, behind + 1) is None
    [at_module, at_relu] = [
        float64_maps(model, inputs, targets, call, 1) for call in calls if call is not None
    ]
    assert relative_error(at_module, expected_maps(model, "features", inputs, targets)) <= 1e-12
    # Of A = relu(z), the closed form.
    logits = model(inputs)
    p = logits.softmax(1)
    p_c = p.gather(1, targets)
    onehot = nn.functional.one_hot(targets[:, 0], 5)
    d = onehot - (p * (1 - onehot)) / (1 - p_c)
    w = d @ model.classifier.weight / before[0, 0].size
    expected = torch.einsum("nc,nchw->nhw", w, torch.from_numpy(behind))[:, None]
    assert relative_error(at_relu, expected.detach()) <= 1e-12


class _Permuted(nn.Module):
    """Ends as Swin does: channels last until the pooling."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features, self.permute = nn.Conv2d(3, 8, 3), nn.Identity()
        self.norm, self.pool, self.head = nn.LayerNorm(8), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.permute(self.norm(self.features(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return self.head(self.pool(x).flatten(1))  # type: ignore[no-any-return]


def test_a_permuted_activation_keeps_the_closed_form(tmp_path: Path) -> None:
    done = export_onnx(_Permuted(), tmp_path / "m.onnx", example_inputs=images(2))
    assert (done.layers, done.heads) == (("permute",), ("closed form",)), done.reasons


@pytest.mark.parametrize("torchscript", [False, True])
def test_plain_files_and_their_values(tmp_path: Path, torchscript: bool) -> None:
    path, model, inputs = tmp_path / "m.onnx", pooled(), images()
    write_plain(model, inputs[:2], path, torchscript=torchscript)
    names = {n.op_type: str(n.outputs[0].name) for n in ir.load(path).graph}
    values = value_of(path, names["MaxPool"], inputs, threads=1)
    assert np.abs(values - model[0][:3](inputs).detach().numpy()).max() <= 1e-5


def test_flops_of_plain_and_explained_files(tmp_path: Path) -> None:
    path, inputs = tmp_path / "m.onnx", images(2)
    features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
    head = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 5))
    model = nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()
    write_plain(model, inputs, path, torchscript=True)
    # To (2, 8, 10, 12) from 3 x 3 x 3 values each, then 8 -> 16 -> 5.
    conv, dense = 2 * 2 * 8 * 120 * 27, 2 * 2 * (8 * 16 + 16 * 5)
    assert flops(path, inputs, threads=1) == conv + dense
    explained = tmp_path / "e.onnx"
    export_onnx(model, explained, example_inputs=inputs, layer="0", method="hires_cam")
    # The way back through the head costs what the way there did.
    assert flops(explained, inputs, threads=1) == conv + 2 * dense


def test_complaints_about_costs() -> None:
    cost = Cost("m", "l", "closed form", 1, 9, 10, 10.1, 1.01, 1, 1.02, 1.0, 1.01, 24, 9000, 0)
    assert cost.complaints() == []
    assert len(replace(cost, ratio=1.03, added_bytes=20_000).complaints()) == 2
    backward = replace(cost, head="backward of the head", ratio=1.6, over_flops=1.1)
    assert backward.complaints() == []
    assert len(replace(backward, over_flops=1.2).complaints()) == 1


def test_commands() -> None:
    run = CliRunner().invoke
    done = run(bench, ["onnx", "--only", "torchvision:squeezenet1_1", "--limit", "1", "--json"])
    assert done.exit_code == 1
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == len(ROUTES) + 3
    nothing = run(bench, ["onnx", "--only", "no such network"])
    assert nothing.exit_code == 2
    assert "no such network" in nothing.stderr
    assert run(bench, ["onnx-cost", "--only", "no such network"]).exit_code == 2
    lacking = run(bench, ["onnx-peers", "--model", "torchvision:squeezenet1_1"])
    assert lacking.exit_code == 1
    assert "No module named 'openvino_xai'" in lacking.stderr


@pytest.mark.skipif(not COMMITTED, reason="the sweep has not been run yet")
def test_the_committed_table_is_whole_and_holds() -> None:
    rows = [committed(row) for row in COMMITTED]
    assert {row.key for row in rows} == {key for case in cases() for key in case.rows()}
    assert [row for row in rows if not row.reason and not holds(row)] == []


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.model)
def test_files_are_as_the_committed_table_says(case: Case) -> None:
    table = {row.key: row for row in map(committed, COMMITTED)}
    before = [table[key] for key in case.rows()]
    if any(row.reason.startswith("not checked") for row in before):
        pytest.skip(before[0].reason)
    rows = list(sweep([case], None, threads=1, limit_s=3600, memory_gib=16))
    same_as = [(r.key, r.layer, r.head, r.note, bool(r.reason)) for r in before]
    assert [(r.key, r.layer, r.head, r.note, bool(r.reason)) for r in rows] == same_as
    assert [row for row in rows if not row.reason and not holds(row)] == []
