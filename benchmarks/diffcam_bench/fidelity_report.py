"""The rows of the fidelity study as a table, as Markdown and as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffcam_bench.fidelity_entries import BASELINE, CONTROLS, SLOW, Entry
from diffcam_bench.fidelity_metrics import BETTER
from diffcam_bench.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = {
    "average_drop": "drop ↓",
    "increase": "increase ↑",
    "coherency": "coherency ↑",
    "complexity": "complexity ↓",
    "adcc": "ADCC ↑",
    "insertion": "insertion ↑",
    "deletion": "deletion ↓",
    "road": "ROAD ↑",
    "pointing": "pointing ↑",
    "energy": "energy ↑",
}
_RANDOMISED = {
    "randomised_head": "head",
    "randomised_half": "lower half kept",
    "randomised_all": "all",
}
_PANELS = ("adcc", "insertion", "deletion", "road", "energy", "randomised_all")


def by_entry(rows: Sequence[Row], model: str) -> dict[str, dict[str, Row]]:
    """The rows of a model, by entry and metric, in the order in which they were measured."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["model"] == model:
            name = Entry(str(row["method"]), str(row["contrast"])).name
            found.setdefault(name, {})[str(row["metric"])] = row
    return found


def markdown(rows: Sequence[Row], model: str, *, randomised: bool = False) -> str:
    """A table of means; bold where the paired interval of the difference to Grad-CAM excludes 0
    and the metric calls it better, italic where it calls it worse.
    """
    columns = _RANDOMISED if randomised else _COLUMNS
    found = by_entry(rows, model)
    columns = {m: c for m, c in columns.items() if any(m in metrics for metrics in found.values())}
    lines = [
        f"| method | {' | '.join(columns.values())} |",
        f"| --- |{' --- |' * len(columns)}",
    ]
    for name, metrics in found.items():
        if any(metric in metrics for metric in columns):
            cells = [_cell(metrics.get(metric), not randomised) for metric in columns]
            lines.append(f"| {_titled(name, metrics)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(row: Row) -> int:
    """1 where the row is better than Grad-CAM on the same images, -1 where it is worse, 0 where the
    interval of the difference holds 0.
    """
    low, high = float(str(row["over_low"])), float(str(row["over_high"]))
    side = 1 if low > 0 else -1 if high < 0 else 0
    return side * BETTER[str(row["metric"])]


def _cell(row: Row | None, marked: bool) -> str:
    if row is None:
        return "-"
    value = f"{float(str(row['mean'])):.3f}"
    mark = {1: "**", -1: "*", 0: ""}[verdict(row) if marked else 0]
    return f"{mark}{value}{mark}"


def _titled(name: str, metrics: dict[str, Row]) -> str:
    one = next(iter(metrics.values()))
    title = f"({name})" if one["method"] in CONTROLS else f"`{name}`"
    if one["method"] in SLOW:
        title += f", {one['images']} images"
    same = str(one["maps_as"])
    return f"{title}, maps of `{same}`" if same else title


def table(rows: Sequence[Row]) -> str:
    """For a terminal: each row with its intervals."""
    lines = [f"{'method':26} {'metric':16} {'images':>6}  mean   [95 % interval]   over grad_cam"]
    for row in rows:
        name = Entry(str(row["method"]), str(row["contrast"])).name
        mean, low, high, over, over_low, over_high = (
            float(str(row[key]))
            for key in ("mean", "low", "high", "over_grad_cam", "over_low", "over_high")
        )
        same = f"  maps of {row['maps_as']}" if row["maps_as"] else ""
        lines.append(
            f"{name:26} {row['metric']!s:16} {row['images']!s:>6} {mean:6.3f} "
            f"[{low:6.3f}, {high:6.3f}]  {over:+.3f} [{over_low:+.3f}, {over_high:+.3f}]{same}"
        )
    return "\n".join(lines)


def picture(rows: Sequence[Row], model: str, path: Path) -> None:
    """Draws means and intervals, metric by metric, and writes a PNG."""
    from matplotlib.figure import Figure

    # Grad-CAM's maps under another name are one point.
    found = {
        name: metrics
        for name, metrics in by_entry(rows, model).items()
        if not any(row["maps_as"] for row in metrics.values())
    }
    panels = [m for m in _PANELS if any(m in metrics for metrics in found.values())]
    names = [*found]
    size = (2.6 * len(panels) + 1.6, 0.3 * len(names) + 1.4)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    titles = {**_COLUMNS, "randomised_all": "like random weights' ↓"}
    for axis, metric in zip(axes[0], panels, strict=True):
        _panel(axis, metric, found)
        axis.set_title(titles[metric], fontsize=10)
    axes[0][0].set_yticks(range(len(names)), names, fontsize=9)
    axes[0][0].invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _panel(axis: "Axes", metric: str, found: dict[str, dict[str, Row]]) -> None:
    for place, (name, metrics) in enumerate(found.items()):
        if metric not in metrics:
            continue
        row = metrics[metric]
        mean, low, high = (float(str(row[key])) for key in ("mean", "low", "high"))
        control = row["method"] in CONTROLS
        colour = "0.6" if control else "C1" if name.startswith("diff_") else "C0"
        hollow = "white" if row["method"] in SLOW else colour
        axis.plot([low, high], [place, place], color=colour, linewidth=1.5)
        axis.plot([mean], [place], "o", color=colour, markerfacecolor=hollow, markersize=5)
        if name == BASELINE:
            axis.axvline(mean, color="0.8", linewidth=0.8, zorder=0)
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
