"""From committed rows to comparisons. Cases, models and libraries are those that the rows name."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from diffcam_bench.rows import read_rows
from diffcam_bench.standings.comparison import (
    LIBRARY,
    OWN,
    PLAIN,
    Comparison,
    Row,
    hardware,
    number,
    provenance,
)

OURS = "diffcam"
# Rows of one run share these beside what their file calls a case.
_RUN = ("device", "gpu", "dtype", "machine", "threads", "torch", "commit")
# No rival: a part of what ours does.
_PARTS = ("reading and decoding alone",)


@dataclass(frozen=True)
class Layout:
    """How the rows of a file are to be read.

    Attributes:
        file: name of the CSV file, without its ending.
        topic: the heading of its comparisons.
        case: columns that say what ran, the first of which groups cases; those that a file does
            not have are left out.
        ratio: column of the ratio; its spread is in the columns with `_p20` and `_p80`.
        over: what the ratio refers to: the row of `ours`, or of the `plain` model, or in
            `itself`: each row is ours over plain.
    """

    file: str
    topic: str
    case: tuple[str, ...]
    ratio: str = "ratio"
    over: str = "ours"

    def comparisons(self, rows: Sequence[Row]) -> Iterator[Comparison]:
        """All that the rows compare; a row without a ratio compares nothing."""
        runs: dict[tuple[str, ...], list[Row]] = {}
        for row in rows:
            if row.get(self.ratio):
                key = tuple(row.get(column) or "" for column in (*self.case, *_RUN))
                runs.setdefault(key, []).append(row)
        for run in runs.values():
            if self.over == "itself":
                yield from (self._made(row, PLAIN, PLAIN, invert=True) for row in run)
            elif self.over == "plain":
                yield from self._over_plain(run)
            else:
                yield from self._over_ours(run)

    def _over_ours(self, run: Sequence[Row]) -> Iterator[Comparison]:
        # Ours itself is the first of ours: the others have more to do.
        ours = next((row["name"] for row in run if row["name"].startswith(OURS)), OURS)
        for row in run:
            if row["name"] != ours:
                yield self._made(row, row["name"], kind(row["name"]), ours=ours)

    def _over_plain(self, run: Sequence[Row]) -> Iterator[Comparison]:
        """Of ours the ratio is turned round; that of another library refers to another baseline,
        so that two medians are divided, and there is no spread.
        """
        plain = next((row["name"] for row in run if kind(row["name"]) == PLAIN), PLAIN)
        ours = [row for row in run if kind(row["name"]) == OWN]
        for row in ours:
            yield self._made(row, plain, PLAIN, ours=row["name"], invert=True)
        for row in run:
            if kind(row["name"]) == LIBRARY and ours:
                same = next((one for one in ours if _variant(one) == _variant(row)), ours[0])
                theirs, mine = number(row, "median_ms"), number(same, "median_ms")
                if theirs is not None and mine:
                    yield self._made(row, _library(row), LIBRARY, same["name"], theirs / mine)

    def _made(
        self,
        row: Row,
        other: str,
        kind: str,
        ours: str = "diffcam-fast",
        quotient: float | None = None,
        *,
        invert: bool = False,
    ) -> Comparison:
        ratio, p20, p80 = self._ratio(row) if quotient is None else (quotient, None, None)
        if invert:
            ratio, p20, p80 = 1 / ratio, p80 and 1 / p80, p20 and 1 / p20
        where, gpu = hardware(row)
        columns = [column for column in self.case if row.get(column)]
        return Comparison(
            topic=self.topic,
            file=self.file,
            case=", ".join(_said(column, row[column]) for column in columns),
            group=row[columns[0]] if columns else "",
            ours=ours,
            other=other,
            kind=kind,
            ratio=ratio,
            p20=p20,
            p80=p80,
            where=where,
            gpu=gpu,
            provenance=provenance(row),
        )

    def _ratio(self, row: Row) -> tuple[float, float | None, float | None]:
        ratio = float(row[self.ratio])
        # One round has no spread, though its percentiles are numbers.
        if number(row, "rounds") == 1:
            return ratio, None, None
        return ratio, number(row, f"{self.ratio}_p20"), number(row, f"{self.ratio}_p80")


METHODS, ENGINE, ONNX, KERNELS = "Methods", "Streams of images", "ONNX files", "Kernels"
LAYOUTS = (
    Layout("methods", METHODS, ("model", "layer", "batch_size", "size"), over="plain"),
    Layout("cams", METHODS, ("method", "model", "layer", "batch_size", "size")),
    Layout("engine", ENGINE, ("model", "source", "batch_size"), "ours_over"),
    Layout("engine_gpu", ENGINE, ("model", "source", "batch_size"), "ours_over"),
    Layout("onnx_cost", ONNX, ("model", "layer", "head", "batch"), over="itself"),
    Layout("onnx_peers", ONNX, ("model", "batch"), over="plain"),
    Layout(
        "kernels", KERNELS, ("op", "layer", "n", "t", "k", "dtype", "layout"), "speedup_of_diffcam"
    ),
)


def comparisons(folder: Path) -> list[Comparison]:
    """All comparisons of the CSV files of a folder, file by file."""
    return [*chain.from_iterable(one.comparisons(_rows(folder, one.file)) for one in LAYOUTS)]


def kind(name: str) -> str:
    """What a row of that name is: `library`, `plain` or `own`."""
    if name.startswith("plain"):
        return PLAIN
    return OWN if name.startswith(OURS) or name in _PARTS else LIBRARY


def topics(found: Iterable[Comparison]) -> dict[str, list[Comparison]]:
    """Comparisons by their topic, in their order."""
    made: dict[str, list[Comparison]] = {}
    for one in found:
        made.setdefault(one.topic, []).append(one)
    return made


def _rows(folder: Path, file: str) -> list[dict[str, str]]:
    return read_rows(folder / f"{file}.csv")


def _variant(row: Row) -> str:
    """`GradCAM` of `torch-cam, GradCAM`."""
    return row["name"].partition(", ")[2]


def _library(row: Row) -> str:
    return row["name"].partition(", ")[0]


def _said(column: str, value: str) -> str:
    if value.isdigit():
        return f"{column.replace('_', ' ')} {value}"
    return value.partition(":")[2] or value
