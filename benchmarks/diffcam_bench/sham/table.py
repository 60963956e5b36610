"""The study's rows as Markdown, for `docs/robustness.md`."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean

from diffcam_bench.sham.fooling import FIXED
from diffcam_bench.sham.honest import CLEAN, CONTROL
from diffcam_bench.sham.looks import LOOKS
from diffcam_bench.sham.study import ARMS
from diffcam_bench.sham.verdict import standings

_SHOWN = LOOKS[:4]
Row = Mapping[str, object]


def markdown(rows: Sequence[Row]) -> str:
    """What was run, the maps in each arm, and the rule's standings; means over all its rows."""
    networks, seeds = (sorted({str(row[key]) for row in rows}) for key in ("network", "seed"))
    first = rows[0]
    clean = [row for row in rows if row["arm"] == CLEAN]
    runs = {(row["network"], row["seed"]) for row in rows}
    names = f"{', '.join(networks)}; seeds {', '.join(seeds)}"
    if first["honest_accuracy"]:
        right = f"{_mean(clean, 'honest_accuracy'):.2f} of {first['images']} test pictures right"
        said = f"{len(runs)} honest networks ({names}), {right}"
    else:
        # No seed changes what others trained.
        said = f"{len(networks)} networks ({names}), {first['images']} photographs without labels"
    lines = [
        f"{said}; {first['sizes']}. {first['machine']}, PyTorch {first['torch']}.",
        "",
        "| arm | weight of the hoax | decisions kept | "
        + " | ".join(_name(look) for look in _SHOWN)
        + " |",
        "| --- | --- | --- |" + " --- |" * len(_SHOWN),
    ]
    for arm in (CLEAN, CONTROL, *ARMS, *FIXED):
        found = [row for row in rows if row["arm"] == arm]
        if found:
            cells = (_cell(row for row in found if _look(row) == look) for look in _SHOWN)
            kept = _mean(found, "decisions_kept")
            weights = sorted({float(str(row["weight"])) for row in found})
            span = " to ".join(f"{w:g}" for w in dict.fromkeys((weights[0], weights[-1])))
            lines.append(f"| `{arm}` | {span} | {kept:.2f} | " + " | ".join(cells) + " |")
    lines += ["", "| contrast | like Grad-CAM when clean | worst arm | |"]
    lines.append("| --- | --- | --- | --- |")
    for number, one in enumerate(standings(rows)):
        said = "" if one.admitted else "too unlike Grad-CAM"
        said = "first by the rule" if number == 0 and one.admitted else said
        worst = f"{one.worst:.2f} ({one.arm})"
        lines.append(f"| `{one.contrast}` | {one.agreement:.2f} | {worst} | {said} |")
    return "\n".join(lines)


def _look(row: Row) -> tuple[str, str]:
    return str(row["method"]), str(row["contrast"])


def _name(look: tuple[str, str]) -> str:
    return "Grad-CAM" if look[1] == "none" else f"`{look[1]}`"


def _cell(rows: Iterable[Row]) -> str:
    found = list(rows)
    return f"{_mean(found, 'pearson'):.2f} / {_mean(found, 'hoax'):.2f}"


def _mean(rows: Iterable[Row], column: str) -> float:
    return mean(float(str(row[column])) for row in rows)
