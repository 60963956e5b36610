"""The demo: real photographs, a real network, and the pictures it names."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from diffcam_fast import demo


def test_the_demo_names_what_it_wrote(tmp_path: Path) -> None:
    for package in ("efficientnet_lite_pytorch", "skimage", "sklearn"):
        pytest.importorskip(package)
    out = tmp_path / "demo"
    result = CliRunner().invoke(demo.main, ["-o", str(out)])
    assert result.exit_code == 0, result.output
    table = result.stdout.split("\n\n")[1].splitlines()
    assert table[1].split() == ["mean", "log_odds", "runner_up"]
    rows = {line.split()[0]: [float(v) for v in line.split()[1:]] for line in table[2:]}
    names = ["astronaut", "chelsea", "coffee", "rocket", "china", "flower"]
    assert list(rows) == [*names, "mean"]
    # The mean contrast takes away what all classes share, which a trained classifier has little
    # of; the runner-up of the cat is another cat, so that its map is another one.
    assert all(rows[name][0] > 0.99 for name in names)
    assert rows["chelsea"][2] < 0.5
    assert f"espresso 0.95          {out / 'coffee.overlay.png'}" in result.stdout
    assert result.stdout.splitlines()[-1].split() == ["report", str(out / "report.html")]
    for name in names:
        with Image.open(out / f"{name}.overlay.png") as picture:
            assert abs(picture.width - 2 * picture.height) <= 2
        assert name in (out / "report.html").read_text()


def test_without_its_packages_the_demo_says_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_PHOTOGRAPHS", {"no_such_package": ("data", ("cat.png",))})
    result = CliRunner().invoke(demo.main, ["-o", str(tmp_path / "demo")])
    assert result.exit_code == 2
    assert "pip install '.[demo]' in a checkout" in result.stderr


def test_correlation_of_a_constant_map_is_nan() -> None:
    assert math.isnan(demo.correlation(torch.ones(3, 3), torch.rand(3, 3)))
    assert demo.correlation(torch.eye(3), 2 * torch.eye(3) + 1) == pytest.approx(1)
