"""Explainers tried out on random images: the same question for all, and how long each takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffcam_fast.contrast import Contrast
from diffcam_fast.explainer import Explainer
from diffcam_fast.explanation import Explanation

# As far as float32 in another order may be off, relative to the largest value of a map.
TOLERANCE, ROUNDING = 1e-3, 1e-4
_ROUNDS = 3

Explains = Callable[..., Explanation]


@dataclass(frozen=True)
class Trial:
    """What an explainer is asked, and whatever is to be faster.

    Attributes:
        explainer: as it is.
        input: calls explain any classes, not the predicted one.
        topk: calls explain the k best classes.
    """

    explainer: Explainer
    input: bool
    topk: int | None

    def images(self, count: int) -> Tensor:
        """Random ones (count, C, H, W), the same each time, where the model is."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(count, *self.explainer.setup.examples, generator=generator)
        return self.explainer.prepare(images)

    def explained(self, explain: Explains, images: Tensor) -> Explanation:
        """By one of them; where classes may be asked for, of one that the contrast takes."""
        if not self.input:
            return explain(images, topk=self.topk)
        return explain(images, allowed_target(self.explainer.setup.contrast) or 0)

    def in_turn(self, one: Explains, other: Explains, count: int) -> tuple[float, float]:
        """Seconds that each of two takes for so many images, medians of rounds in turn."""
        images = self.images(count)
        taken: tuple[list[float], list[float]] = ([], [])
        for number in range(_ROUNDS + 1):
            for explain, seconds in zip((one, other), taken, strict=True):
                start = time.perf_counter()
                # In host memory: a GPU is done then, too.
                self.explained(explain, images).maps.cpu()
                # The first round warms up.
                if number:
                    seconds.append(time.perf_counter() - start)
        return statistics.median(taken[0]), statistics.median(taken[1])


def allowed_target(contrast: Contrast) -> int | None:
    """A class that a contrast takes as a target; None: it takes any."""
    if contrast.weights is not None:
        free = (contrast.weights.reshape(-1, contrast.weights.shape[-1]) == 0).all(dim=0)
        return int(free.nonzero()[0]) if free.any() else None
    taken = contrast.reference
    return None if taken is None else next(c for c in range(len(taken) + 1) if c not in taken)


def off_by(made: Tensor, expected: Tensor) -> float:
    """The largest difference of maps, relative to their largest value; infinite where their shapes
    differ.
    """
    if made.shape != expected.shape:
        return float("inf")
    largest = float(expected.abs().max())
    return float((made - expected).abs().max()) / (largest or 1.0)
