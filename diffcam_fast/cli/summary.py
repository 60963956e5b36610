"""What is told at the end of a run: the report, a JSON summary, and lines for people."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffcam_fast.cli.job import Job
from diffcam_fast.cli.report_parts import REPORT_NAME, ReportParts
from diffcam_fast.cli.run import Summary
from diffcam_fast.explainer import Explainer
from diffcam_fast.outputs.jsonl import JsonlWriter
from diffcam_fast.outputs.ledger import Entry
from diffcam_fast.outputs.parquet import ParquetWriter
from diffcam_fast.outputs.report import write_report

# More lines than this are read in the outputs, not on a terminal.
_SHOWN = 20


def write_run_report(job: Job, summary: Summary) -> Path:
    """Writes ``OUT/report.html`` over all images that are finished.

    Raises:
        OSError: It cannot be written.
    """
    path = job.out / REPORT_NAME
    layer = job.explainer.layer
    if isinstance(job.explainer, Explainer):
        layer = f"{layer} {job.explainer.inspect().shape}"
    facts = {
        "Model": job.loaded.name,
        "Layer": layer,
        "Method": str(job.settings["method"]),
        "Contrast": str(job.settings["contrast"]),
        "Backend": job.backend,
        "Images": str(len(summary.done)),
        "Failed": str(len(summary.failed)),
    }
    write_report(
        path,
        ReportParts(job.out).entries(summary.done),
        title=f"Where {job.loaded.name} looked",
        facts=facts,
        failures=[(entry.path, entry.reason or "") for entry in summary.failed],
    )
    return path


def as_json(job: Job, summary: Summary, report: Path | None) -> dict[str, Any]:
    """The summary of ``--json``."""
    files = dict.fromkeys(file for entry in summary.done for file in entry.files)
    told: dict[str, Any] = {
        "complete": not summary.interrupted,
        "counts": {
            "found": summary.found,
            "explained": len(summary.done),
            "failed": len(summary.failed),
            "resumed": summary.resumed,
            "not_finite": _not_finite(summary),
        },
        "out": str(job.out),
        "outputs": [str(job.out / file) for file in files],
        "report": None if report is None else str(report),
        "model": job.loaded.name,
        "layer": job.explainer.layer,
        "method": job.settings["method"],
        "contrast": job.settings["contrast"],
        "backend": job.backend,
        "batch_size": summary.batch_size,
        "seconds": round(summary.seconds, 3),
        "images_per_second": round(summary.rate, 3),
        "failed": [{"path": entry.path, "reason": entry.reason} for entry in summary.failed],
    }
    if job.agreement is not None:
        told["agreement"] = asdict(job.agreement)
    if job.request.profile:
        told["profile"] = [asdict(stage) for stage in summary.profile.stages]
    return told


def as_lines(job: Job, summary: Summary, report: Path | None) -> Iterator[str]:
    """The summary for people."""
    if len(summary.done) <= _SHOWN:
        for entry in summary.done:
            yield from _image_lines(job, entry)
    counted = f"{len(summary.done)} of {summary.found} images explained"
    if summary.resumed:
        counted += f" ({summary.resumed} finished before)"
    if summary.failed:
        counted += f", {len(summary.failed)} failed"
    yield f"{counted}, in {summary.seconds:.1f} s ({summary.rate:.1f} images/s)"
    if summary.failed:
        yield "failed:"
        shown = summary.failed[:_SHOWN]
        yield from (f"  {entry.path}: {entry.reason}" for entry in shown)
        if len(summary.failed) > len(shown):
            yield f"  and {len(summary.failed) - len(shown)} more, see {job.out / 'ledger.jsonl'}"
    if count := _not_finite(summary):
        yield f"{count} images have maps with NaN or infinity, which are shown in grey"
    if tables := _tables(job, summary):
        yield f"tables: {', '.join(tables)}"
    if job.request.profile:
        yield from summary.profile.lines()
    if report is not None:
        yield f"report: {report}"
    elif job.ledger:
        yield f"outputs: {job.out}"


def _image_lines(job: Job, entry: Entry) -> Iterator[str]:
    classes = ", ".join(
        f"{label} {probability:.2f}"
        for label, probability in zip(entry.labels, entry.probabilities, strict=True)
    )
    # Tables hold all images and are named at the end; these files are the image's own.
    files = ", ".join(str(job.out / f) for f in entry.files if f.startswith(f"{entry.name}."))
    yield f"{entry.path}: {classes}{' -> ' if files else ''}{files}"


def _tables(job: Job, summary: Summary) -> list[str]:
    """The outputs over all images: a file, and a folder of as many files as there were batches."""
    tops = {file.partition("/")[0] for entry in summary.done for file in entry.files}
    return [str(job.out / name) for name in (JsonlWriter.NAME, ParquetWriter.NAME) if name in tops]


def _not_finite(summary: Summary) -> int:
    return sum(not all(entry.finite) for entry in summary.done)
