"""The methods of the fidelity study, and two maps that know nothing of the network."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffcam_fast import Explainer
from diffcam_fast.methods import METHODS
from diffcam_fast.metrics.passes import Explain
from diffcam_kernels import ops

BASELINE = "grad_cam"

# A pass for each of a thousand channels.
SLOW = ("score_cam",)
CONTROLS = ("centre", "random")
# Beside the one that the method takes by default.
_CONTRASTS = {"diff_grad_cam": ("mean", "runner_up")}
_BATCH = 16


@dataclass(frozen=True)
class Entry:
    """One method with one contrast.

    Attributes:
        method: a name in METHODS, or of CONTROLS.
        contrast: its contrast; empty for a control.
    """

    method: str
    contrast: str

    @property
    def name(self) -> str:
        """For tables and pictures."""
        default = METHODS[self.method].contrast if self.method in METHODS else self.contrast
        return self.method if self.contrast == default else f"{self.method} {self.contrast}"

    @property
    def slow(self) -> bool:
        """It is measured on few images."""
        return self.method in SLOW

    @property
    def fitted(self) -> bool:
        """It learns from labelled images first."""
        return not self.control and METHODS[self.method].needs_fit

    @property
    def control(self) -> bool:
        """It does not look at the network."""
        return self.method in CONTROLS


def entries(methods: str | None) -> list[Entry]:
    """The entries of these methods, names that commas part, or of all; Grad-CAM first, the slow
    ones last.

    Raises:
        ValueError: an unknown name.
    """
    known = [*METHODS, *CONTROLS]
    names = known if methods is None else methods.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"unknown {', '.join(unknown)}; there are {', '.join(known)}")
    found = []
    for name in sorted(
        {BASELINE, *names}, key=lambda n: (n in SLOW, n != BASELINE, known.index(n))
    ):
        first = METHODS[name].contrast if name in METHODS else ""
        found += [Entry(name, contrast) for contrast in (first, *_CONTRASTS.get(name, ()))]
    return found


def small_maps(
    entry: Entry, model: nn.Module, fit_on: tuple[Tensor, Tensor], example: Tensor
) -> Callable[[Tensor, Tensor], Tensor]:
    """What makes the maps of an entry, from images and targets (N,) to (N, h, w) in [0, 1].

    Args:
        entry: the method and its contrast.
        model: explained, and where the method is fitted, fitted on.
        fit_on: images and labels.
        example: the kind of image it will get, (N, C, H, W).
    """
    if entry.control:
        return lambda images, targets: _control(entry.method, len(images))
    explainer = Explainer(
        model, method=entry.method, contrast=entry.contrast, example_inputs=example[:1]
    )
    if entry.fitted:
        images, labels = fit_on
        starts = range(0, len(images), _BATCH)
        explainer.fit([(images[i : i + _BATCH], labels[i : i + _BATCH]) for i in starts])

    def make(images: Tensor, targets: Tensor) -> Tensor:
        batch = 1 if entry.slow else _BATCH
        parts = [
            explainer(images[i : i + batch], targets[i : i + batch, None])
            for i in range(0, len(images), batch)
        ]
        return torch.cat([p.heatmaps((p.maps.shape[2], p.maps.shape[3]))[:, 0] for p in parts])

    return make


def enlarged(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Heatmaps (N, H, W) of small maps (N, h, w)."""
    heatmaps: Tensor = ops.heatmap(maps[:, None], *size)
    return heatmaps[:, 0]


def explain(make: Callable[[Tensor, Tensor], Tensor]) -> Explain:
    """What `diffcam_fast.metrics.coherency` asks for."""
    return lambda images, targets: enlarged(
        make(images, targets), (images.shape[2], images.shape[3])
    )


def _control(name: str, count: int) -> Tensor:
    """A bump in the middle, or noise that is another one for each image; 7 x 7 cells."""
    if name == "random":
        seeded = (torch.Generator().manual_seed(number) for number in range(count))
        return torch.stack([torch.rand(7, 7, generator=generator) for generator in seeded])
    line = torch.linspace(-1, 1, 7)
    bump = (-2 * (line[:, None] ** 2 + line**2)).exp()
    low, high = bump.aminmax()
    return ((bump - low) / (high - low)).repeat(count, 1, 1)
