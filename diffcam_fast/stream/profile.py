"""Where the time of a stream goes: how busy each of its stages was."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One stage of a stream.

    Attributes:
        name: of the stage.
        workers: threads that work at it.
        busy: seconds that they worked, all together, by the clock on the wall.
        share: of the time that they had, 0 to 1; the stage with the largest is the limit.
        count: pieces of work: images, or batches in the network.
    """

    name: str
    workers: int
    busy: float
    share: float
    count: int


class Profile:
    """How busy the stages of a stream are; give one to `stream`, and read it at any time.

    Example:
        >>> profile = Profile()
        >>> with profile.at("decode", workers=2):
        ...     pass
        >>> profile.limit.name
        'decode'
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._busy: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._workers: dict[str, int] = {}
        self._begun: float | None = None
        self._ended: float | None = None

    @contextmanager
    def at(self, stage: str, *, workers: int = 1) -> Iterator[None]:
        """Counts the time of the block as work at a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, start, time.perf_counter(), workers=workers)

    def add(self, stage: str, start: float, end: float, *, workers: int = 1) -> None:
        """Counts the time between two readings of `time.perf_counter` as work at a stage."""
        with self._lock:
            self._busy[stage] = self._busy.get(stage, 0.0) + end - start
            self._counts[stage] = self._counts.get(stage, 0) + 1
            self._workers[stage] = workers
            self._begun = start if self._begun is None else min(self._begun, start)
            self._ended = end if self._ended is None else max(self._ended, end)

    @property
    def seconds(self) -> float:
        """From the first piece of work to the last."""
        if self._begun is None or self._ended is None:
            return 0.0
        return self._ended - self._begun

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages, in the order in which they began."""
        with self._lock:
            seconds = max(self.seconds, 1e-9)
            return tuple(
                Stage(name, w, busy, min(1.0, busy / (w * seconds)), self._counts[name])
                for (name, busy), w in zip(self._busy.items(), self._workers.values(), strict=True)
            )

    @property
    def limit(self) -> Stage:
        """The busiest stage: what to make faster.

        Raises:
            ValueError: nothing was measured yet.
        """
        if not self.stages:
            raise ValueError("nothing was measured yet")
        return max(self.stages, key=lambda stage: stage.share)

    def lines(self) -> list[str]:
        """A table for people."""
        if not self.stages:
            return []
        limit = self.limit
        rows = [f"{'stage':<10} {'workers':>7} {'busy':>9} {'share':>6} {'pieces':>8}"]
        for stage in self.stages:
            mark = "  <- the limit" if stage is limit or stage == limit else ""
            rows.append(
                f"{stage.name:<10} {stage.workers:>7} {stage.busy:>7.1f} s {stage.share:>6.0%} "
                f"{stage.count:>8}{mark}"
            )
        return rows
