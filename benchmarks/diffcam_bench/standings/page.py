"""A page as data: sections of text, tables and pictures, as Markdown and as HTML."""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Template


@dataclass(frozen=True)
class Table:
    """Rows of text under headings; columns after the first `left` stand at the right."""

    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    left: int = 1

    def markdown(self) -> str:
        """The table of a Markdown document."""
        marks = ["---"] * self.left + ["---:"] * (len(self.headings) - self.left)
        lines = [self.headings, tuple(marks), *self.rows]
        return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)


@dataclass(frozen=True)
class Picture:
    """A PNG file with what it shows in words."""

    name: str
    says: str
    png: bytes

    @property
    def uri(self) -> str:
        """The picture as part of a page."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode('ascii')}"


Part = str | Table | Picture


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it; a text is a paragraph or a list of `- ` lines."""

    title: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Page:
    """The whole of it."""

    title: str
    lead: str
    sections: Sequence[Section]

    @property
    def pictures(self) -> list[Picture]:
        """All pictures, in their order."""
        return [part for one in self.sections for part in one.parts if isinstance(part, Picture)]

    def markdown(self, images: str = "images") -> str:
        """A document whose pictures lie in a folder beside it."""
        parts = [f"# {self.title}", self.lead]
        for one in self.sections:
            parts += [f"## {one.title}", *(_as_markdown(part, images) for part in one.parts)]
        return "\n\n".join(parts) + "\n"

    def html(self) -> str:
        """A page that needs no other file; it has no script."""
        return _template().render(page=self)


def _as_markdown(part: Part, images: str) -> str:
    if isinstance(part, Table):
        return part.markdown()
    if isinstance(part, Picture):
        return f"![{part.says}]({images}/{part.name}.png)"
    return part


@cache
def _template() -> "Template":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("diffcam_bench", "standings"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["inline"] = inline
    environment.tests["table"] = lambda part: isinstance(part, Table)
    environment.tests["picture"] = lambda part: isinstance(part, Picture)
    return environment.get_template("page.html")


def inline(text: str) -> object:
    """Text of one line as safe HTML: code, bold and links, as Markdown has them.

    Example:
        >>> print(inline("`a<b` is **so**, [here](x.md)"))
        <code>a&lt;b</code> is <b>so</b>, <a href="x.md">here</a>
    """
    from markupsafe import Markup

    safe = html.escape(text, quote=True)
    for pattern, made in (
        (r"`([^`]+)`", r"<code>\1</code>"),
        (r"\*\*([^*]+)\*\*", r"<b>\1</b>"),
        (r"\[([^\]]+)\]\(([^)\s]+)\)", r'<a href="\2">\1</a>'),
    ):
        safe = re.sub(pattern, made, safe)
    return Markup(safe)  # noqa: S704 -- escaped two lines above
