"""The stages of a stream, side by side: read, decode, explain; bounded queues between them."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from os import cpu_count
from time import perf_counter
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffcam_fast.explanation import Explanation
from diffcam_fast.images.read import ImageError
from diffcam_fast.stream.channel import Channel, Closed, Task, TookTooLong, Workers, join_all
from diffcam_fast.stream.items import FLUSH, Flush, Item, Pixels, Preparation, images_of, samples
from diffcam_fast.stream.network import NetworkStage, Refused
from diffcam_fast.stream.profile import Profile
from diffcam_fast.stream.transfer import Leaving
from diffcam_kernels import ops

WORKERS = min(32, cpu_count() or 1)
# Batches that wait for the caller, and batches of images that wait for the network.
_DONE, _AHEAD = 2, 2
# Seconds that are waited at the end for the network, and for who may hang.
_LONGEST_BATCH, _HANGS = 10.0, 1.0
NETWORK_THREAD = "diffcam-network"


@dataclass(frozen=True, eq=False)
class Explained:
    """Images of a stream that were explained together, or one that could not be; none where the
    source had nothing for the moment.

    Attributes:
        keys: what the source calls each of them.
        start: place of the first in the source, from 0.
        pictures: for each what the network saw, or None where it was not asked for.
        explanation: of all of them, in host memory; None: there is none, or the one image failed.
        error: why it failed.
        heatmaps: (N, T, H, W) uint8, where they were asked for.
    """

    keys: list[Any]
    start: int
    pictures: list[Image.Image | None]
    explanation: Explanation | None
    error: str | None = None
    heatmaps: Tensor | None = None

    def cpu(self, *, non_blocking: bool = False) -> Explained:
        """The same in host memory: see `Explanation.cpu`."""
        explanation, heatmaps = self.explanation, self.heatmaps
        if explanation is not None:
            explanation = explanation.cpu(non_blocking=non_blocking)
        if heatmaps is not None:
            heatmaps = heatmaps.to("cpu", non_blocking=non_blocking)
        return replace(self, explanation=explanation, heatmaps=heatmaps)


@dataclass(frozen=True)
class _Loading:
    """An image on its way from a worker."""

    key: Any
    task: Task[Pixels]


@dataclass(frozen=True)
class _End:
    """What ends a stream: the source's end, or what it, or the network, raised."""

    error: BaseException | None = None


_Done = Explained | Leaving[Explained] | _End


