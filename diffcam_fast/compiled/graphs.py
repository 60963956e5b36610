"""Steps that are replayed: a batch costs one launch, and the host is free at once."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from diffcam_fast.compiled.steps import Run
from diffcam_fast.running import filled

# Libraries choose and load kernels in the first runs, which a capture must not see.
_WARMUP = 3


class Replay(Protocol):
    """A step for batches of a fixed number of rows."""

    def __call__(self, *operands: Tensor) -> list[Tensor]:
        """The results for as many rows as there are, at most those of the step."""


class Padded:
    """A step that runs each time, its last rows filled up.

    Args:
        run: the step.
        rows: how many it takes.
    """

    def __init__(self, run: Run, rows: int) -> None:
        self._run, self._rows = run, rows

    def __call__(self, *operands: Tensor) -> list[Tensor]:
        """As `Replay`."""
        n = len(operands[0])
        with torch.no_grad():
            return [made[:n] for made in self._run(*(filled(o, self._rows) for o in operands))]


class Captured:
    """A step as a CUDA graph: its kernels are launched again, all at once.

    Rows that a smaller batch leaves over keep what an earlier one put there; rows do not see each
    other. Several threads and streams may share it.

    Args:
        run: the step.
        examples: operands with all rows, on the GPU.
        pool: memory that it shares with others.
        order: of all that share it.

    Raises:
        RuntimeError: the step waits for the GPU, which no graph can hold.
    """

    def __init__(self, run: Run, examples: Sequence[Tensor], pool: Any, order: Order) -> None:
        self._order = order
        self._buffers = [example.clone() for example in examples]
        device = self._buffers[0].device
        with torch.cuda.device(device), torch.no_grad():
            current = torch.cuda.current_stream()
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # PyTorch's own
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for _ in range(_WARMUP):
                    run(*self._buffers)
            current.wait_stream(stream)
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            # Other threads decode and copy meanwhile, which is no part of it.
            mode = "thread_local"
            with torch.cuda.graph(self._graph, pool=pool, capture_error_mode=mode):
                self._results = run(*self._buffers)

    def __call__(self, *operands: Tensor) -> list[Tensor]:
        """As `Replay`; it returns before the GPU is done, as operators do."""
        n = len(operands[0])
        with torch.cuda.device(self._buffers[0].device), self._order, torch.no_grad():
            for buffer, given in zip(self._buffers, operands, strict=True):
                buffer[:n].copy_(given, non_blocking=True)
            self._graph.replay()
            return [result[:n].clone() for result in self._results]


class Order:
    """Makes graphs that share memory run one after the other, whatever streams they are on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: torch.cuda.Event | None = None

    def __enter__(self) -> None:
        self._lock.acquire()
        if self._last is not None:
            torch.cuda.current_stream().wait_event(self._last)

    def __exit__(self, *raised: object) -> None:
        self._last = torch.cuda.current_stream().record_event()
        self._lock.release()
