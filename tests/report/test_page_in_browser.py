"""The page of a run in a real browser, without network: phone and desktop, light and dark.

Needs Chromium or Chrome, as `apt-get install chromium` brings it; skipped without.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora.report.page import write_report
from tests.pages import train_line, write_run, write_whole_run

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--no-first-run"]  # fmt: skip
SIZES = {"phone": (390, 844), "desktop": (1280, 900)}

# The lowest contrast ratio (WCAG 2.1) of any visible text against what is painted behind it, and where.
CONTRAST = """() => {
    const numbers = color => color.match(/[\\d.]+/g).map(Number);
    const linear = part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    const luminance = color => {
        const [red, green, blue] = numbers(color).map(value => linear(value / 255));
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
    };
    const behind = element => {
        for (; element; element = element.parentElement) {
            const color = getComputedStyle(element).backgroundColor;
            if (numbers(color)[3] !== 0) return color;
        }
        return "rgb(255, 255, 255)";
    };
    const found = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const element = walker.currentNode.parentElement;
        if (!walker.currentNode.data.trim() || !element.getClientRects().length) continue;
        const style = getComputedStyle(element);
        const ink = element.closest("svg") ? style.fill : style.color;
        const [low, high] = [ink, behind(element)].map(luminance).sort((a, b) => a - b);
        found.push([(high + 0.05) / (low + 0.05), walker.currentNode.data]);
    }
    return [found.length, ...found.sort((a, b) => a[0] - b[0])[0]];
}"""
DRAWINGS = """() => [...document.querySelectorAll("svg")]
    .filter(svg => getComputedStyle(svg.parentElement).display !== "none")
    .map(svg => svg.getBoundingClientRect()).map(box => [box.width, box.height])"""
OPEN = "all => { for (const e of document.querySelectorAll('details')) e.open = all || e.open }"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser found ({', '.join(BROWSERS)}); on Debian: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=QUIET)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module", params=["whole", "one step"])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    if request.param == "whole":
        return write_report(write_whole_run(directory)).resolve()
    said = [{"step": 1, "prompt": "word" * 200, "completion": "<script>alert(1)</script>" * 20, "expected": None}]
    settings = {"data": {"data": "/a/" + "long-name" * 20}}
    return write_report(write_run(directory, [train_line(1)], said, facts=None, **settings)).resolve()


@pytest.mark.parametrize("size", SIZES)
def test_the_page_in_a_browser(browser: Any, report: Path, size: str, tmp_path: Path) -> None:
    """Nothing fails, nothing is fetched, nothing sticks out, all can be read; dark is dark."""
    from PIL import Image, ImageStat

    width, height = SIZES[size]
    wrong: list[str] = []
    asked: list[str] = []
    brightness = {}
    for scheme in ("light", "dark"):
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, offline=True
        )
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(report.as_uri(), wait_until="load")
        has_charts = page.locator("svg").count() > 0
        drawings = page.evaluate(DRAWINGS)
        assert (len(drawings) == 6) if has_charts else not drawings  # of the loss, one of two
        assert all(w > 250 and h > 100 for w, h in drawings)
        for opened in (False, True):
            page.evaluate(OPEN, opened)
            widest = page.evaluate("Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)")
            assert widest <= width, f"{scheme}, details open: {opened}"
            number, ratio, text = page.evaluate(CONTRAST)
            assert number > 50 and ratio >= 4.5, f"{ratio:.2f} in {scheme}: {text}"
        picture = tmp_path / f"{size}-{scheme}.png"
        page.screenshot(path=picture)
        with Image.open(picture) as image:
            assert image.size == (width, height)
            grey = image.convert("L")
            assert len(grey.getcolors() or ()) > 50 and ImageStat.Stat(grey).stddev[0] > 5  # not blank
            brightness[scheme] = ImageStat.Stat(grey).mean[0]
        context.close()
    assert wrong == [] and asked == [report.as_uri()] * 2
    assert brightness["light"] > 200 and brightness["dark"] < 60


def test_on_paper_it_is_light_and_whole(browser: Any, report: Path) -> None:
    """Printing from a dark screen; folded answers are printed, the tables behind the charts are not."""
    context = browser.new_context(color_scheme="dark", offline=True)
    page = context.new_page()
    page.goto(report.as_uri())
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(26, 30, 36)"
    assert page.locator("figure details:visible").count() == 0
    assert page.pdf(format="A4").startswith(b"%PDF")
    context.close()
