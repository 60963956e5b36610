"""What rows that compare no speeds say, in a line each: coverage, exactness, others' tests."""

from collections.abc import Callable, Sequence
from pathlib import Path

from diffcam_bench.rows import read_rows
from diffcam_bench.standings.comparison import Row


def facts(folder: Path) -> list[str]:
    """A line for each CSV file that has rows."""
    return [
        line
        for file, said in _SAID.items()
        if (rows := read_rows(folder / f"{file}.csv"))
        for line in said(rows)
    ]


def _families(rows: Sequence[Row]) -> list[str]:
    explained = [row for row in rows if row["supported"] == "yes"]
    closed = sum(row["head"] == "closed form" for row in explained)
    exact = sum(float(row["error"]) <= 1e-5 for row in explained if row["error"])
    return [
        f"**Networks**: {len(explained)} of {len(rows)}, one of every family of timm and "
        f"torchvision, are explained, {closed} in closed form; {exact} agree with float64 to 1e-5 "
        f"or better, and {len(rows) - len(explained)} are refused or were not checked."
    ]


def _parity(rows: Sequence[Row]) -> list[str]:
    checked = [row for row in rows if row["error"]]
    wrong = [row for row in checked if row["reason"]]
    worst = max((float(row["error"]) for row in checked if not row["reason"]), default=0.0)
    skipped = sum(not row["error"] and "not run" in row["reason"] for row in rows)
    return [
        f"**ONNX files**: of {len(rows)}, {len(checked)} were held against float64, "
        f"{len(checked) - len(wrong)} agree to {worst:.1e} or better, {len(wrong)} do not (up to "
        f"{max((float(row['error']) for row in wrong), default=0.0):.1e}); "
        f"{len(rows) - len(checked) - skipped} were refused, {skipped} not run."
    ]


def _suites(rows: Sequence[Row]) -> list[str]:
    made = []
    for library in dict.fromkeys(row["library"] for row in rows):
        passed, failed, absent = (
            sum(int(row[key]) for row in rows if row["library"] == library)
            for key in ("passed", "failed", "not_offered")
        )
        made.append(
            f"**Tests of {library}** on the compat layer: {passed} pass, {failed} fail, {absent} "
            "ask for what is not offered."
        )
    return made


def _endurance(rows: Sequence[Row]) -> list[str]:
    first, last = rows[0], rows[-1]
    rates = [float(row["images_per_s"]) for row in rows[1:] or rows]
    return [
        f"**One long run** of {last['explained']} files: {min(rates)} to {max(rates)} images/s "
        f"after the first part, and {first['memory_mib']} MiB of memory at its end, "
        f"{last['memory_mib']} MiB at that of the last."
    ]


def _aot(rows: Sequence[Row]) -> list[str]:
    architectures = [*dict.fromkeys(row["sm"] for row in rows)]
    spilled = (
        f"{sum(row['sm'] == sm and row['spills'] != '0' for row in rows)} on sm_{sm}"
        for sm in architectures
    )
    return [
        f"**Compiled kernels**: {len(rows)} for {len(architectures)} architectures; registers are "
        f"spilled by {', '.join(spilled)}."
    ]


_SAID: dict[str, Callable[[Sequence[Row]], list[str]]] = {
    "families": _families,
    "onnx_parity": _parity,
    "peer_suites": _suites,
    "endurance": _endurance,
    "aot": _aot,
}
