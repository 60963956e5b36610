"""What threads hand each other: bounded queues that end, and workers that may hang."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Closed(Exception):
    """The other end of a channel is gone."""


class TookTooLong(Exception):
    """A task took more time than it was granted."""


class Channel(Generic[T]):
    """A bounded queue between two threads, which either of them can end.

    Args:
        size: how many items may wait in it, at least 1.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: T) -> None:
        """Adds an item, when there is room.

        Raises:
            Closed: nobody will take it.
        """
        with self._changed:
            while len(self._items) >= self._size and not self._closed:
                self._changed.wait()
            if self._closed:
                raise Closed
            self._items.append(item)
            self._changed.notify_all()

    def get(self, timeout: float | None = None) -> T:
        """Takes the next item, when there is one.

        Args:
            timeout: seconds to wait for it; None: as long as it takes.

        Raises:
            Closed: the channel was closed, whatever waited in it.
            TookTooLong: nothing came in time.
        """
        with self._changed:
            there = self._changed.wait_for(lambda: self._items or self._closed, timeout)
            if self._closed:
                raise Closed
            if not there:
                raise TookTooLong
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def close(self) -> None:
        """Wakes both ends; what waits is dropped."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()


class Task(Generic[T]):
    """A call that a worker makes."""

    def __init__(self, function: Callable[..., T], *arguments: Any) -> None:
        self._function, self._arguments = function, arguments
        self._begun: float | None = None
        self._future: Future[T] = Future()

    def run(self) -> None:
        """Makes the call, unless it was given up before it began."""
        if not self._future.set_running_or_notify_cancel():
            return
        self._begun = time.monotonic()
        try:
            self._future.set_result(self._function(*self._arguments))
        except BaseException as error:  # noqa: BLE001 - whoever asks for the result gets it
            self._future.set_exception(error)

    def cancel(self) -> None:
        """Gives up a call that has not begun."""
        self._future.cancel()

    def result(self, limit: float | None) -> T:
        """What the call returns, or raises.

        Args:
            limit: seconds that it may take, the wait for a worker not counted; None: any.

        Raises:
            TookTooLong: it took longer.
        """
        while True:
            begun, wait = self._begun, limit
            if limit is not None and begun is not None:
                wait = begun + limit - time.monotonic()
                if wait <= 0 and not self._future.done():
                    raise TookTooLong
            try:
                return self._future.result(wait if wait is None else max(wait, 0.0))
            except TimeoutError:
                # The call's own, if it is over.
                if self._future.done():
                    raise


class Workers:
    """Threads that run tasks in the order of submission.

    `concurrent.futures` joins its threads when the interpreter ends: one that hangs in a dead file
    system would keep the process for ever. These are daemons, and can be replaced.

    Args:
        count: of threads.
    """

    def __init__(self, count: int) -> None:
        self._tasks: SimpleQueue[Task[Any] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._closed = False
        for _ in range(count):
            self.hire()

    def submit(self, function: Callable[..., T], *arguments: Any) -> Task[T]:
        """Has a function called."""
        task = Task(function, *arguments)
        self._tasks.put(task)
        return task

    def hire(self) -> None:
        """One more thread, in the place of one that hangs."""
        name = f"diffcam-worker-{len(self._threads) + 1}"
        thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def close(self) -> list[threading.Thread]:
        """Sends the threads home, each after what it is at; returns them."""
        self._closed = True
        for _ in self._threads:
            self._tasks.put(None)
        return self._threads

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None and not self._closed:
            task.run()
            # An idle worker shall not hold on to what the last task made.
            del task


def join_all(threads: Iterable[threading.Thread], seconds: float) -> None:
    """Waits for threads to end, but not for one that hangs.

    The interpreter must not end while a thread is inside of PyTorch: it would take it down from
    there, and the process with it.
    """
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
