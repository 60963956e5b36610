"""Timing: candidates alternate, and each round gives a ratio to the baseline of its own."""

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Timing:
    """How long one candidate took.

    Attributes:
        name: the candidate.
        rounds: how often it ran.
        median_ms: median, in milliseconds.
        p20_ms: 20th percentile.
        p80_ms: 80th percentile.
        ratio: median over the rounds of its time over the baseline's in that round.
        ratio_p20: 20th percentile of these.
        ratio_p80: 80th percentile of these.
    """

    name: str
    rounds: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    ratio: float
    ratio_p20: float
    ratio_p80: float


def alternate(
    cases: Mapping[str, Callable[[], object]],
    *,
    baseline: str,
    rounds: int,
    warmup: int = 2,
    progress: Callable[[int], object] = lambda done: None,
) -> list[Timing]:
    """Times candidates in turn, so that a machine that slows down slows all of them.

    Every other round runs in reverse, so that none always follows the same neighbour.

    Args:
        cases: name -> what to time; it must wait for its own result.
        baseline: the name that the ratios refer to.
        rounds: timed rounds, at least 1.
        warmup: rounds before them that are not timed.
        progress: called after each timed round with their number so far.

    Raises:
        ValueError: no round, or a baseline that is not among the candidates.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    if baseline not in cases:
        raise ValueError(f"the baseline {baseline!r} is none of {', '.join(cases)}")
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(-warmup, rounds):
        names = list(cases) if number % 2 == 0 else list(cases)[::-1]
        for name in names:
            elapsed = _seconds(cases[name])
            if number >= 0:
                seconds[name].append(elapsed)
        if number >= 0:
            progress(number + 1)
    return [
        _summary(name, np.array(taken), np.array(seconds[baseline]))
        for name, taken in seconds.items()
    ]


def _seconds(case: Callable[[], object]) -> float:
    # The garbage of one candidate must not be collected on the time of the next.
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        case()
        return time.perf_counter() - start
    finally:
        gc.enable()


def _summary(name: str, taken: np.ndarray, baseline: np.ndarray) -> Timing:
    p20, median, p80 = (float(ms) for ms in np.percentile(taken, (20, 50, 80)) * 1000)
    ratio_p20, ratio, ratio_p80 = (float(r) for r in np.percentile(taken / baseline, (20, 50, 80)))
    return Timing(name, len(taken), median, p20, p80, ratio, ratio_p20, ratio_p80)
