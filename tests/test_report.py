"""The report page: what it holds, that nothing in it can act, and that it works in a browser."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffcam_fast.outputs.report import ReportEntry, write_report

FACTS = {"Model": "resnet50", "Layer": "layer4", "Method": "diff_grad_cam", "Contrast": "log_odds"}

HOSTILE = (
    "<script>window.hacked = 1</script>.png",
    '"><img src=x onerror="window.hacked = 1">',
    "' onmouseover='window.hacked = 1' x='",
    '</script><script>window.hacked = 1</script>{"a": "</script>"}',
    "</title></style><svg onload=window.hacked=1>",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt; &amp; & <!-- <b>",
    "javascript:window.hacked=1",
    "\u202eevil \u2028 caf\u00e9 \U0001f431",
)


def picture(red: int, green: int, blue: int, *, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 24), (red, green, blue)).save(buffer, kind)
    return buffer.getvalue()


def entry(
    name: str, label: str = "cat", probability: float = 0.5, score: float = 1.0
) -> ReportEntry:
    return ReportEntry(
        name=name,
        thumbnail=picture(20, 60, 200),
        overlay=picture(220, 40, 20, kind="JPEG"),
        file=f"{name}.png",
        label=label,
        probability=probability,
        score=score,
        top=[(label, probability), ("other", (1 - probability) / 2)],
        target=7,
    )


class Page(HTMLParser):
    """Attributes of every tag, and the text inside it, in the order of the page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs), []))

    def handle_data(self, data: str) -> None:
        if self.tags:
            self.tags[-1][2].append(data)

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs, _ in self.tags if name == tag]

    def texts(self, tag: str) -> list[str]:
        return ["".join(text).strip() for name, _, text in self.tags if name == tag]


def render(path: Path, entries: list[ReportEntry], **changes: Any) -> Page:
    options: dict[str, Any] = {"title": "Cats", "facts": FACTS, "failures": []} | changes
    write_report(path, entries, **options)
    return Page(path)


def test_page_holds_what_it_was_given(tmp_path: Path) -> None:
    first = entry("b/two.jpg", "espresso", 0.951, 8.304)
    second = replace(entry("one.jpg", "tabby", 0.0004, math.nan), file=None)
    failures = [("broken.jpg", "truncated"), ("empty.png", "empty file")]
    page = render(tmp_path / "report.html", [first, second], failures=failures)

    assert page.texts("title") == page.texts("h1") == ["Cats"]
    assert dict(zip(page.texts("dt"), page.texts("dd"), strict=True)) == FACTS
    cards = page.attributes("article")
    assert [card["data-name"] for card in cards] == ["b/two.jpg", "one.jpg"]
    assert [card["data-label"] for card in cards] == ["espresso", "tabby"]
    assert [float(card["data-probability"] or "") for card in cards] == [0.951, 0.0004]
    assert [card["data-score"] for card in cards] == ["8.304", "NaN"]
    assert page.texts("strong") == ["95.1%", "<0.1%"]
    bars = [bar["width"] for bar in page.attributes("rect")]
    assert bars == ["95.10%", "2.45%", "0.04%", "49.98%"]
    assert any("score 8.3" in text for text in page.texts("p"))
    assert any("score not finite" in text for text in page.texts("p"))
    assert page.texts("td") == ["", "truncated", "", "empty file"]  # names stand in a bdi inside
    assert {"broken.jpg", "empty.png"} <= set(page.texts("bdi"))
    links = [link["href"] for link in page.attributes("a")]
    assert links == ["#failures", "b/two.jpg.png"]
    # The link says what it leads to, which is not the photograph.
    assert "b/two.jpg.png" in page.texts("bdi")


