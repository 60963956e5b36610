"""The report in a real browser: it sorts, filters, shows maps, loads nothing, runs nothing."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from diffcam_fast.outputs.report import ReportEntry, write_report

if TYPE_CHECKING:
    from selenium.webdriver import Chrome
    from selenium.webdriver.remote.webelement import WebElement

pytestmark = pytest.mark.browser

BLUE, RED = (20, 60, 200), (220, 40, 20)
HOSTILE = (
    "<script>window.hacked = 1</script>",
    '"><img src=x onerror="window.hacked = 1">',
    "' onmouseover='window.hacked = 1' x='",
    "</script><script>window.hacked = 1</script>",
    "</title></style><svg onload=window.hacked=1>",
    "{{ 7 * 7 }} &lt;b&gt;",
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-prefers-reduced-motion",
    "--window-size=1200,900",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    driver_path = shutil.which("chromedriver")
    if binary is None or driver_path is None:
        pytest.skip("needs chromium and chromedriver on the PATH (Debian: chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # An explicit path: selenium must not go and download a driver.
    driver = webdriver.Chrome(options, webdriver.ChromeService(driver_path))
    try:
        yield driver
    finally:
        driver.quit()


def picture(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(buffer, "PNG")
    return buffer.getvalue()


def entry(name: str, label: str, probability: float, score: float) -> ReportEntry:
    top = [(label, probability), ("other", 1 - probability)]
    pictures = {"thumbnail": picture(BLUE), "overlay": picture(RED)}
    return ReportEntry(
        name=name,
        file=f"{name}.png",
        label=label,
        probability=probability,
        score=score,
        top=top,
        target=0,
        **pictures,
    )


ENTRIES = (
    entry("img10.jpg", "tabby", 0.30, 9.0),
    entry("img2.jpg", "espresso", 0.90, float("nan")),
    entry("Img1.jpg", "rocket", 0.60, -2.0),
)


def open_page(browser: Chrome, folder: Path, entries: tuple[ReportEntry, ...] = ENTRIES) -> None:
    path = folder / "report.html"
    facts = {"Model": "resnet50", "Layer": "layer4"}
    write_report(path, entries, title="Cats", facts=facts, failures=[("bad.jpg", "truncated")])
    for kind in ("browser", "performance"):
        logged(browser, kind)  # what earlier pages left
    browser.get(path.as_uri())


def logged(browser: Chrome, kind: str) -> list[dict[str, Any]]:
    """Lines of the console ("browser") or of the network ("performance") since the last call."""
    lines: list[dict[str, Any]] = browser.execute("getLog", {"type": kind})["value"]
    return lines


def find(browser: Chrome, selector: str) -> WebElement:
    return browser.find_element("css selector", selector)


def names(browser: Chrome) -> list[str]:
    """Names of the cards that can be seen, in the order of the page."""
    links = browser.find_elements("css selector", ".card:not([hidden]) .name")
    return [link.text for link in links]


def middle_colour(element: WebElement) -> tuple[int, ...]:
    pixels = np.asarray(Image.open(io.BytesIO(element.screenshot_as_png)).convert("RGB"))
    return tuple(int(value) for value in pixels[pixels.shape[0] // 2, pixels.shape[1] // 2])


def move_to(browser: Chrome, element: WebElement) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(browser).move_to_element(element).perform()


def press(browser: Chrome, keys: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(browser).send_keys(keys).perform()


def test_sorting_changes_the_order(browser: Chrome, tmp_path: Path) -> None:
    open_page(browser, tmp_path)
    ten, two, one = "img10.jpg", "img2.jpg", "Img1.jpg"
    assert names(browser) == [ten, two, one]
    # First and second click; the score that is not finite stays last in both directions.
    expected = {
        "name": ([one, two, ten], [ten, two, one]),
        "label": ([two, one, ten], [ten, one, two]),
        "probability": ([two, one, ten], [ten, one, two]),
        "score": ([ten, one, two], [one, ten, two]),
    }
    for key, orders in expected.items():
        button = find(browser, f"[data-sort={key}]")
        for order in orders:
            button.click()
            assert names(browser) == order, key
        assert button.get_attribute("aria-pressed") == "true"
    assert len(browser.find_elements("css selector", "[data-sort][aria-pressed=true]")) == 1


def test_filter_hides_the_others(browser: Chrome, tmp_path: Path) -> None:
    open_page(browser, tmp_path)
    box = find(browser, "#filter")
    box.send_keys("IMG1")
    assert names(browser) == ["img10.jpg", "Img1.jpg"]
    box.send_keys(" rock")  # every word must occur, in the name or the label
    assert names(browser) == ["Img1.jpg"]
    assert find(browser, "#status").text == "1 of 3 shown"


def test_map_shows_on_hover_focus_click_and_for_all(browser: Chrome, tmp_path: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    open_page(browser, tmp_path)
    first, second, _ = browser.find_elements("css selector", ".picture")
    heading = find(browser, "h1")
    move_to(browser, heading)
    assert middle_colour(first) == middle_colour(second) == BLUE
    move_to(browser, first)
    assert (middle_colour(first), middle_colour(second)) == (RED, BLUE)
    move_to(browser, heading)
    assert middle_colour(first) == BLUE

    find(browser, "#all-maps").click()
    assert middle_colour(first) == middle_colour(second) == RED
    find(browser, "#all-maps").click()
    press(browser, Keys.TAB)  # the box is the last tool: next is the first picture
    assert (middle_colour(first), middle_colour(second)) == (RED, BLUE)
    press(browser, Keys.TAB + Keys.TAB)  # its link, then the next picture
    assert (middle_colour(first), middle_colour(second)) == (BLUE, RED)

    first.click()
    move_to(browser, heading)
    assert first.get_attribute("aria-pressed") == "true"
    assert middle_colour(first) == RED


def test_print_shows_the_maps(browser: Chrome, tmp_path: Path) -> None:
    open_page(browser, tmp_path)
    maps = browser.find_elements("css selector", ".picture .map")
    assert {image.value_of_css_property("opacity") for image in maps} == {"0"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert {image.value_of_css_property("opacity") for image in maps} == {"1"}
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_pictures_decode_and_nothing_is_loaded_or_logged(browser: Chrome, tmp_path: Path) -> None:
    open_page(browser, tmp_path)
    find(browser, "[data-sort=label]").click()
    move_to(browser, find(browser, ".picture"))
    script = """
        const done = arguments[0];
        const images = [...document.images];
        for (const image of images) image.loading = "eager";
        Promise.all(images.map((image) => image.decode()))
            .then(() => done(images.map((image) => image.naturalWidth)), String)"""
    assert browser.execute_async_script(script) == [64] * 2 * len(ENTRIES)
    assert logged(browser, "browser") == []
    assert browser.title == "Cats"

    requested = set()
    for line in logged(browser, "performance"):
        message: dict[str, Any] = json.loads(line["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            requested.add(message["params"]["request"]["url"].partition(",")[0])
    assert requested <= {browser.current_url, "data:image/png;base64", "data:"}
    assert browser.current_url in requested


def test_policy_stops_network_and_inline_script(browser: Chrome, tmp_path: Path) -> None:
    open_page(browser, tmp_path)
    script = """
        const done = arguments[0], blocked = [];
        document.addEventListener("securitypolicyviolation", (event) => {
            blocked.push(event.effectiveDirective);
            if (blocked.length === 4) done(blocked.sort());
        });
        fetch("http://localhost:9/").catch(() => {});
        new Image().src = "http://localhost:9/a.png";
        const inline = document.createElement("script");
        inline.textContent = "window.hacked = 1";
        document.body.append(inline);
        document.querySelector("h1").setAttribute("onclick", "window.hacked = 1");
        document.querySelector("h1").click();"""
    blocked = browser.execute_async_script(script)
    assert blocked == ["connect-src", "img-src", "script-src-attr", "script-src-elem"]
    assert browser.execute_script("return window.hacked") is None


def test_hostile_names_do_not_run(browser: Chrome, tmp_path: Path) -> None:
    open_page(browser, tmp_path, tuple(entry(text, text, 0.5, 1.0) for text in HOSTILE))
    assert names(browser) == list(HOSTILE)
    for element in browser.find_elements("css selector", ".picture, .name, h2, .top li"):
        move_to(browser, element)
    find(browser, "[data-sort=name]").click()
    find(browser, "#filter").send_keys(HOSTILE[2])
    assert names(browser) == [HOSTILE[2]]
    assert browser.execute_script("return window.hacked") is None
    assert logged(browser, "browser") == []
