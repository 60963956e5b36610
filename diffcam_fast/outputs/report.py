"""One self-contained HTML page that shows what a run explained, and what it could not."""

from __future__ import annotations

import base64
import hashlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath
from typing import TYPE_CHECKING
from urllib.parse import quote

from diffcam_fast.outputs.atomic import atomic_write

if TYPE_CHECKING:
    from jinja2 import Template

_SIGNATURES = ((b"\xff\xd8\xff", "image/jpeg"), (b"\x89PNG\r\n\x1a\n", "image/png"))


@dataclass(frozen=True)
class ReportEntry:
    """One card of the report: one image explained for one target class.

    Attributes:
        name: The image as the reader knows it, for example its relative path. Any text.
        thumbnail: The view the network saw, small, as the bytes of a JPEG or PNG file.
        overlay: The same view with the heatmap blended in, same size, JPEG or PNG.
        file: Path of a written output, relative to the page's folder; None for no link.
        label: Name of the target class. Any text.
        probability: Softmax probability of the target class, in [0, 1].
        score: The explained score S (contrast of logits, no unit); NaN where not finite.
        top: The most probable classes as (label, probability), best first.
        target: Index of the target class.
    """

    name: str
    thumbnail: bytes
    overlay: bytes
    file: str | None
    label: str
    probability: float
    score: float
    top: Sequence[tuple[str, float]]
    target: int


def write_report(
    path: Path,
    entries: Iterable[ReportEntry],
    *,
    title: str,
    facts: Mapping[str, str],
    failures: Sequence[tuple[str, str]],
) -> None:
    """Write the report to ``path``, replacing an older one only when the new one is complete.

    The page needs no network and no other file. Entries are taken one at a time and go straight
    to the file, so a generator keeps the memory at one entry, however many there are. All text
    is escaped, and the page's content security policy allows its own style and script (by hash)
    and ``data:`` pictures, and nothing else.

    Args:
        path: The HTML file.
        entries: The cards, in the order in which the page first shows them.
        title: Title and heading of the page.
        facts: What the run was, as name -> value: model, layer, method, contrast, counts.
        failures: Files that were not explained, as (file, reason).

    Raises:
        ValueError: A thumbnail or overlay is neither JPEG nor PNG; nothing is written.

    Example:
        >>> import tempfile
        >>> page = Path(tempfile.mkdtemp()) / "report.html"
        >>> write_report(page, [], title="Cats", facts={"model": "resnet50"}, failures=[])
        >>> "<title>Cats</title>" in page.read_text(encoding="utf-8")
        True
    """
    context = {"title": title, "facts": facts, "entries": entries, "failures": failures}
    with atomic_write(path) as file:
        for chunk in _template().generate(context):
            # A file name that is not valid Unicode carries lone surrogates, which UTF-8 cannot
            # hold; as character references the browser shows them as U+FFFD.
            file.write(chunk.encode("utf-8", "xmlcharrefreplace"))


@cache
def _template() -> Template:
    # Imported here: only a run with a report pays for it.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("diffcam_fast", "outputs"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        csp_hash=_csp_hash,
        data_uri=_data_uri,
        href=_href,
        bar=_bar,
        percent=_percent,
        number=_number,
        sort_key=_sort_key,
    )
    return environment.get_template("report.html")


def _csp_hash(text: str) -> str:
    """Source expression that allows exactly this inline style or script."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def _data_uri(image: bytes, name: str) -> str:
    for signature, mime in _SIGNATURES:
        if image.startswith(signature):
            return f"data:{mime};base64,{base64.b64encode(image).decode('ascii')}"
    raise ValueError(
        f"a picture of {name!r} begins with {image[:8]!r}; the report embeds JPEG and PNG: "
        "encode thumbnail and overlay as one of the two"
    )


def _href(file: str) -> str:
    path = PurePath(file)
    if path.is_absolute():
        return path.as_uri()
    # Quoting takes ":" too, so that no name can pass for a scheme such as javascript:.
    return quote(os.fsencode(path.as_posix()))


def _bar(value: float) -> str:
    # An attribute of an SVG shape: the page's policy would block a style attribute.
    return f"{value:.2%}" if math.isfinite(value) else "0"


def _percent(value: float) -> str:
    if not math.isfinite(value):
        return "n/a"
    return "<0.1%" if 0 < value < 0.001 else f"{value:.1%}"


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "not finite"


def _sort_key(value: float) -> str:
    """Number as JavaScript reads it; the page sorts NaN behind everything else."""
    return repr(float(value)) if math.isfinite(value) else "NaN"