def test_pictures_are_embedded_byte_for_byte(tmp_path: Path) -> None:
    given = entry("a")
    images = render(tmp_path / "report.html", [given]).attributes("img")
    heads, bodies = zip(*((image["src"] or "").split(",", 1) for image in images), strict=True)
    assert heads == ("data:image/png;base64", "data:image/jpeg;base64")
    assert [base64.b64decode(body) for body in bodies] == [given.thumbnail, given.overlay]
    assert [image["alt"] for image in images] == ["a", "Map: where the network looked for cat"]
    assert all(image["loading"] == "lazy" for image in images)


def test_policy_allows_this_style_and_script_and_nothing_else(tmp_path: Path) -> None:
    page = render(tmp_path / "report.html", [entry("a")])
    policy = page.attributes("meta")[1]["content"] or ""
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    for tag in ("style", "script"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", source, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules.pop(f"{tag}-src") == f"'sha256-{digest}'"
    expected = {"default-src": "'none'", "img-src": "data:", "base-uri": "'none'"}
    assert rules == expected | {"form-action": "'none'"}


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(tmp_path: Path, text: str) -> None:
    harmless = render(tmp_path / "harmless.html", [entry("a")], failures=[("f", "r")])
    options = {"title": text, "facts": {text: text}, "failures": [(text, text)]}
    page = render(tmp_path / "hostile.html", [entry(text, text)], **options)

    def structure(of: Page) -> list[tuple[str, list[str]]]:
        return [(tag, sorted(attrs)) for tag, attrs, _ in of.tags]

    one_fact: list[tuple[str, list[str]]] = [("div", []), ("dt", []), ("dd", [])]
    expected = structure(harmless)
    start = expected.index(("div", []))
    assert structure(page) == expected[:start] + one_fact + expected[start + 3 * len(FACTS) :]
    assert page.texts("h1") == [text.strip()]
    assert page.attributes("article")[0]["data-name"] == text
    assert page.attributes("article")[0]["data-label"] == text
    assert page.attributes("img")[0]["alt"] == text


@pytest.mark.parametrize(
    ("file", "href"),
    [
        ("maps/a b#1?.png", "maps/a%20b%231%3F.png"),
        ("javascript:alert(1)", "javascript%3Aalert%281%29"),
        ('"><b>.png', "%22%3E%3Cb%3E.png"),
        ("bad\udcff.png", "bad%FF.png"),
        ("/data/a b.png", "file:///data/a%20b.png"),
    ],
)
def test_links_are_quoted_paths(tmp_path: Path, file: str, href: str) -> None:
    page = render(tmp_path / "report.html", [replace(entry("a"), file=file)])
    assert [link["href"] for link in page.attributes("a")] == [href]


def test_name_that_is_not_unicode_is_written(tmp_path: Path) -> None:
    page = render(tmp_path / "report.html", [entry("caf\udce9.jpg")])
    assert page.attributes("article")[0]["data-name"] == "caf\ufffd.jpg"


def test_no_entries_says_so(tmp_path: Path) -> None:
    assert "No image was explained." in render(tmp_path / "report.html", []).texts("p")


def test_other_pictures_are_refused_and_leave_the_old_page(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("the old page")
    with pytest.raises(ValueError, match=r"'sub/cat'.*b'GIF89a'.*JPEG and PNG"):
        render(path, [entry("fine"), replace(entry("sub/cat"), overlay=b"GIF89a")])
    assert path.read_text() == "the old page"
    assert list(tmp_path.iterdir()) == [path]


def test_memory_is_that_of_one_entry(tmp_path: Path) -> None:
    image = b"\xff\xd8\xff" + bytes(400_000)

    def entries() -> Iterator[ReportEntry]:
        for index in range(40):
            yield replace(entry(f"{index}"), thumbnail=image, overlay=image)

    write_report(tmp_path / "first.html", [], title="t", facts={}, failures=[])  # warm the template
    tracemalloc.start()
    try:
        write_report(tmp_path / "r.html", entries(), title="t", facts={}, failures=[])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "r.html").stat().st_size > 40 * 2 * 400_000 * 4 / 3
    assert peak < 6_000_000
