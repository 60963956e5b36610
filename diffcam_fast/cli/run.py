"""The loop behind ``diffcam explain``: decode, explain, write, account; image by image safe."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from diffcam_fast.cli.console import Console
from diffcam_fast.cli.job import Job
from diffcam_fast.cli.report_parts import REPORT_NAME, ReportParts
from diffcam_fast.explanation import Explanation
from diffcam_fast.images.inputs import Source
from diffcam_fast.images.watch import watched
from diffcam_fast.models.labels import label_of
from diffcam_fast.outputs.ledger import Entry, Ledger
from diffcam_fast.outputs.record import values_of
from diffcam_fast.outputs.writers import JsonlWriter, ParquetWriter, Record, files_of
from diffcam_fast.stream import (
    WORKERS,
    Explained,
    Flush,
    NetworkStage,
    OutOfMemory,
    Pipeline,
    Preparation,
    Profile,
    normalises_on,
)

# Pictures larger than this take longer to compress than the network takes to look at them.
MAX_VIEW = 1024


class ResumeError(ValueError):
    """The output folder does not allow this run."""


@dataclass
class Summary:
    """What came of a run.

    Attributes:
        entries: Every image that is finished, those that an earlier run explained included.
        resumed: How many of them an earlier run had explained.
        found: How many images there were to explain.
        batch_size: At the end, after any lack of memory.
        seconds: Of the loop, without loading.
        interrupted: Whether it was stopped before its end.
        profile: How busy each stage was.
    """

    found: int
    resumed: int = 0
    entries: list[Entry] = field(default_factory=list)
    batch_size: int = 1
    seconds: float = 0.0
    interrupted: bool = False
    profile: Profile = field(default_factory=Profile)

    @property
    def done(self) -> list[Entry]:
        """The images that were explained."""
        return [entry for entry in self.entries if entry.status == "done"]

    @property
    def failed(self) -> list[Entry]:
        """The images that were not, each with its reason."""
        return [entry for entry in self.entries if entry.status == "failed"]

    @property
    def rate(self) -> float:
        """Images per second of this run."""
        return (len(self.entries) - self.resumed) / max(self.seconds, 1e-9)


def run(job: Job, console: Console) -> Summary:
    """Explains the images of a job.

    An image that cannot be read, or that the network raises at, is reported and counted, and stops
    nothing. Ctrl-C ends the run with whole files and returns what was finished.

    Raises:
        ResumeError: The run cannot be resumed, or another one is writing to the folder.
        OutOfMemory: Not even one image fits into memory.
        OSError: An output cannot be written, for example because the disk is full.
    """
    assert job.request.batch_size is not None, "prepare sets it"
    summary = Summary(found=len(job.sources), batch_size=job.request.batch_size)
    parts = ReportParts(job.out) if job.request.report else None
    with ExitStack() as stack:
        ledger = stack.enter_context(_open_ledger(job)) if job.ledger else None
        plan = _Plan.of(job, ledger, parts)
        summary.entries, summary.resumed = plan.finished, len(plan.finished)
        if plan.redo:
            console.say(f"images explained again, whose outputs are gone: {len(plan.redo)}")
        for writer in job.writers:
            stack.callback(writer.close)
        pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="diffcam")
        stack.callback(pool.shutdown, cancel_futures=True)
        advance = stack.enter_context(console.progress(plan.total))
        loop = _Loop(job, console, summary, ledger, plan.redo, pool, parts, advance)
        start = time.perf_counter()
        try:
            try:
                loop.run(plan.pending)
            except KeyboardInterrupt:
                # How else should a watch end?
                summary.interrupted = job.watch is None
            except OutOfMemory:
                loop.commit()
                raise
            loop.commit()
            loop.publish(complete=not summary.interrupted and job.watch is None)
        finally:
            summary.seconds = time.perf_counter() - start
        if ledger is not None and not summary.interrupted:
            own = {file for entry in summary.done for file in entry.files}
            left = sum((job.out / file).exists() for file in ledger.replaced_files - own)
            if left:
                console.say(f"{job.out} still holds outputs of an earlier run: {left} files")
    return summary


@dataclass(frozen=True)
class _Plan:
    """What a run has to do.

    Attributes:
        finished: Images of earlier runs that are whole.
        redo: Images that ledger and tables hold, and that lost a file of their own, by path.
        pending: The images to explain, those first.
        total: How many; None: without end.
    """

    finished: list[Entry]
    redo: Mapping[str, Entry]
    pending: Iterable[Source | Flush]
    total: int | None

    @classmethod
    def of(cls, job: Job, ledger: Ledger | None, parts: ReportParts | None) -> "_Plan":
        if ledger is None:
            return cls([], {}, job.sources, len(job.sources))
        wanted = {str(source.path) for source in job.sources}
        watching = job.watch is not None
        explained = [entry for entry in ledger.done if watching or entry.path in wanted]
        finished = [entry for entry in explained if _is_whole(entry, job.out, parts)]
        kept = {entry.path for entry in finished}
        redo = {entry.path: entry for entry in explained if entry.path not in kept}
        # Under their old names: those depend on what else there is to explain.
        again = [Source(Path(entry.path), entry.name) for entry in redo.values()]
        if watching:
            return cls(finished, redo, chain(again, _watched(job, ledger)), None)
        pending = again + ledger.pending(job.sources)
        return cls(finished, redo, pending, len(pending))


def _watched(job: Job, ledger: Ledger) -> Iterator[Source | Flush]:
    """The images of the watched folder that the ledger does not hold."""
    assert job.watch is not None
    return watched(
        job.watch,
        exclude=job.out,
        known=lambda path: path in ledger,
        names=[entry.name for entry in ledger.done],
    )


def _open_ledger(job: Job) -> Ledger:
    """The account of the run, with the outputs brought to the state that it tells of."""
    try:
        ledger = Ledger(job.out, job.settings, resume=job.request.resume or job.watch is not None)
    except ValueError as error:
        raise ResumeError(str(error)) from error
    try:
        ledger.pending(job.sources)
        _remove_replaced(job.out, ledger.replaced_settings)
        for writer in job.writers:
            writer.restore(ledger.done)
    except ValueError as error:
        ledger.close()
        raise ResumeError(str(error)) from error
    return ledger


def _remove_replaced(out: Path, settings: Mapping[str, Any]) -> None:
    """Deletes what a run of these settings wrote over all of its images: the new run has others."""
    if settings.get("report"):
        (out / REPORT_NAME).unlink(missing_ok=True)
        ReportParts(out).remove()
    # Of a ledger that may be damaged: any JSON value.
    formats = settings.get("formats")
    formats = formats if isinstance(formats, list) else []
    if "jsonl" in formats:
        JsonlWriter(out).remove()
    if "parquet" in formats:
        ParquetWriter(out).remove()


def _is_whole(entry: Entry, out: Path, parts: ReportParts | None) -> bool:
    """Whether the outputs of an explained image are still there."""
    return all((out / file).is_file() for file in entry.files) and (parts is None or entry in parts)


@dataclass
class _Loop:
    job: Job
    console: Console
    summary: Summary
    ledger: Ledger | None
    # Images that the ledger and the tables hold, and that lost a file of their own, by path.
    redo: Mapping[str, Entry]
    pool: ThreadPoolExecutor
    parts: ReportParts | None
    advance: Callable[[int], object]
    # Finished, and not yet accounted for.
    waiting: list[Entry] = field(default_factory=list)
    failed: int = 0

    def run(self, pending: Iterable[Source | Flush]) -> None:
        request, preprocess = self.job.request, self.job.loaded.preprocess
        device = torch.device(self.job.device)
        raw = normalises_on(device, preprocess)
        stage = NetworkStage(
            self.job.explainer,
            targets=self.job.targets,
            topk=request.topk,
            normalise=preprocess if raw else None,
            device=device,
            batch_size=self.summary.batch_size,
            tell=self._tell,
        )
        pipeline = Pipeline(
            stage,
            Preparation(preprocess, raw=raw, picture=MAX_VIEW),
            timeout=request.timeout,
            profile=self.summary.profile,
            caller="write",
        )
        for explained in pipeline.run(pending):
            self.summary.batch_size = stage.batch_size
            if not explained.keys:
                self._account([])
            elif explained.explanation is None:
                [source] = explained.keys
                self._refuse(
                    Entry(str(source.path), "failed", name=source.name, reason=explained.error)
                )
            else:
                self._write(explained, explained.explanation)

    def _tell(self, problem: str, message: str) -> None:
        self.console.say(problem)
        self.console.why(f"  {message}")

    def _write(self, explained: Explained, result: Explanation) -> None:
        records = list(_records(explained, result, self.job.labels))
        tops = _tops(result, self.job.labels)
        # Tables take batches, one at a time; pictures and archives are each on their own.
        tables = [w for w in self.job.writers if isinstance(w, JsonlWriter | ParquetWriter)]
        others = [w for w in self.job.writers if w not in tables]

        def write_one(record: Record, top: list[tuple[str, float]]) -> list[str]:
            files = files_of(others, [record])[0]
            if self.parts is not None:
                self.parts.write(record, top, files=files, cmap=self.job.request.cmap)
            return files

        files = list(self.pool.map(write_one, records, tops))
        new = [record for record in records if str(record.source.path) not in self.redo]
        rows = iter(files_of(tables, new))
        self._account(
            [
                self.redo.get(str(record.source.path)) or record.entry([*own, *next(rows)])
                for record, own in zip(records, files, strict=True)
            ]
        )

    def _refuse(self, entry: Entry) -> None:
        self.console.say(f"{entry.path}: {entry.reason}")
        self._account([entry])

    def _account(self, entries: list[Entry]) -> None:
        """Notes images that are finished; they count when all that holds them is on the disk."""
        self.waiting += entries
        self.summary.found = max(self.summary.found, len(self.summary.entries) + len(self.waiting))
        self.advance(len(entries))
        if self.waiting and all(shards.due or not shards.waiting for shards in self._shards):
            self.commit()
            self.publish(complete=False)

    def commit(self) -> None:
        """Writes the rows that wait, and accounts for the images that waited for them."""
        for shards in self._shards:
            shards.flush()
        if self.ledger is not None:
            new = (entry for entry in self.waiting if entry.path not in self.redo)
            # Whoever was interrupted behind this line commits once more.
            self.ledger.append([entry for entry in new if entry.path not in self.ledger])
        entries, self.waiting = self.waiting, []
        self.summary.entries += entries
        self.failed += sum(entry.status == "failed" for entry in entries)

    def publish(self, *, complete: bool) -> None:
        """Writes the manifest over what is accounted for."""
        facts = {"failed": self.failed, "settings": self.job.settings}
        for shards in self._shards:
            shards.publish(complete=complete, facts=facts)

    @property
    def _shards(self) -> list[ParquetWriter]:
        return [writer for writer in self.job.writers if isinstance(writer, ParquetWriter)]


def _records(
    explained: Explained, result: Explanation, labels: Sequence[str] | None
) -> Iterator[Record]:
    rows = zip(explained.keys, explained.pictures, values_of(result, labels), strict=True)
    for source, picture, values in rows:
        assert picture is not None, "the preparation makes one of every file"
        yield Record(source=source, heatmaps=None, view=picture, **vars(values))


def _tops(result: Explanation, labels: Sequence[str] | None) -> list[list[tuple[str, float]]]:
    """For each image its five most probable classes, best first."""
    count = min(5, result.logits.shape[1])
    best = result.probabilities.topk(count, dim=1)
    return [
        [(label_of(index, labels), value) for index, value in zip(row, values, strict=True)]
        for row, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
