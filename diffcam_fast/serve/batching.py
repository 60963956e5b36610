"""Requests that arrive together are explained together."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from torch import Tensor

from diffcam_fast.explanation import Explanation
from diffcam_fast.stream import NetworkStage, Refused


class QueueFull(Exception):
    """So many requests wait that another one would wait too long."""


class Refusal(ValueError):
    """The network did not take an image; the message says why."""


@dataclass(frozen=True)
class Kind:
    """What is asked for; requests of one kind share a call.

    Attributes:
        targets: classes; none: the predicted one.
        topk: the k best classes instead.
    """

    targets: tuple[int, ...] = ()
    topk: int | None = None


@dataclass(frozen=True)
class _Ask:
    image: Tensor
    kind: Kind
    answer: Future[Explanation] = field(default_factory=Future)


class Batcher:
    """One thread that runs the network on whatever waits.

    Args:
        stage: from a kind to what explains images of it.
        batch_size: images at once.
        max_wait: seconds that the first of a batch waits for others.
        waiting: requests that may wait.
        seen: is called with the size of each batch.
    """

    def __init__(
        self,
        stage: Callable[[Kind], NetworkStage],
        *,
        batch_size: int,
        max_wait: float,
        waiting: int,
        seen: Callable[[int], object] = lambda size: None,
    ) -> None:
        self._stage, self._seen = stage, seen
        self._batch_size, self._max_wait = batch_size, max_wait
        self._asks: queue.Queue[_Ask | None] = queue.Queue(waiting)
        self._thread = threading.Thread(target=self._work, name="diffcam-network", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Requests that wait."""
        return self._asks.qsize()

    @property
    def alive(self) -> bool:
        """Whether there is still somebody who answers."""
        return self._thread.is_alive()

    def ask(self, image: Tensor, kind: Kind) -> Future[Explanation]:
        """Has an image explained; who cancels the answer before its turn is skipped.

        Raises:
            QueueFull: too many wait.
        """
        ask = _Ask(image, kind)
        try:
            self._asks.put_nowait(ask)
        except queue.Full:
            raise QueueFull from None
        return ask.answer

    def close(self) -> None:
        """Ends when all that was asked is answered."""
        self._asks.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (first := self._asks.get()) is not None:
            batch, last = self._gathered(first)
            self._answer([a for a in batch if a.answer.set_running_or_notify_cancel()])
            if last:
                return

    def _gathered(self, first: _Ask) -> tuple[list[_Ask], bool]:
        """A batch, and whether it is the last one."""
        batch = [first]
        deadline = time.monotonic() + self._max_wait
        while len(batch) < self._batch_size:
            try:
                ask = self._asks.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return batch, False
            if ask is None:
                return batch, True
            batch.append(ask)
        return batch, False

    def _answer(self, batch: Sequence[_Ask]) -> None:
        groups: dict[tuple[Kind, tuple[int, ...]], list[_Ask]] = {}
        for ask in batch:
            groups.setdefault((ask.kind, tuple(ask.image.shape)), []).append(ask)
        for (kind, _), asks in groups.items():
            self._seen(len(asks))
            try:
                _deliver(asks, self._stage(kind)([ask.image for ask in asks]))
            except Exception as error:  # noqa: BLE001 - whoever asked is told, and the next is served
                for ask in asks:
                    if not ask.answer.done():
                        ask.answer.set_exception(error)


def _deliver(asks: Sequence[_Ask], results: Sequence[Explanation | Refused]) -> None:
    waiting = iter(asks)
    for result in results:
        if isinstance(result, Refused):
            next(waiting).answer.set_exception(Refusal(result.reason))
            continue
        # In this thread: to wait for a GPU would keep the server from answering others.
        result = result.cpu()
        for place in range(len(result)):
            next(waiting).answer.set_result(result[place])
