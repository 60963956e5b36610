"""A function in a process of its own, bounded in time and memory."""

import multiprocessing
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class OutOfBounds(Exception):
    """The function took more time or memory than it was granted; the message says of which."""


class Worker(Generic[T]):
    """A process that calls a function again and again; a new one after each call that had to be
    ended.

    Args:
        function: of a module, so that another process finds it.
        threads: of torch.
        memory_gib: memory for the process.
    """

    def __init__(self, function: Callable[[Any], T], *, threads: int, memory_gib: float) -> None:
        self._settings = (function, threads, memory_gib)
        self._memory_gib = memory_gib
        self._process: Any = None
        self._pipe: Connection[Any, Any] | None = None

    def __enter__(self) -> "Worker[T]":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def __call__(self, argument: object, *, limit_s: float) -> T:
        """What the function returns.

        Args:
            argument: of the function, sent to the process.
            limit_s: seconds for this call; the start of a process is not counted.

        Raises:
            OutOfBounds: it took too long, or its process ended, as it does without memory.
        """
        pipe = self._pipe or self._start()
        pipe.send(argument)
        if not pipe.poll(limit_s):
            self._stop()
            raise OutOfBounds(f"it takes more than {limit_s:g} s")
        try:
            result: T = pipe.recv()
        except EOFError as error:
            self._stop()
            raise OutOfBounds(f"it takes more than {self._memory_gib:g} GiB") from error
        return result

    def _start(self) -> "Connection[Any, Any]":
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, *self._settings), daemon=True)
        self._process.start()
        theirs.close()
        # The first answer says that the imports are done; they are not on the first call's time.
        self._pipe.recv()
        return self._pipe

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = self._pipe = None


def _serve(
    pipe: "Connection[Any, Any]", function: Callable[[Any], Any], threads: int, memory_gib: float
) -> None:
    torch.set_num_threads(threads)
    # The address space would also count libraries that are mapped and never touched.
    limit = int(memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    pipe.send("ready")
    while True:
        pipe.send(function(pipe.recv()))
