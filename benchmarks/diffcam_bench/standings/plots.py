"""Pictures of the rows: ratios with their spread, kernels under the roof of a copy, and how the cost
grows.
"""

import hashlib
import io
from collections.abc import Sequence
from math import ceil
from typing import TYPE_CHECKING

from diffcam_bench.standings.comparison import OWN, PLAIN, Comparison, Row, number
from diffcam_bench.standings.page import Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = "os^vDP*Xhd<>p"
_DIGEST = "diffcam-rows"


def bars(found: Sequence[Comparison], name: str, says: str) -> Picture | None:
    """A bar with its spread for each comparison with others, one colour for each of them."""
    from matplotlib.figure import Figure

    shown = [one for one in found if one.kind != OWN]
    if not shown:
        return None
    colours = {other: f"C{i % 10}" for i, other in enumerate(dict.fromkeys(map(_beside, shown)))}
    figure = Figure(figsize=(9, 0.2 * len(shown) + 1.3), layout="constrained")
    axis = figure.subplots()
    for place, one in enumerate(shown):
        axis.barh(place, one.ratio - 1, left=1, height=0.7, color=colours[_beside(one)])
        if one.p20 is not None and one.p80 is not None:
            axis.plot([one.p20, one.p80], [place, place], color="0.15", linewidth=1.3)
    _bar_axis(axis, shown)
    handles = [axis.barh(0, 0, left=1, color=colour, label=o) for o, colour in colours.items()]
    axis.legend(handles=handles, fontsize=7, loc="best", frameon=False)
    return Picture(name, says, _png(figure, shown))


def _bar_axis(axis: "Axes", shown: Sequence[Comparison]) -> None:
    axis.set_xscale("log")
    axis.axvline(1, color="0.4", linewidth=0.8)
    axis.set_yticks(range(len(shown)), [one.case for one in shown], fontsize=6.5)
    axis.set_ylim(len(shown) - 0.4, -0.6)
    axis.set_xlabel("times as long as ours; line: 20th to 80th percentile", fontsize=8)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.xaxis.set_minor_formatter(lambda value, _: "")
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def roofline(rows: Sequence[Row], name: str, says: str) -> Picture | None:
    """Bandwidth of our kernels against the bytes that they must move, one panel for each GPU."""
    from matplotlib.figure import Figure

    ours = [row for row in rows if row["name"] == "diffcam" and row.get("gb_per_s")]
    gpus = [*dict.fromkeys(row["gpu"] for row in ours)]
    if not gpus:
        return None
    operators = [*dict.fromkeys(row["op"] for row in ours)]
    figure = Figure(figsize=(8, 4.6 * len(gpus)), layout="constrained")
    axes = figure.subplots(len(gpus), 1, squeeze=False)
    for axis, gpu in zip(axes[:, 0], gpus, strict=True):
        mine = [row for row in ours if row["gpu"] == gpu]
        _roof(axis, mine, operators)
        axis.set_title(f"{gpu}: each kernel and case; the line is a plain copy", fontsize=9)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    return Picture(name, says, _png(figure, ours))


def _roof(axis: "Axes", rows: Sequence[Row], operators: Sequence[str]) -> None:
    for place, operator in enumerate(operators):
        mine = [row for row in rows if row["op"] == operator]
        rates = [float(row["gb_per_s"]) for row in mine]
        # GB/s times ms is MB.
        moved = [rate * float(row["ms"]) for rate, row in zip(rates, mine, strict=True)]
        marker = _MARKERS[place % len(_MARKERS)]
        axis.plot(
            moved, rates, marker, color=f"C{place % 10}", markersize=4.5, alpha=0.8, label=operator
        )
    for copy in {number(row, "copy_gb_per_s") for row in rows} - {None}:
        axis.axhline(copy or 0, color="0.3", linewidth=1)
    axis.set(xscale="log", yscale="log")
    axis.set_xlabel("MB that must be moved", fontsize=8)
    axis.set_ylabel("GB/s", fontsize=8)
    axis.grid(color="0.92", linewidth=0.6)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def growth(rows: Sequence[Row], name: str, says: str) -> Picture | None:
    """Cost over a plain forward pass, one panel for each series, one line for each place."""
    from matplotlib.figure import Figure

    series = [*dict.fromkeys(row["series"] for row in rows)]
    if not series:
        return None
    figure = Figure(
        figsize=(9, 3.2 * ceil(len(series) / 3)), layout="constrained"
    )
    axes = figure.subplots(ceil(len(series) / 3), min(3, len(series)), squeeze=False, sharey=True)
    for axis, one in zip(axes.flat, series, strict=False):
        _line(axis, [row for row in rows if row["series"] == one])
        axis.set_xlabel(one, fontsize=9)
    for axis in axes[:, 0]:
        axis.set_ylabel("over a plain forward pass", fontsize=8)
    for axis in axes.flat[len(series) :]:
        axis.set_axis_off()
    axes[0][0].legend(fontsize=6.5, frameon=False)
    return Picture(name, says, _png(figure, rows))


def _line(axis: "Axes", rows: Sequence[Row]) -> None:
    values = [*dict.fromkeys(row["value"] for row in rows)]
    for label in dict.fromkeys(map(place, rows)):
        mine = [row for row in rows if place(row) == label]
        at = [values.index(row["value"]) for row in mine]
        ratios, low, high = (
            [float(row[key]) for row in mine] for key in ("ratio", "ratio_p20", "ratio_p80")
        )
        below = [r - lo for r, lo in zip(ratios, low, strict=True)]
        above = [hi - r for r, hi in zip(ratios, high, strict=True)]
        axis.errorbar(
            at, ratios, yerr=[below, above], marker="o", markersize=4, linewidth=1.2, label=label
        )
    axis.axhline(1, color="0.6", linewidth=0.8)
    axis.set_xticks(range(len(values)), values, fontsize=8)
    axis.tick_params(axis="y", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def place(row: Row) -> str:
    """The network, batch and hardware of a row of `scaling.csv`."""
    where = row.get("gpu") or row.get("machine") or ""
    return f"{row['model'].partition(':')[2]}, batch {row['batch_size']}, {where}"


def digest(data: object) -> str:
    """Short hash of what a picture shows."""
    return hashlib.sha256(repr(data).encode()).hexdigest()[:16]


def drawn_from(png: bytes) -> str:
    """The hash that a picture carries; empty where it carries none."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as picture:
        return str(getattr(picture, "text", {}).get(_DIGEST, ""))


def _png(figure: "Figure", data: object) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, dpi=110, format="png", metadata={_DIGEST: digest(data), "Software": None})
    return file.getvalue()


def _beside(one: Comparison) -> str:
    return "the model without maps" if one.kind == PLAIN else one.other
