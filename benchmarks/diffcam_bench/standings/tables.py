"""Comparisons as tables: case by case, or group by group where there are many."""

from collections.abc import Sequence
from itertools import groupby

from diffcam_bench.standings.comparison import OWN, Comparison, figure
from diffcam_bench.standings.page import Picture, Table
from diffcam_bench.standings.plots import Bar, bars
from diffcam_bench.standings.short import Line

# Beyond that many cases a table is no longer read.
MANY = 60


def topic_table(found: Sequence[Comparison]) -> Table:
    """The comparisons of one topic."""
    rivals = [one for one in found if one.kind != OWN]
    return _group_table(rivals) if len(rivals) > MANY else case_table(rivals)


def case_table(found: Sequence[Comparison]) -> Table:
    """A line for each comparison, with its verdict."""
    return Table(
        ("case", "ours", "beside", "on", "times as long (p20 - p80)", "ours is"),
        [(one.case, one.ours, one.beside, one.where, one.shown, one.verdict) for one in found],
        left=4,
    )


def lost_table(found: Sequence[Comparison]) -> Table:
    """Every case that is lost, whatever its topic."""
    return Table(
        ("", "case", "beside", "on", "times as long (p20 - p80)", "ours is"),
        [
            (one.topic, one.case, one.beside, one.where, one.shown, one.verdict)
            for one in found
            if one.lost
        ],
        left=4,
    )


def more_table(found: Sequence[Comparison]) -> Table:
    """Ours with more to do, and parts of it: how many times as long they take as ours alone."""
    return Table(
        ("", "case", "ours", "on", "times as long (p20 - p80)"),
        [
            (one.topic, one.case, one.other, one.where, one.shown)
            for one in found
            if one.kind == OWN
        ],
        left=4,
    )


def sources_table(found: Sequence[Comparison]) -> Table:
    """Machines, versions and commits, one line for each run that the rows tell apart."""
    seen: dict[tuple[str, ...], None] = {}
    for one in found:
        said = dict(one.provenance)
        where = ", ".join([*filter(None, (said.pop("gpu", ""), said.pop("machine", "")))])
        commit, date = said.pop("commit", ""), said.pop("date", "")
        versions = ", ".join(f"{name} {value}" for name, value in said.items())
        seen.setdefault((f"{one.file}.csv", where, versions, commit, date))
    return Table(("rows", "machine", "versions", "commit", "date"), [*seen], left=5)


def by_group(found: Sequence[Comparison]) -> list[tuple[str, Line]]:
    """Many comparisons, told together by the first word of their case."""

    def key(one: Comparison) -> tuple[str, str, str]:
        return one.group, one.beside, one.where

    return [
        (group, Line("", other, where, [*cases]))
        for (group, other, where), cases in groupby(sorted(found, key=key), key)
    ]


def _group_table(found: Sequence[Comparison]) -> Table:
    rows = [
        (
            f"`{group}`",
            line.beside,
            line.hardware,
            line.worst.shown,
            figure(line.middle),
            line.best.shown,
            line.verdicts,
        )
        for group, line in by_group(found)
    ]
    return Table(
        ("", "beside", "on", "worst case (p20 - p80)", "middle", "best case (p20 - p80)", "cases"),
        rows,
        left=3,
    )


def topic_bars(found: Sequence[Comparison], name: str, says: str) -> Picture:
    """The same as a picture."""
    rivals = [one for one in found if one.kind != OWN]
    if len(rivals) <= MANY:
        each = [Bar(one.case, one.beside, one.ratio, one.p20, one.p80) for one in rivals]
        return bars(each, name, says, "20th to 80th percentile of the rounds")
    grouped = [
        Bar(group, line.beside, line.middle, line.worst.ratio, line.best.ratio)
        for group, line in by_group(rivals)
    ]
    return bars(grouped, name, says, "from the worst case to the best")
