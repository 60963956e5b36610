"""Figures in documents, and whether a committed row has them.

A figure is a decimal, a power of ten or a number with a unit, outside of code, links and blocks
that are made from rows. Its paragraph (what stands between empty lines, a table too) names the CSV
file that has it, in a link, in the text or in a comment; or a comment says why it needs none:

    <!-- figures: 0.60, 110 kB: assumed for the example -->
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from diffcam_bench.blocks import without_blocks

_NUMBER = r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?"
_UNIT = (
    r"(?:%|x(?! ?\d)|ms|us|s|seconds|minutes|hours|images/s|bytes|times"
    r"|[kKMGT]B|[KMG]iB|[MG]B/s)(?![\w/])"
)
_FIGURE = re.compile(
    rf"(?<![\w.,/-])(?:(?P<low>-?{_NUMBER}) (?:to|-|and) )?(?P<number>-?{_NUMBER})"
    rf"(?: ?(?P<unit>{_UNIT}))?"
    r"(?![\w]|[.,-]\w)"
)
_EXEMPT = re.compile(r"figures: (?P<list>[^:]*): (?P<why>.+)", re.DOTALL)
_COMMENT = re.compile(r"<!--(.*?)-->", re.DOTALL)
_NO_FIGURES = (
    r"^```.*?^```",
    r"`[^`\n]+`",
    r"\]\([^)]*\)",
    r"https?://\S+",
    r"arXiv\s+[\d.]+",
    # versions
    r"(?:Python|PyTorch|Triton|Runtime)\s+\d+(?:\.\d+)+",
    r"\d+\.\d+\.\d+",
)


@dataclass(frozen=True)
class Paragraph:
    """Text between empty lines, without what cannot hold figures."""

    line: int
    text: str
    comments: tuple[str, ...]
    whole: str

    def sources(self) -> set[str]:
        """The CSV files that it names."""
        return {*re.findall(r"\b(\w+)\.csv\b", self.whole)}

    def exempt(self) -> dict[str, str]:
        """Figure -> why no row has it."""
        found = (_EXEMPT.search(comment) for comment in self.comments)
        return {
            figure.strip(): match["why"].strip()
            for match in found
            if match
            for figure in match["list"].split(", ")
        }

    def figures(self) -> Iterator[str]:
        """Decimals, powers of ten and numbers with a unit, with it."""
        for match in _FIGURE.finditer(self.text):
            unit = match["unit"]
            for number in filter(None, (match["low"], match["number"])):
                if unit or re.search(r"[.e]", number):
                    yield f"{number} {unit}" if unit else number


def paragraphs(text: str) -> Iterator[Paragraph]:
    """Of a Markdown document."""
    text = without_blocks(text)
    fence = re.compile(_NO_FIGURES[0], re.DOTALL | re.MULTILINE)
    text = fence.sub(lambda found: "\n" * found[0].count("\n"), text)
    start = 1
    for whole in re.split(r"\n(?=\n)", text):
        bare = _COMMENT.sub(" ", whole)
        for pattern in _NO_FIGURES[1:]:
            bare = re.sub(pattern, " ", bare)
        line = start + len(whole) - len(whole.lstrip("\n"))
        yield Paragraph(line, " ".join(bare.split()), tuple(_COMMENT.findall(whole)), whole)
        start += whole.count("\n") + 1


def unsupported(text: str, results: Path) -> list[str]:
    """The figures that neither a named row has nor a comment accounts for."""
    found = []
    for paragraph in paragraphs(text):
        exempt, figures = paragraph.exempt(), [*paragraph.figures()]
        values = [value for name in paragraph.sources() for value in _values(results, name)]
        found += [
            f"line {paragraph.line}: {figure} is in no row of {sorted(paragraph.sources())}"
            for figure in figures
            if figure not in exempt and not any(_shows(figure, value) for value in values)
        ]
        found += [
            f"line {paragraph.line}: {figure}, in a comment, does not stand there"
            for figure in exempt
            if figure not in figures
        ]
    return found


def _values(results: Path, name: str) -> set[float]:
    """The numbers of a file, machine and versions left out."""
    found = set()
    with open(results / f"{name}.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            columns = list(row)
            for column in columns[: columns.index("machine") if "machine" in columns else None]:
                try:
                    found.add(float(row[column]))
                except ValueError:
                    continue
    return found


def _shows(figure: str, value: float) -> bool:
    """Whether the value, rounded as the figure is, is the figure."""
    number = figure.split()[0].replace(",", "")
    mantissa, is_power, _ = number.partition("e")
    digits = len(mantissa.partition(".")[2])
    shown = f"{value:.{digits}e}" if is_power else f"{value:.{digits}f}"
    return float(shown) == float(number)
