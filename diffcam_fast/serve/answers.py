"""What is sent back, as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, Field

from diffcam_fast.explanation import Explanation
from diffcam_fast.models.labels import label_of


class TargetAnswer(BaseModel):
    """One explained class."""

    target: int = Field(description="Index of the class.", ge=0)
    label: str = Field(description="Its name, or its index where the model has no names.")
    probability: float | None = Field(description="Softmax; null where it is no number.")
    score: float | None = Field(description="The contrast, in units of the logits.")
    map: list[list[float | None]] = Field(
        description="h rows of w numbers, in units of the score per cell, unnormalised; null for "
        "NaN and infinity."
    )
    finite: bool = Field(description="The map is free of NaN and infinity.")


class Answer(BaseModel):
    """One explained image."""

    model: str
    method: str
    contrast: str
    layer: str
    box: tuple[float, float, float, float] = Field(
        description="Left, top, right, bottom: the part of the image that the network saw, which "
        "the maps lie over, in pixels."
    )
    explanations: list[TargetAnswer] = Field(description="One for each target.")


class Problem(BaseModel):
    """Why there is no answer."""

    detail: str


class State(BaseModel):
    """Whether the service works."""

    status: str


def answer_of(
    explanation: Explanation,
    *,
    model: str,
    box: tuple[float, float, float, float],
    labels: Sequence[str] | None,
) -> Answer:
    """The answer for the first image of an explanation."""
    targets = explanation.targets[0].tolist()
    chances = explanation.probabilities[0, explanation.targets[0]].tolist()
    scores = explanation.scores[0].tolist()
    maps, finite = explanation.maps[0].tolist(), explanation.finite[0].tolist()
    return Answer(
        model=model,
        method=explanation.method,
        contrast=explanation.contrast,
        layer=explanation.layer,
        box=box,
        explanations=[
            TargetAnswer(
                target=target,
                label=label_of(target, labels),
                probability=_number(chances[index]),
                score=_number(scores[index]),
                map=[[_number(value) for value in row] for row in maps[index]],
                finite=finite[index],
            )
            for index, target in enumerate(targets)
        ],
    )


def _number(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None
