"""The metrics of the fidelity study, in groups that share their passes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from diffcam_bench.fidelity_entries import Entry, enlarged, explain, small_maps
from diffcam_bench.fidelity_scorer import Score
from diffcam_fast.metrics import (
    adcc,
    cascade,
    coherency,
    complexity,
    deletion,
    energy_pointing,
    insertion,
    masked,
    pointing_game,
    rank_correlation,
    road,
)

Values = Mapping[str, Tensor]
"""Of each metric one value an image; of a pooled one its parts, (parts, N)."""

GROUPS: dict[str, tuple[str, ...]] = {
    "masked": (
        "average_drop",
        "increase",
        "coherency",
        "complexity",
        "adcc",
        "adcc_pooled",
    ),
    "curves": ("insertion", "deletion"),
    "road": ("road",),
    "randomised": ("randomised_head", "randomised_half", "randomised_all"),
    "stamps": ("pointing", "energy"),
}

HIGHER, LOWER = 1, -1
BETTER = {
    "average_drop": LOWER,
    "increase": HIGHER,
    "coherency": HIGHER,
    "complexity": LOWER,
    "adcc": HIGHER,
    "adcc_pooled": HIGHER,
    "insertion": HIGHER,
    "deletion": LOWER,
    "road": HIGHER,
    "randomised_head": LOWER,
    "randomised_half": LOWER,
    "randomised_all": LOWER,
    "pointing": HIGHER,
    "energy": HIGHER,
}


@dataclass(frozen=True)
class Variant:
    """What is pinned of the metrics.

    Attributes:
        step: pixels a step of insertion and deletion.
        percentiles: of ROAD.
        seed: of ROAD's noise and of random weights.
    """

    step: int = 1792
    percentiles: tuple[int, ...] = (10, 20, 30, 40, 50, 60, 70, 80, 90)
    seed: int = 0

    def of(self, group: str) -> str:
        """In words, for a row."""
        percentiles = ",".join(map(str, self.percentiles))
        return {
            "masked": "softmax; normalised image times heatmap",
            "curves": f"softmax; {self.step} pixels a step; to 0, from blur 11x11 sigma 5",
            "road": f"softmax; by rank; {percentiles} %; noise 0.01; seed {self.seed}",
            "randomised": f"Spearman; reset_parameters from the head down; seed {self.seed}",
            "stamps": "mask of alpha > 1/2; tolerance 15 px",
        }[group]


@dataclass(frozen=True)
class Subject:
    """An entry on images.

    Attributes:
        model: in evaluation mode.
        score: the same network, for passes that need no maps.
        entry: what explains.
        make: its small maps, of images and targets.
        images: (N, 3, H, W).
        targets: (N,).
        maps: (N, h, w), the small maps of the images.
        fit_on: what a fitted method learns from.
        masks: (N, H, W) bool where there are any.
    """

    model: nn.Module
    score: Score
    entry: Entry
    make: Callable[[Tensor, Tensor], Tensor]
    images: Tensor
    targets: Tensor
    maps: Tensor
    fit_on: tuple[Tensor, Tensor]
    masks: Tensor | None = None

    @property
    def heatmaps(self) -> Tensor:
        """(N, H, W)."""
        return enlarged(self.maps, (self.images.shape[2], self.images.shape[3]))


def measured(group: str, subject: Subject, variant: Variant) -> Values:
    """The values of a group's metrics."""
    return {
        "masked": _masked,
        "curves": _curves,
        "road": _road,
        "randomised": _randomised,
        "stamps": _stamps,
    }[group](subject, variant)


def statistic(metric: str, values: np.ndarray) -> np.ndarray:
    """What a row states of the values (..., N), or of parts (parts, ..., N): their mean, or of
    pooled parts the ADCC of the means.
    """
    means = values.mean(axis=-1)
    if metric != "adcc_pooled":
        return np.asarray(means)
    return adcc(*(torch.from_numpy(np.atleast_1d(part)) for part in means)).numpy()


def _masked(subject: Subject, variant: Variant) -> Values:
    images, targets, heatmaps = subject.images, subject.targets, subject.heatmaps
    seen = masked(subject.score, images, heatmaps, targets)
    parts = (
        coherency(explain(subject.make), images, heatmaps, targets),
        complexity(heatmaps),
        seen.drop,
    )
    names = ("coherency", "complexity", "average_drop")
    return {
        **dict(zip(names, parts, strict=True)),
        "increase": seen.increase,
        "adcc": adcc(*parts),
        "adcc_pooled": torch.stack(parts),
    }


def _curves(subject: Subject, variant: Variant) -> Values:
    given = (subject.score, subject.images, subject.heatmaps, subject.targets)
    return {
        "insertion": insertion(*given, step=variant.step),
        "deletion": deletion(*given, step=variant.step),
    }


def _road(subject: Subject, variant: Variant) -> Values:
    given = (subject.score, subject.images, subject.heatmaps, subject.targets)
    return {"road": road(*given, percentiles=variant.percentiles, seed=variant.seed)}


def _randomised(subject: Subject, variant: Variant) -> Values:
    """How like the trained network's maps those of a randomised one are."""
    layers = sum(callable(getattr(m, "reset_parameters", None)) for m in subject.model.modules())
    stages = {1: "head", max(2, layers // 2): "half", layers: "all"}
    found = {}
    for number, (_, fallen) in enumerate(cascade(subject.model, seed=variant.seed), start=1):
        if number in stages:
            make = small_maps(subject.entry, fallen, subject.fit_on, subject.images)
            maps = make(subject.images, subject.targets)
            found[f"randomised_{stages[number]}"] = rank_correlation(subject.maps, maps)
    return found


def _stamps(subject: Subject, variant: Variant) -> Values:
    assert subject.masks is not None
    heatmaps = subject.heatmaps
    return {
        "pointing": pointing_game(heatmaps, subject.masks),
        "energy": energy_pointing(heatmaps, subject.masks),
    }
