"""The studies of fidelity and of fooled maps, in short."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from diffcam_bench.fidelity_entries import BASELINE, CONTROLS
from diffcam_bench.fidelity_report import by_entry, verdict
from diffcam_bench.rows import Row, read_rows
from diffcam_bench.sham.verdict import standings
from diffcam_bench.standings.page import Part, Table


def fidelity(folder: Path) -> list[Part]:
    """For each method the metrics by which it is better than Grad-CAM, and worse."""
    rows = read_rows(folder / "fidelity.csv")
    parts: list[Part] = []
    for model in dict.fromkeys(row["model"] for row in rows):
        found = by_entry(rows, model)
        lines = [(_name(entry), *sides(entry_rows)) for entry, entry_rows in found.items()]
        parts += [
            f"{model}, beside `{BASELINE}` on the same images: metrics in which the 95 % interval "
            "of the paired difference excludes 0. Methods in brackets do not look at the network.",
            Table(("method", "better", "worse"), [x for x in lines if x[0] != f"`{BASELINE}`"], 3),
        ]
    return parts


def sides(metrics: Mapping[str, Row]) -> tuple[str, str]:
    """The metrics by which a method wins, and those by which it loses, as text."""
    told = {metric: verdict(row) for metric, row in metrics.items() if _counts(metric)}
    won, lost = (
        [metric.replace("_", " ") for metric, side in told.items() if side == wanted]
        for wanted in (1, -1)
    )
    return _counted(won), _counted(lost)


def sham(folder: Path) -> list[Part]:
    """How like the honest map each contrast's stays, arm by arm, and the rule's verdict."""
    rows = [
        row
        for row in read_rows(folder / "sham.csv")
        if row["method"] in ("grad_cam", "diff_grad_cam")
    ]
    if not rows:
        return []
    cells: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        look = "Grad-CAM" if row["method"] == "grad_cam" else f"`{row['contrast']}`"
        cells[row["arm"]][look].append(float(row["pearson"]))
    looks = [*dict.fromkeys(look for arm in cells.values() for look in arm)]
    table = [
        (f"`{arm}`", *(f"{mean(found[look]):.2f}" if found[look] else "-" for look in looks))
        for arm, found in cells.items()
    ]
    ruled = _ruled(rows)
    return [
        "How like the honest network's map the map of a network is that was trained to show "
        "another (mean Pearson correlation over networks, seeds and classes attacked).",
        Table(("arm", *looks), table),
        *([f"In each contrast's worst arm and network: {ruled}"] if ruled else []),
    ]


def _ruled(rows: Sequence[Row]) -> str:
    """The rule's standings; nothing where the study is not far enough for it."""
    try:
        found = standings(rows)
    except ValueError:
        return ""
    return ", ".join(
        f"`{one.contrast}` {one.worst:.2f}" + ("" if one.admitted else " (too unlike Grad-CAM)")
        for one in found
    )


def in_a_line(folder: Path) -> list[str]:
    """Both studies, for the README."""
    rows = read_rows(folder / "fidelity.csv")
    made = []
    for model in dict.fromkeys(row["model"] for row in rows):
        if metrics := by_entry(rows, model).get("diff_grad_cam"):
            better, worse = sides(metrics)
            made.append(
                f"**Fidelity** of `diff_grad_cam` beside Grad-CAM, {model}: better in {better}; "
                f"worse in {worse} ([docs/fidelity.md](docs/fidelity.md))."
            )
    said = [part for part in sham(folder)[2:] if isinstance(part, str)]
    return made + [
        f"**Fooled networks**, likeness to the honest map, 1 being the same. {text} "
        "([docs/robustness.md](docs/robustness.md))."
        for text in said
    ]


def _counted(names: Sequence[str]) -> str:
    return f"{len(names)}: {', '.join(names)}" if names else "0"


def _name(entry: str) -> str:
    return f"({entry})" if entry in CONTROLS else f"`{entry}`"


def _counts(metric: str) -> bool:
    # A randomised network's map is no better for being like or unlike Grad-CAM's.
    return not metric.startswith("randomised") and metric != "adcc_pooled"
