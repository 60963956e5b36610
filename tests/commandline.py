"""What the tests of the command line share: a small network in a module of its own, and images."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image

# Classes: mostly red, green, blue. The last spatial activation is "2", the head is closed-form.
NETWORK = """
import os
import time
import torch
from torch import nn
from diffcam_fast.images.preprocess import Preprocess
from diffcam_fast.models import LoadedModel

class Slow(nn.Module):
    def forward(self, x):
        time.sleep(float(os.environ.get("TINY_SLEEP", "0")))
        return x

def net():
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 3, 3, stride=4, padding=1)
    linear = nn.Linear(3, 3)
    with torch.no_grad():
        convolution.weight.mul_(0.1)
        convolution.bias.zero_()
        for c in range(3):
            convolution.weight[c, c] += 0.5
        linear.weight.copy_(torch.eye(3) * 2 + torch.rand(3, 3) * 0.1)
    return nn.Sequential(Slow(), convolution, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         linear)

def make():
    preprocess = Preprocess(size=(32, 32), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return LoadedModel(net(), preprocess, ("red", "green", "blue"), "tiny")

def unnamed():
    return LoadedModel(net(), make().preprocess, None, "unnamed")
"""
MODEL = "tiny_network:make"
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (20, 40, 230)}


def write_network(folder: Path) -> None:
    """Writes the module that ``MODEL`` names."""
    (folder / "tiny_network.py").write_text(NETWORK)


def write_images(folder: Path, count: int) -> list[Path]:
    """Writes ``count`` PNG files: grey noise with a square of one of the three colours."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    paths = []
    for index in range(count):
        pixels = random.integers(90, 110, (40, 48, 3), dtype=np.uint8)
        colour = list(COLOURS)[index % 3]
        pixels[10:30, 8:28] = COLOURS[colour]
        paths.append(folder / f"{index:03d}-{colour}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


def environment(**extra: str) -> dict[str, str]:
    """For a subprocess that runs ``python -m diffcam_fast.cli`` from this source tree."""
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **extra}


def command(*arguments: str) -> list[str]:
    """``diffcam`` with these arguments, as a subprocess takes it."""
    return [sys.executable, "-m", "diffcam_fast.cli", *arguments]
