"""One comparison of ours with something else, as a committed row has it."""

from collections.abc import Mapping
from dataclasses import dataclass

Row = Mapping[str, str]

FASTER, EVEN, SLOWER, NO_SPREAD = "faster", "even", "slower", "no spread"
# What the other side is: another library or way, the model without maps, or ours with more to do.
LIBRARY, PLAIN, OWN = "library", "plain", "own"


@dataclass(frozen=True)
class Comparison:
    """Ours beside something else on one case.

    Attributes:
        topic: what is compared, the heading that it stands under.
        file: the CSV file.
        case: what ran: model, layer, batch, method, as far as the row says.
        group: the first word of the case, by which many cases are told together.
        ours: which of ours.
        other: what it is compared with.
        kind: `library`, `plain` (the model without maps) or `own` (ours with more to do).
        ratio: how many times as long the other took; above 1 ours is faster.
        p20: 20th percentile of the rounds' own ratios; None where the row has none.
        p80: 80th percentile of these.
        where: the processor or GPU.
        gpu: whether it is one.
        provenance: machine, versions, commit and date, as in the row.
    """

    topic: str
    file: str
    case: str
    group: str
    ours: str
    other: str
    kind: str
    ratio: float
    p20: float | None
    p80: float | None
    where: str
    gpu: bool
    provenance: Mapping[str, str]

    @property
    def verdict(self) -> str:
        """`faster` or `slower` where at least four of five rounds agree, else `even`; without a
        spread nothing is said.
        """
        if self.p20 is None or self.p80 is None:
            return NO_SPREAD
        return FASTER if self.p20 > 1 else SLOWER if self.p80 < 1 else EVEN

    @property
    def lost(self) -> bool:
        """Slower than others by its spread, or, where there is none, by its ratio."""
        below = self.verdict == SLOWER or (self.verdict == NO_SPREAD and self.ratio < 1)
        return self.kind != OWN and below

    @property
    def spread(self) -> str:
        """The 20th and 80th percentile as text; empty where there are none."""
        if self.p20 is None or self.p80 is None:
            return ""
        return f"{figure(self.p20)} - {figure(self.p80)}"

    @property
    def shown(self) -> str:
        """The ratio, with its spread where it has one."""
        one = figure(self.ratio)
        return one if self.verdict == NO_SPREAD else f"{one} ({self.spread})"

    @property
    def beside(self) -> str:
        """The other side in words."""
        return "the model without maps" if self.kind == PLAIN else self.other

    @property
    def hardware(self) -> str:
        """`CPU`, or the GPU."""
        return self.where if self.gpu else "CPU"


def figure(value: float) -> str:
    """A ratio as text, of three digits or so.

    Example:
        >>> figure(0.914), figure(13.83), figure(1740.0)
        ('0.91', '13.8', '1740')
    """
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def number(row: Row, column: str) -> float | None:
    """A value of a row; None where the column or the value is missing.

    Raises:
        ValueError: it is no number.
    """
    text = row.get(column) or ""
    return float(text) if text else None


def hardware(row: Row) -> tuple[str, bool]:
    """The processor or GPU that a row was measured on, and whether it is a GPU."""
    device = row.get("device") or "cpu"
    gpu = row.get("gpu") or ("" if device == "cpu" else device)
    if gpu:
        return gpu, True
    threads = row.get("threads") or ""
    return ", ".join(
        part for part in (row.get("machine") or "", threads and f"{threads} threads") if part
    ), False


def provenance(row: Row) -> dict[str, str]:
    """The columns that say where a row comes from: those from `machine` on, and the GPU."""
    columns = list(row)
    start = columns.index("machine") if "machine" in columns else len(columns)
    found = {key: row[key] for key in columns[start:] if row[key]}
    return ({"gpu": row["gpu"]} if row.get("gpu") else {}) | found
