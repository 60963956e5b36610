"""What ``diffcam explain --engine ray`` counts and tells at its end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import click

from diffcam_fast.cli.console import printable

# More are read in the column.
_SHOWN = 20


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        out: The dataset.
        explained: Images.
        failed: Path and reason of each image that was not.
        rows: One for each explained image and target.
        seconds: With the start of the actors.
    """

    out: str
    explained: int
    failed: list[tuple[str, str]]
    rows: int
    seconds: float


def read_outcome(out: str, asked: int, *, seconds: float) -> Outcome:
    """Counts what a dataset holds, from three of its columns.

    Args:
        out: Its folder or URI.
        asked: Targets of an image; where they were named, two may be one class.
        seconds: That it took.
    """
    import pyarrow.dataset as pads  # type: ignore[import-untyped,unused-ignore]

    dataset = pads.dataset(out, format="parquet")
    explained = pads.field("error").is_null()
    rows = dataset.count_rows(filter=explained)
    # The rows of an image stand together, so that as many as were asked for hold a whole one.
    first = dataset.head(asked, columns=["target"], filter=explained)
    targets = len(set(first.column("target").to_pylist())) or 1
    failed = dataset.to_table(["path", "error"], filter=pads.field("error").is_valid())
    lines = sorted((row["path"], row["error"]) for row in failed.to_pylist())
    return Outcome(out, rows // targets, lines, rows, seconds)


def tell(outcome: Outcome, *, as_json: bool) -> None:
    """Prints the summary."""
    if as_json:
        told = {
            "complete": True,
            "counts": {
                "found": outcome.explained + len(outcome.failed),
                "explained": outcome.explained,
                "failed": len(outcome.failed),
            },
            "out": outcome.out,
            "rows": outcome.rows,
            "seconds": round(outcome.seconds, 3),
            "failed": [{"path": path, "reason": reason} for path, reason in outcome.failed],
        }
        click.echo(json.dumps(told, indent=2))
        return
    for line in _lines(outcome):
        click.echo(printable(line))


def _lines(outcome: Outcome) -> Iterator[str]:
    found = outcome.explained + len(outcome.failed)
    counted = f"{outcome.explained} of {found} images explained"
    if outcome.failed:
        counted += f", {len(outcome.failed)} failed"
    rate = found / max(outcome.seconds, 1e-9)
    yield f"{counted}, in {outcome.seconds:.1f} s ({rate:.1f} images/s)"
    if outcome.failed:
        yield "failed:"
        yield from (f"  {path}: {reason}" for path, reason in outcome.failed[:_SHOWN])
        if len(outcome.failed) > _SHOWN:
            yield f"  and {len(outcome.failed) - _SHOWN} more, see the column error"
    yield f"tables: {outcome.out}"
