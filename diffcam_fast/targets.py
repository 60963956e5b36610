"""What is explained of an output: the score of a class, or any number that is made of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffcam_fast.contrast import Contrast
from diffcam_kernels import ops
from diffcam_kernels.reference import predicted

ScoreFunction = Callable[[Any], Tensor]
"""From what a model returns for a batch to scores (N,) or (N, T), differentiable; of several, an
image each, from the output of that image to one number.
"""


@dataclass(frozen=True)
class Checked:
    """Classes that are known to fit: nothing waits for the device to look at them again.

    Attributes:
        classes: (N, T) int64 in range, on the device of the logits.
    """

    classes: Tensor


Targets = (
    None
    | Checked
    | str
    | int
    | Sequence[int]
    | Sequence[Sequence[int]]
    | Tensor
    | ScoreFunction
    | Sequence[ScoreFunction]
)


@dataclass(frozen=True)
class ClassTarget:
    """Classes against a contrast, known once the network has run on the images.

    Attributes:
        classes: (N, T) int64.
        scores: (N, T) float32, the explained score.
        of: the contrast.
    """

    classes: Tensor
    scores: Tensor
    of: Contrast

    @property
    def contrast(self) -> str:
        """Name of the contrast."""
        return self.of.name

    def values(self, logits: Tensor, output: Any, rows: Tensor) -> Tensor:
        """The scores (M, T) of other outputs.

        Args:
            logits: (M, K).
            output: what the model returned for the M rows.
            rows: (M,) int64, of which image each row is a variant.
        """
        return self.of.rows(rows).value(logits, self.classes[rows])


@dataclass(frozen=True)
class FunctionTarget:
    """A function of the output, which no contrast applies to.

    Attributes:
        classes: (N, T) int64, all -1.
        scores: (N, T) float32, the explained score.
        function: the function, or one for each image.
        contrast: `none`.
    """

    classes: Tensor
    scores: Tensor
    function: ScoreFunction | Sequence[ScoreFunction]
    contrast: str = "none"

    def values(self, logits: Tensor, output: Any, rows: Tensor) -> Tensor:
        """As `ClassTarget.values`."""
        return scores_of(self.function, output, rows).float()


Target = ClassTarget | FunctionTarget


@dataclass(frozen=True)
class Asked:
    """What a caller wants explained, before the network has run.

    Attributes:
        targets: classes, None for the prediction, or functions of the output.
        topk: the k classes of the largest logits instead.
        contrast: what a class is held against.
    """

    targets: Targets
    topk: int | None
    contrast: Contrast

    @property
    def function(self) -> ScoreFunction | Sequence[ScoreFunction] | None:
        """The function that is explained in place of a class, or one for each image."""
        given = self.targets
        if callable(given):
            return given
        if isinstance(given, Sequence) and given and all(callable(g) for g in given):
            return given  # type: ignore[return-value]  # as the line above says
        return None

    def of(self, logits: Tensor, output: Any) -> Target:
        """What that is for these outputs."""
        if self.function is not None:
            return self.of_function(self.scores(output, len(logits)))
        classes = resolve_targets(self.targets, self.topk, logits)
        classes = predicted(logits) if classes is None else classes
        scores: Tensor
        _, classes, scores = ops.contrast_gradient(
            logits, classes, *self.contrast.operands(logits, classes)
        )
        return ClassTarget(classes, scores.float(), self.contrast)

    def scores(self, output: Any, n: int) -> Tensor:
        """The scores (N, T) that the function makes of an output, with their graph."""
        assert self.function is not None
        return scores_of(self.function, output, torch.arange(n))

    def of_function(self, scores: Tensor) -> FunctionTarget:
        """The target whose scores (N, T) these are."""
        assert self.function is not None
        scores = scores.detach().float()
        unnamed = torch.full_like(scores, -1, dtype=torch.int64)
        return FunctionTarget(unnamed, scores, self.function)


def scores_of(
    function: ScoreFunction | Sequence[ScoreFunction], output: Any, rows: Tensor
) -> Tensor:
    """The scores (M, T) that a function, or one for each image, makes of an output.

    Args:
        function: one for all, or one an image.
        output: what the model returned for M rows.
        rows: (M,), of which image each row is a variant.

    Raises:
        TypeError: a function returns no tensor, or there are several and the model returns none.
        ValueError: it does not return one score, or T scores, a row; or there are more or fewer
            functions than images.
    """
    if callable(function):
        scores = _checked(function(output))
        scores = scores[:, None] if scores.ndim == 1 else scores
        if scores.ndim == 2 and len(scores) == len(rows) and scores.shape[1] > 0:
            return scores
        raise ValueError(
            f"a target that is a function must return (N,) or (N, T) scores for N = {len(rows)} "
            f"images; got {tuple(scores.shape)}"
        )
    if not isinstance(output, Tensor):
        raise TypeError(
            "one function an image needs a model that returns a tensor, which is cut into images; "
            f"it returns a {type(output).__name__}: give one function for the whole batch"
        )
    if len(rows) and int(rows.max()) >= len(function):
        raise ValueError(f"{len(function)} functions for {int(rows.max()) + 1} images")
    each = [_checked(function[int(i)](o)) for i, o in zip(rows, output, strict=True)]
    if any(score.numel() != 1 for score in each):
        raise ValueError("a function of one image must return one number")
    return torch.stack([score.reshape(()) for score in each])[:, None]


def _checked(scores: Any) -> Tensor:
    if isinstance(scores, Tensor):
        return scores
    raise TypeError(
        f"a target that is a function must return a tensor, got {type(scores).__name__}"
    )


def resolve_targets(targets: Targets, topk: int | None, logits: Tensor) -> Tensor | None:
    """Targets as (N, T) int64 on the device of the logits, checked against their classes; None is
    the prediction, which the operators find themselves.
    """
    n, k = logits.shape
    if isinstance(targets, Checked):
        return targets.classes
    if topk is not None:
        if not 1 <= topk <= k:
            raise ValueError(f"topk must be from 1 to the {k} classes, got {topk}")
        return logits.topk(topk, dim=1).indices
    if targets is None or (isinstance(targets, str) and targets == "predicted"):
        return None
    if isinstance(targets, str):
        raise ValueError(f"targets must be classes or 'predicted', got {targets!r}")
    classes = torch.as_tensor(targets)
    if classes.dtype.is_floating_point or classes.dtype.is_complex or classes.dtype == torch.bool:
        raise TypeError(
            f"targets must be whole numbers, the indices of classes; got {classes.dtype}"
        )
    if classes.ndim == 0:
        classes = classes.expand(n)
    if classes.ndim == 1:
        classes = classes[:, None]
    if classes.ndim != 2 or classes.shape[0] != n or classes.shape[1] == 0:
        raise ValueError(
            f"targets must be one class, N = {n} classes, or (N, T) classes; got the shape "
            f"{tuple(classes.shape)}"
        )
    if classes.numel() and not (int(classes.min()) >= 0 and int(classes.max()) < k):
        raise ValueError(
            f"targets must be from 0 to {k - 1}, got {int(classes.min())} to {int(classes.max())}"
        )
    return classes.to(device=logits.device, dtype=torch.int64)
