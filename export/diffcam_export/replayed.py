"""An explainer whose calls are replayed: held against the explainer, and timed beside it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffcam_export.candidate import Fastest
from diffcam_export.exact import exactness
from diffcam_export.trial import ROUNDING, TOLERANCE, Trial, off_by
from diffcam_fast.compiled import CompiledExplainer
from diffcam_fast.explainer import Explainer
from diffcam_fast.explanation import Explanation

_JUDGED = 4


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
        trial = Trial(self.explainer, self.input, self.topk)
        images = trial.images(self.batch_size)
        try:
            made = trial.explained(fast, images)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                return f"there is no memory to record {self.batch_size} images at once"
            raise
        if fast.refused is not None:
            return fast.refused
        wrong = self._wrong(images[:_JUDGED], made[:_JUDGED])
        if wrong is not None:
            return wrong
        ours, theirs = trial.in_turn(fast, self.explainer, self.batch_size)
        told = f"{ours / theirs:.2f} of the time of torch ({self.batch_size} images at a time)"
        if ours > theirs:
            return Fastest(self.explainer, f"torch, because {self._name} takes {told}")
        return Fastest(fast, f"{self._name} takes {told}")

    @property
    def _name(self) -> str:
        graph = "a CUDA graph" if self.explainer.device.type == "cuda" else "a recorded graph"
        return f"{graph}, compiled," if self.compile else graph

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
