"""An explainer whose calls are replayed: held against the explainer, and timed beside it."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from diffcam_export.candidate import ROUNDING, TOLERANCE, Fastest, allowed_target, off_by
from diffcam_export.exact import exactness
from diffcam_fast.compiled import CompiledExplainer
from diffcam_fast.explainer import Explainer
from diffcam_fast.explanation import Explanation

_ROUNDS, _JUDGED = 5, 4


@dataclass(frozen=True)
class Replayed:
    """An explainer, to be recorded.

    Attributes:
        explainer: what is recorded.
        input: calls explain any classes, not the predicted one.
        topk: calls explain the k best classes.
        batch_size: images at once.
        compile: with `torch.compile`.
    """

    explainer: Explainer
    input: bool
    topk: int | None
    batch_size: int
    compile: bool

    def opened(self) -> Fastest | str:
        """The faster of both; or why it cannot be recorded."""
        fast = CompiledExplainer(self.explainer, batch_size=self.batch_size, compile=self.compile)
        images = self._images()
        try:
            made = self._explained(fast, images)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                return f"there is no memory to record {self.batch_size} images at once"
            raise
        if fast.refused is not None:
            return fast.refused
        wrong = self._wrong(images[:_JUDGED], made[:_JUDGED])
        if wrong is not None:
            return wrong
        ours, theirs = self._in_turn(fast, images)
        told = f"{ours / theirs:.2f} of the time of torch ({self.batch_size} images at a time)"
        if ours > theirs:
            return Fastest(self.explainer, f"torch, because {self._name} takes {told}")
        return Fastest(fast, f"{self._name} takes {told}")

    @property
    def _name(self) -> str:
        graph = "a CUDA graph" if self.explainer.device.type == "cuda" else "a recorded graph"
        return f"{graph}, compiled," if self.compile else graph

    def _images(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(self.batch_size, *self.explainer.setup.examples, generator=generator)
        return self.explainer.prepare(images)

    def _explained(self, explain: Explainer | CompiledExplainer, images: Tensor) -> Explanation:
        if not self.input:
            return explain(images, topk=self.topk)
        return explain(images, allowed_target(self.explainer.setup.contrast) or 0)

    def _wrong(self, images: Tensor, made: Explanation) -> str | None:
        """What is wrong with maps, or None: as near to the explainer's as its dtype allows."""
        # Of the same classes: of two equal logits either may be the largest.
        expected = self.explainer(images, made.targets)
        off = off_by(made.maps, expected.maps)
        if off <= TOLERANCE:
            return None
        found = exactness(
            self.explainer, images, made.targets, made=made.maps, expected=expected.maps
        )
        if found.as_near(ROUNDING):
            return None
        return f"its maps are off by {off:.1e}: {found}"

    def _in_turn(self, fast: CompiledExplainer, images: Tensor) -> tuple[float, float]:
        """Seconds that both take for a batch, medians of rounds in turn."""
        both: tuple[Explainer | CompiledExplainer, ...] = (fast, self.explainer)
        taken: tuple[list[float], list[float]] = ([], [])
        for _ in range(_ROUNDS):
            for explain, seconds in zip(both, taken, strict=True):
                start = time.perf_counter()
                self._explained(explain, images).maps.cpu()
                seconds.append(time.perf_counter() - start)
        return statistics.median(taken[0]), statistics.median(taken[1])
