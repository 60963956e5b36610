"""The page of all standings, and its short form for the README."""

import re
from collections.abc import Sequence
from pathlib import Path

from diffcam_bench.rows import read_rows
from diffcam_bench.standings import plots, studies
from diffcam_bench.standings.comparison import OWN, Comparison, figure
from diffcam_bench.standings.facts import facts
from diffcam_bench.standings.page import Page, Part, Picture, Section, Table
from diffcam_bench.standings.reading import KERNELS, comparisons, topics
from diffcam_bench.standings.short import machines, short_table
from diffcam_bench.standings.tables import (
    lost_table,
    more_table,
    sources_table,
    topic_bars,
    topic_table,
)

_LEAD = (
    "Made by `diffcam bench all --report` from the rows in `benchmarks/results`, and from nothing "
    "else: do not edit. A ratio says how many times as long the other side takes; above 1 ours is "
    "faster. It is the median of ratios of rounds in which all take turns, beside their 20th and "
    "80th percentile: **faster** where the 20th is above 1, **slower** where the 80th is below 1, "
    "**even** between. Where a row has no such percentiles (kernels, whose medians are divided; "
    "one round alone; a library whose rounds refer to another baseline) it says **no spread**, and "
    "no verdict is given. The model without maps does less than ours: nobody is faster than that."
)
_ROOF = "Bandwidth of each kernel against the bytes that it must move, under that of a plain copy."
_BOUND = (
    "A kernel cannot be faster than a copy of what it must move, as long as that is not in the "
    "cache; small cases are bound by the launch."
)
_BEST = (
    "Of all cases the one in which ours does worst, the one in the middle, and the one in which it "
    "does best among those that have a spread, where any has."
)
_COMMANDS = (
    "- `diffcam bench methods --write`, `cams --write`, `cams --slow --write`: methods\n"
    "- `diffcam bench engine --write`, `endurance --write`: streams of images\n"
    "- `diffcam bench onnx --write`, `onnx-cost --write`, `onnx-peers --write`: ONNX files\n"
    "- `diffcam bench scaling --write`: how the cost grows\n"
    "- `diffcam bench kernels --write`, on a GPU; `aot --write`, on any machine: kernels\n"
    "- `diffcam bench families --write`, `peer-suites --write`: networks, other libraries' tests\n"
    "- `diffcam bench fidelity --write`, `sham --write`: the studies"
)


def page(folder: Path) -> Page:
    """Everything that the CSV files of a folder say."""
    found = comparisons(folder)
    sections = [
        Section("In short", [_BEST, short_table(found)] if found else []),
        Section("Where ours is not faster", _lost(found) if found else []),
        *(Section(topic, _topic(topic, cases, folder)) for topic, cases in topics(found).items()),
        Section("More than one map of the last layer", _more(found, folder)),
        Section("Networks, files, tests", _listed(facts(folder))),
        Section("Fidelity", studies.fidelity(folder)),
        Section("Fooled networks", studies.sham(folder)),
        Section("Machines and versions", [sources_table(found)] if found else []),
    ]
    filled = [one for one in sections if one.parts]
    return Page("Standings", _LEAD, filled and [*filled, Section("Measured by", [_COMMANDS])])


def short_form(folder: Path) -> str:
    """The block of the README."""
    found = comparisons(folder)
    measured = f"**Measured on** {machines(found)}. Versions are on the page, with every case."
    said = [*facts(folder)[:2], *studies.in_a_line(folder), measured]
    return "\n\n".join([short_table(found).markdown(), *_listed(said)])


def _lost(found: Sequence[Comparison]) -> list[Part]:
    table = lost_table(found)
    compared = [one for one in found if one.kind != OWN]
    said = (
        f"{len(table.rows)} of {len(compared)} comparisons: slower by their spread, or below 1 "
        "without one."
    )
    return [said, table] if table.rows else [f"Nowhere, in {len(compared)} comparisons."]


def _topic(topic: str, cases: Sequence[Comparison], folder: Path) -> list[Part]:
    """A picture and a table for each piece of hardware."""
    parts: list[Part] = []
    if topic == KERNELS:
        picture = plots.roofline(read_rows(folder / "kernels.csv"), "standings-roof", _ROOF)
        parts += [picture, _BOUND] if picture else []
    for hardware in dict.fromkeys(one.hardware for one in cases):
        mine = [one for one in cases if one.hardware == hardware and one.kind != OWN]
        if mine:
            name = _slug("standings", topic.split()[0], hardware)
            says = f"{topic}, {hardware}: how many times as long others take."
            parts += [topic_bars(mine, name, says), topic_table(mine)]
    return parts


def _slug(*words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower()).strip("-")


def _more(found: Sequence[Comparison], folder: Path) -> list[Part]:
    rows = read_rows(folder / "scaling.csv")
    said = "Cost over a plain forward pass, with spread, as targets, layers and images grow."
    picture = plots.growth(rows, "standings-scaling", said)
    parts: list[Part] = [picture, _growth_table(rows)] if picture else []
    more = more_table(found)
    told = "Beside one map of the last layer by ours, in the same rounds:"
    return [*parts, told, more] if more.rows else parts


def _growth_table(rows: Sequence[dict[str, str]]) -> Table:
    return Table(
        ("", "", "how", "on", "over a plain forward (p20 - p80)"),
        [
            (
                row["series"],
                row["value"],
                row.get("head") or "",
                plots.place(row),
                "{} ({} - {})".format(
                    *(figure(float(row[key])) for key in ("ratio", "ratio_p20", "ratio_p80"))
                ),
            )
            for row in rows
        ],
        left=4,
    )


def _listed(lines: Sequence[str]) -> list[str]:
    return ["\n".join(f"- {line}" for line in lines)] if lines else []


def stale_pictures(made: Sequence[Picture], folder: Path) -> list[Path]:
    """Pictures of a folder that are missing, or were drawn from other rows."""
    paths = [(folder / f"{one.name}.png", one) for one in made]
    return [
        path
        for path, one in paths
        if not path.exists() or plots.drawn_from(path.read_bytes()) != plots.drawn_from(one.png)
    ]