class Pipeline:
    """Explains what a source yields while it reads on, and while its caller does something else.

    One thread asks the source, some decode, one runs the network; the caller takes what is done in
    the order of the source. A stage that is ahead waits: no more than two batches of images are
    decoded before the network takes them, and no more than two are explained before the caller
    takes them.

    Args:
        stage: the network.
        preparation: of pictures.
        workers: threads that decode.
        timeout: seconds that reading and decoding one image may take; None: any.
        patience: seconds that the source may take for its next sample; None: any.
        profile: where the work of each stage is counted.
        caller: what the work of the caller is called there.
    """

    def __init__(
        self,
        stage: NetworkStage,
        preparation: Preparation,
        *,
        workers: int | None = None,
        timeout: float | None = None,
        patience: float | None = None,
        profile: Profile | None = None,
        caller: str = "caller",
    ) -> None:
        self._stage, self._preparation, self._timeout = stage, preparation, timeout
        self._patience = patience
        self._count = WORKERS if workers is None else workers
        self._caller = caller
        self._profile = Profile() if profile is None else profile

    def run(self, source: Iterable[Any]) -> Generator[Explained]:
        """Explains the images of a source, in their order.

        Raises:
            Exception: whatever the source raises, after what came before it.
            OutOfMemory: not even one image fits into memory.
            TimeoutError: the source gave no sample in time.
        """
        ahead = _AHEAD * self._stage.batch_size + self._count
        loading: Channel[_Loading | Flush | _End] = Channel(ahead)
        done: Channel[_Done] = Channel(_DONE)
        workers = Workers(self._count)
        threads = [
            threading.Thread(target=self._read, args=(source, workers, loading)),
            threading.Thread(
                target=self._explain, args=(workers, loading, done), name=NETWORK_THREAD
            ),
        ]
        for thread in threads:
            # A source that hangs shall not keep the process.
            thread.daemon = True
            thread.start()

        def end() -> None:
            loading.close()
            done.close()
            reader, network = threads
            # What the network is at ends; a reader may hang, and a worker that reads.
            join_all([network], _LONGEST_BATCH)
            join_all([reader, *workers.close()], _HANGS)

        # Also where the caller leaves this generator as it is, and the interpreter ends.
        atexit.register(end)
        try:
            while True:
                item = done.get()
                if isinstance(item, _End):
                    if item.error is not None:
                        raise item.error
                    return
                if isinstance(item, Leaving):
                    # Here, where it is waited for: the network is at the next batch meanwhile.
                    with self._profile.at("copy back"):
                        item = item.arrived()
                start = perf_counter()
                yield item
                self._profile.add(self._caller, start, perf_counter())
        finally:
            atexit.unregister(end)
            end()

    def _read(
        self, source: Iterable[Any], workers: Workers, out: Channel[_Loading | Flush | _End]
    ) -> None:
        """Asks the source for samples and has their images decoded."""
        end = _End()
        try:
            count = 0
            iterator = samples(source)
            while True:
                with self._profile.at("read"):
                    sample = next(iterator, out)
                if sample is out:
                    break
                for item in images_of(sample, self._preparation, count):
                    if isinstance(item, Flush):
                        out.put(item)
                        continue
                    out.put(_Loading(item.key, workers.submit(self._load, item)))
                    count += 1
        except Closed:
            return
        except BaseException as error:  # noqa: BLE001 - it is raised where the stream is read
            end = _End(error)
        with suppress(Closed):
            out.put(end)

    def _load(self, item: Item) -> Pixels:
        with self._profile.at("decode", workers=self._count):
            return item.load()

    def _explain(
        self,
        workers: Workers,
        loading: Channel[_Loading | Flush | _End],
        out: Channel[_Done],
    ) -> None:
        """Makes batches of decoded images and runs the network on them."""
        try:
            end = self._batches(workers, loading, out)
        except Closed:
            return
        except BaseException as error:  # noqa: BLE001 - it is raised where the stream is read
            end = _End(error)
        with suppress(Closed):
            out.put(end)

    def _batches(
        self,
        workers: Workers,
        loading: Channel[_Loading | Flush | _End],
        out: Channel[_Done],
    ) -> _End:
        batch: list[tuple[Any, Pixels]] = []
        place = 0

        def finish() -> None:
            nonlocal place
            for explained in self._finished(batch, place):
                out.put(explained)
            place += len(batch)
            batch.clear()

        while True:
            try:
                item = loading.get(self._patience)
            except TookTooLong:
                finish()
                return _End(TimeoutError(f"the source gave nothing for {self._patience:g} s"))
            if isinstance(item, _End):
                finish()
                return item
            if isinstance(item, Flush):
                finish()
                # Nothing, so that the caller is not left waiting either.
                out.put(Explained([], place, [], None))
                continue
            pixels = self._result(item, workers)
            if isinstance(pixels, str):
                finish()
                out.put(Explained([item.key], place, [None], None, pixels))
                place += 1
                continue
            if batch and batch[0][1].values.shape != pixels.values.shape:
                finish()
            batch.append((item.key, pixels))
            if len(batch) >= self._stage.batch_size:
                finish()

    def _result(self, item: _Loading, workers: Workers) -> Pixels | str:
        """The pixels, or why there are none."""
        try:
            return item.task.result(self._timeout)
        except TookTooLong:
            workers.hire()
            return f"reading it took more than {self._timeout:g} s"
        except MemoryError:
            return "not enough memory to prepare it"
        except ImageError as error:
            return str(error)
        except Exception as error:  # noqa: BLE001 - one strange image must not stop the others
            return f"cannot be prepared: {error!r}"

    def _heatmaps(self, result: Explanation | Refused) -> Tensor | None:
        size = self._stage.heatmaps
        if size is None or isinstance(result, Refused):
            return None
        heatmaps: Tensor = ops.heatmap(result.maps, *size, dtype=torch.uint8)
        return heatmaps

    def _finished(
        self, batch: list[tuple[Any, Pixels]], place: int
    ) -> Iterator[Explained | Leaving[Explained]]:
        if not batch:
            return
        values: list[Tensor] = [pixels.values for _, pixels in batch]
        with self._profile.at("network"):
            results = [(result, self._heatmaps(result)) for result in self._stage(values)]
        start = 0
        for result, heatmaps in results:
            count = 1 if isinstance(result, Refused) else len(result)
            part = batch[start : start + count]
            keys = [key for key, _ in part]
            pictures = [pixels.picture for _, pixels in part]
            if isinstance(result, Refused):
                yield Explained(keys, place + start, pictures, None, result.reason)
            else:
                yield self._sent(
                    Explained(keys, place + start, pictures, result, heatmaps=heatmaps)
                )
            start += count

    def _sent(self, explained: Explained) -> Explained | Leaving[Explained]:
        """On its way to host memory, where it is not there yet."""
        transfers, made = self._stage.transfers, explained.explanation
        if transfers is None or made is None or not made.maps.is_cuda:
            return explained
        return transfers.download(explained)


__all__ = ["FLUSH", "NETWORK_THREAD", "WORKERS", "Explained", "Pipeline"]
