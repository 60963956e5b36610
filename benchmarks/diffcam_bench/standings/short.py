"""The comparisons in few lines: for each topic and other side the worst case and the best."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low

from diffcam_bench.standings.comparison import (
    EVEN,
    FASTER,
    NO_SPREAD,
    OWN,
    PLAIN,
    SLOWER,
    Comparison,
    figure,
)
from diffcam_bench.standings.page import Table


@dataclass(frozen=True)
class Line:
    """All cases of a topic beside one other side, on the CPU or on one GPU.

    Attributes:
        topic: as in the comparisons.
        beside: the other side.
        hardware: `CPU`, or the GPU's name.
        cases: the comparisons, at least one.
    """

    topic: str
    beside: str
    hardware: str
    cases: Sequence[Comparison]

    @property
    def worst(self) -> Comparison:
        """The case in which ours does worst."""
        return min(self.cases, key=lambda one: one.ratio)

    @property
    def best(self) -> Comparison:
        """The case in which ours does best; of those without a spread only where none has one."""
        sure = [one for one in self.cases if one.verdict != NO_SPREAD]
        return max(sure or self.cases, key=lambda one: one.ratio)

    @property
    def middle(self) -> float:
        """The ratio of the middle case, of two the lower."""
        return median_low(one.ratio for one in self.cases)

    @property
    def verdicts(self) -> str:
        """How many cases are won, lost and neither."""
        counts = Counter(one.verdict for one in self.cases)
        said = [f"{counts[name]} {name}" for name in (FASTER, EVEN, SLOWER) if counts[name]]
        if counts[NO_SPREAD]:
            below = sum(one.ratio < 1 for one in self.cases if one.verdict == NO_SPREAD)
            said.append(
                f"{counts[NO_SPREAD]} {NO_SPREAD}" + (f" ({below} below 1)" if below else "")
            )
        return ", ".join(said)


def lines(found: Sequence[Comparison]) -> list[Line]:
    """In the order of the topics; in each, other libraries before the model without maps."""
    groups: dict[tuple[str, bool, str, str], list[Comparison]] = {}
    for one in found:
        if one.kind != OWN:
            key = (one.topic, one.kind == PLAIN, one.beside, one.hardware)
            groups.setdefault(key, []).append(one)
    order = [*dict.fromkeys(topic for topic, *_ in groups)]
    return [
        Line(topic, beside, hardware, cases)
        for (topic, _, beside, hardware), cases in sorted(
            groups.items(), key=lambda item: (order.index(item[0][0]), item[0][1])
        )
    ]


def machines(found: Sequence[Comparison]) -> str:
    """Processors and GPUs, each once."""
    return "; ".join(dict.fromkeys(one.where for one in found))


def short_table(found: Sequence[Comparison]) -> Table:
    """How many times as long the others take, and how many cases are won and lost."""
    return Table(
        ("", "beside", "on", "worst case (p20 - p80)", "middle", "best case (p20 - p80)", "cases"),
        [
            (
                one.topic,
                one.beside,
                one.hardware,
                one.worst.shown,
                figure(one.middle),
                one.best.shown,
                one.verdicts,
            )
            for one in lines(found)
        ],
        left=3,
    )
