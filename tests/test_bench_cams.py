"""`diffcam bench cams` on a network of a few channels: every method beside every rival."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from diffcam_bench import cams, cams_cli
from diffcam_bench.cam_peers import RIVALS, Rival
from diffcam_bench.cli import bench
from diffcam_bench.methods import ParityError
from diffcam_bench.rows import read_rows


def network() -> nn.Module:
    """Its classifier has a name that torch-cam finds."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    ).eval()  # fmt: skip


def photos() -> Tensor:
    return torch.randn(2, 3, 48, 40, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("method", [*RIVALS])
def test_every_method_beside_its_rivals(method: str) -> None:
    model, images = network(), photos()
    found = cams.contest(method, model, images, rounds=2, warmup=0)
    names = [rival.library for rival in RIVALS[method]]
    assert [t.name for t in found.timings] == ["diffcam-fast", "plain forward", *names]
    assert [*found.gates] == names
    assert found.timings[0].ratio == 1
    for rival in RIVALS[method]:
        gate = found.gates[rival.library]
        assert gate.rule == rival.like and bool(gate.why) == (rival.like != "same")
    rows = cams.rows(found, model="m", layer="3", batch_size=2, size=(48, 40), threads=1)
    assert [row["method"] for row in rows] == [method] * len(rows)
    assert rows[0]["backend"] and not rows[1]["backend"]


@pytest.mark.parametrize("like", ["same", "sign", "close"])
def test_nothing_is_timed_where_maps_differ(like: str) -> None:
    maps = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0))
    images = torch.zeros(2, 3, 8, 8)
    other = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(1))
    rival = Rival("other", lambda net, layer: lambda x, targets: other, like, "why")
    with pytest.raises(ParityError, match=f"other: maps are to be {like}, and read"):
        cams.gate(rival, other, maps, images)
    with pytest.raises(ParityError, match="constant or not finite"):
        cams.gate(rival, torch.zeros(2, 8, 8), maps, images)
    same = cams.upsampled(cams.min_max(maps), images)
    assert cams.gate(rival, same, maps, images).value == pytest.approx(
        float(like == "close"), abs=1e-6
    )
    if like == "sign":
        turned = cams.upsampled(cams.min_max((-maps + 0.5).relu()), images)
        assert cams.gate(rival, turned, maps - 0.5, images).value < 1e-6


def test_the_command_keeps_rows_and_replaces_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cams, "prepared", lambda model, batch_size: (network(), photos()))
    monkeypatch.setattr(cams_cli, "results_folder", lambda: tmp_path)
    for names in ("grad_cam,layer_cam", "layer_cam"):
        done = CliRunner().invoke(
            bench, ["cams", "--rounds", "1", "--threads", "1", "--methods", names, "--write"]
        )
        assert done.exit_code == 0, done.output
        assert "times ours" in done.output
    rows = read_rows(tmp_path / "cams.csv")
    assert [row["method"] for row in rows].count("layer_cam") == 4
    assert [row["method"] for row in rows].count("grad_cam") == 5
    done = CliRunner().invoke(
        bench, ["cams", "--rounds", "1", "--threads", "1", "--methods", "cam", "--json"]
    )
    assert [row["name"] for row in json.loads(done.output)][-1] == "torch-cam"
    refused = CliRunner().invoke(bench, ["cams", "--methods", "cam,decom_cam"])
    assert refused.exit_code == 2 and "no rival has decom_cam" in refused.output
