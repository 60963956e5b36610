"""Pictures of the rows: ratios with spread, kernels under the roof of a copy, growing cost."""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

from diffcam_bench.standings.comparison import Row, number
from diffcam_bench.standings.page import Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = "os^vDP*Xhd<>p"
_DIGEST = "diffcam-rows"
# Beyond that a bar would leave no room for the others.
_LONGEST = 20.0


@dataclass(frozen=True)
class Bar:
    """A ratio with its spread; None where it has none."""

    label: str
    beside: str
    ratio: float
    low: float | None
    high: float | None


def bars(shown: Sequence[Bar], name: str, says: str, spread: str) -> Picture:
    """Ratios with their spread, one colour for each other side; long ones are cut and say so."""
    from matplotlib.figure import Figure

    others = [*dict.fromkeys(one.beside for one in shown)]
    figure = Figure(figsize=(9, 0.2 * len(shown) + 1.3), layout="constrained")
    axis = figure.subplots()
    for place, one in enumerate(shown):
        colour = f"C{others.index(one.beside) % 10}"
        end = min(one.ratio, _LONGEST)
        axis.barh(place, end - 1, left=1, height=0.7, color=colour, alpha=0.8)
        axis.plot(end, place, "o" if one.ratio == end else ">", color=colour, markersize=3.5)
        if one.ratio > end:
            axis.text(end * 1.05, place, f"{one.ratio:.0f}", fontsize=7, va="center")
        if one.low is not None and one.high is not None:
            ends = [min(one.low, _LONGEST), min(one.high, _LONGEST)]
            axis.plot(ends, [place, place], color="0.15", linewidth=1.2)
    _bar_axis(axis, shown, spread)
    for order, other in enumerate(others):
        axis.barh(0, 0, left=1, color=f"C{order % 10}", alpha=0.8, label=other)
    figure.legend(fontsize=7, loc="outside right upper", frameon=False)
    return Picture(name, says, _png(figure, (shown, spread)))


def _bar_axis(axis: "Axes", shown: Sequence[Bar], spread: str) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    labels = [one.label for one in shown]
    once = ["" if i and labels[i - 1] == label else label for i, label in enumerate(labels)]
    axis.set_xscale("log")
    axis.axvline(1, color="0.4", linewidth=0.8)
    axis.set_yticks(range(len(shown)), once, fontsize=6.5)
    axis.set_ylim(len(shown) - 0.4, -0.6)
    axis.set_xlabel(f"times as long as ours; dark line: {spread}", fontsize=8)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
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
    figure = Figure(figsize=(9, 3.2 * ceil(len(series) / 3)), layout="constrained")
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
    # Layers stand as they were measured, from the last to the first.
    values = sorted(values, key=float) if all(v.isdigit() for v in values) else values
    for label in dict.fromkeys(map(place, rows)):
        mine = [row for row in rows if place(row) == label]
        mine.sort(key=lambda row: values.index(row["value"]))
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
