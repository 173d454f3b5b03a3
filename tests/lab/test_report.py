"""The report is one file that needs nothing else, says what was measured, and works in a browser."""

from __future__ import annotations

import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.compare_inputs import made_up_entry, made_up_results

from foveate.lab.compare.measures import MEASURES
from foveate.lab.compare.results import Recommendation, Results, Spread
from foveate.lab.report.markup import Markup, join, tag
from foveate.lab.report.page import page, write
from foveate.lab.report.plots import front, mask_symbol, quality_plot, time_plot
from foveate.lab.report.svg import Frame, Scale, one_two_five, symlog
from foveate.lab.report.svg_labels import LINE, Box, place, spread
from foveate.lab.report.table import columns, row

EVIL = "<script>alert('1')</script>&\"quoted\""
BROWSER = ("chromium", "chromium-browser", "google-chrome")
QUIET = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


def some_results() -> Results:
    entries = [
        made_up_entry("streaming_llm", speed=3.1, change=0.004),
        made_up_entry("window(64)", speed=5.0, change=0.3),
        made_up_entry("moba", speed=1.4, change=0.001),
        made_up_entry("slow", speed=0.4, change=-0.0005),
    ]
    return made_up_results(entries)


# ---- markup and plots --------------------------------------------------------------------------------------


def test_everything_is_escaped_but_markup() -> None:
    assert tag("p", EVIL, title=EVIL).count("<") == 2
    assert tag("p", tag("b", "x")) == "<p><b>x</b></p>"
    assert join("a<", Markup("<b>"), None) == "a&lt;<b>"


def test_names_and_texts_of_others_cannot_become_markup() -> None:
    entry = made_up_entry(EVIL, speed=2.0)
    results = made_up_results([entry])
    results.about["model"]["name"] = results.about["text"]["source"] = EVIL
    results.notes = [EVIL]
    results.recommendation = Recommendation(EVIL, EVIL)
    html = page(results)
    assert "alert(" in html and "<script>alert" not in html
    assert html.count("<script") == 1


class Tags(HTMLParser):
    """Open elements, to find one that is not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, name: str, attributes: Any) -> None:
        if name not in ("meta", "link", "wbr"):
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name


@pytest.mark.parametrize("number", [0, 1, 13])
def test_the_page_is_whole_whatever_was_measured(number: int) -> None:
    entries = [made_up_entry(f"mechanism_{n}", speed=0.1 + 0.5 * n, change=0.01 * (n % 4)) for n in range(number)]
    results = made_up_results(entries)
    html = page(results)
    parser = Tags()
    parser.feed(html)
    assert not parser.open
    assert "Keep exact attention" in html if number == 0 else "Take " in html
    assert all(html.count(f"{entry.name}<") or "<wbr>" in html for entry in entries)
    results.interrupted = True
    assert "Stopped early" in page(results) and "Stopped early" not in html


def test_one_time_of_exact_attention_stands_everywhere() -> None:
    """The machine was slower while the mechanism was timed: its own pairs say 9 s, not 4."""
    entry = made_up_entry("streaming_llm", speed=3.0, change=0.004)
    slower = [
        replace(t, exact_seconds=Spread(9.0, 9.0, 9.0, 5), seconds=Spread(3.0, 3.0, 3.0, 5)) for t in entry.timings
    ]
    results = made_up_results([replace(entry, timings=slower)])
    assert results.seconds(results.exact) == 4.0 and results.seconds(results.entries[0]) == pytest.approx(4 / 3)
    html = page(results)
    assert "1.33 s, not 4 s" in html and "9 s" not in html and "3 s" not in re.sub(r"1\.33 s", "", html)
    cells = row(results, results.entries[0])
    assert cells[1:3] == ["3.00x", "1.33 s"] and row(results, results.exact)[1:3] == ["1x", "4 s"]


@pytest.mark.parametrize("measure", MEASURES)
def test_every_measure_has_its_words(measure: str) -> None:
    results = made_up_results([made_up_entry("a", speed=2.0, change=0.004)], measure)
    html = page(results)
    assert MEASURES[measure].loss_said.split(",")[0] in unescape(html)
    assert ("bits per byte" in html.lower()) == (measure != "states")
    assert len(row(results, results.exact)) == len(columns(results)) + 1
    parser = Tags()
    parser.feed(html)
    assert not parser.open


def test_too_few_runs_recommend_nothing() -> None:
    results = made_up_results([made_up_entry("a", speed=2.0)])
    results.recommendation = Recommendation(None, "too few", undecided=True)
    html = page(results)
    assert "No recommendation" in html and "Keep exact attention" not in html


def test_nothing_is_fetched_from_elsewhere() -> None:
    html = page(some_results())
    assert not re.findall(r"(?:src|@import|url\()\s*=?\s*[\"']?(?!data:)[a-z]+:", html)
    assert "default-src 'none'" in unescape(html)


@pytest.mark.parametrize("plot", [quality_plot, time_plot])
@pytest.mark.parametrize("width", [380, 920])
def test_plots_are_well_formed_and_name_every_mechanism(plot: Any, width: int) -> None:
    results = some_results()
    root = ET.fromstring(plot(results, width, 480))
    texts = [element.text for element in root.iter("text")]
    assert {entry.name for entry in results.ranked} <= set(texts)
    numbers = [float(n) for path in root.iter("path") for n in re.findall(r"-?\d+\.?\d*", path.get("d", ""))]
    assert all(-20 <= n <= 940 for n in numbers)


def test_intervals_end_where_the_plot_does() -> None:
    wide = made_up_entry("unsure", speed=1.3, change=-0.002, width=0.9)
    wide.timings[:] = [replace(timing, speedup=Spread(1.3, 0.01, 40.0, 5)) for timing in wide.timings]
    root = ET.fromstring(quality_plot(made_up_results([wide]), 920, 480))
    paths = [path.get("d", "") for path in root.iter("path") if path.get("class") == "whisker"]
    across, upright = ([float(n) for n in re.findall(r"-?\d+\.?\d*", path)] for path in paths)
    assert across[::2] == [58, 908] and upright[1::2] == [34, 432]


def test_the_front_is_what_no_other_beats() -> None:
    results = some_results()
    assert [entry.name for entry in front(results)] == ["window(64)", "streaming_llm", "moba", "exact", "slow"]
    beaten = made_up_entry("beaten", speed=3.0, change=0.01)
    assert beaten not in front(made_up_results([*results.entries, beaten]))


def test_labels_never_overlap_and_stay_inside() -> None:
    frame = Frame(50, 30, 850, 430)
    spots = torch.rand(14, 2) * torch.tensor([300.0, 100.0]) + torch.tensor([300.0, 150.0])
    points = [(x, y) for x, y in spots.tolist()]
    wall = Box(300, 200, 600, 203)
    labels = place(points, [f"mechanism_number_{n}" for n in range(14)], frame, [wall])
    shown = [label.box for label in labels if label.said]
    assert len(shown) == 14
    for number, box in enumerate(shown):
        assert box.inside(frame) and not box.meets(wall)
        assert not any(box.meets(other) for other in shown[number + 1 :])
        assert not any(box.left < x < box.right and box.top < y < box.bottom for x, y in points)


def test_a_label_without_room_is_left_out() -> None:
    (label,) = place([(50, 50)], ["far too long for this frame"], Frame(0, 0, 100, 100))
    assert label.said == ""


def test_spread_heights_keep_their_order_and_distance() -> None:
    heights = (torch.rand(11) * 60 + 20).tolist()
    found = spread(heights, 10, 200)
    order = sorted(range(11), key=heights.__getitem__)
    steps = [found[b] - found[a] for a, b in pairwise(order)]
    assert min(steps) >= LINE - 1e-6
    assert min(found) >= 10 and max(found) <= 200 + 1e-6
    assert spread([10.0, 90.0], 0, 100) == [10.0, 90.0]
    crowded = spread(heights, 10, 60)
    assert max(crowded) - min(crowded) <= 50 + 1e-6


def test_scales() -> None:
    scale = Scale(-0.01, 10, 100, 0, symlog(0.001))
    assert scale(-0.01) == 100 and scale(10) == pytest.approx(0) and 0 < scale(0) < 100
    assert one_two_five(0.04, 1.0) == [0.05, 0.1, 0.2, 0.5, 1.0]


def test_a_mask_is_drawn_as_it_was_measured() -> None:
    entry = made_up_entry("half", speed=2.0)
    rows = entry.looked.picture
    drawn = [["."] * len(rows) for _ in rows]
    for path in ET.fromstring(mask_symbol(entry, "m")):
        digit = path.get("class", "")[-1]
        for x, y, wide in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", path.get("d", "")):
            drawn[int(y)][int(x) : int(x) + int(wide)] = digit * int(wide)
    assert ["".join(row) for row in drawn] == rows


# ---- in a browser ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    program = next(filter(None, map(shutil.which, BROWSER)), None)
    if program is None:
        pytest.skip("needs chromium on the PATH")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=program, args=QUIET)
        yield running
        running.close()


class Visit:
    """A page, and whatever it complained about or asked the network for."""

    def __init__(self, browser: Any, file: Path, **options: Any) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page = browser.new_page(**options)
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())

    def first_names(self) -> list[str]:
        return self.page.eval_on_selector_all("tbody th", "heads => heads.map(h => h.dataset.value)")


@pytest.fixture
def report(tmp_path: Path) -> Path:
    return write(some_results(), tmp_path)


def test_the_browser_has_nothing_to_complain_of_or_to_fetch(browser: Any, report: Path) -> None:
    visit = Visit(browser, report)
    visit.page.hover("tbody tr >> nth=1")
    assert visit.complaints == []
    assert [url for url in visit.requests if not url.startswith(("file://", "data:"))] == []


def test_a_head_sorts_by_mouse_and_by_keyboard(browser: Any, report: Path) -> None:
    visit = Visit(browser, report)
    assert visit.first_names() == ["window(64)", "streaming_llm", "moba", "exact", "slow"]
    heads = visit.page.locator("thead th")
    heads.nth(1).locator("button").click()
    assert visit.first_names()[0] == "slow" and heads.nth(1).get_attribute("aria-sort") == "ascending"
    heads.nth(0).locator("button").focus()
    visit.page.keyboard.press("Enter")
    assert visit.first_names() == sorted(visit.first_names())
    assert heads.nth(0).get_attribute("aria-sort") == "ascending"
    assert heads.nth(1).get_attribute("aria-sort") is None
    heads.nth(5).locator("button").click()
    assert visit.first_names()[0] == "window(64)" and visit.first_names()[-1] == "slow"


def test_light_and_dark_are_both_readable(browser: Any, report: Path) -> None:
    contrasts = {}
    for scheme in ("light", "dark"):
        visit = Visit(browser, report, color_scheme=scheme)
        ink, paper = visit.page.evaluate(
            "[getComputedStyle(document.body).color, getComputedStyle(document.documentElement).backgroundColor]"
        )
        contrasts[scheme] = brightness(paper) - brightness(ink)
    assert contrasts["light"] > 180 and contrasts["dark"] < -180


def brightness(colour: str) -> float:
    red, green, blue = map(int, re.findall(r"\d+", colour)[:3])
    return 0.3 * red + 0.6 * green + 0.1 * blue


def test_a_phone_shows_everything_without_scrolling_the_page_sideways(browser: Any, report: Path) -> None:
    visit = Visit(browser, report, viewport={"width": 400, "height": 800})
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= 400
    assert visit.page.locator(".narrow svg").first.is_visible() and not visit.page.locator(".wide").first.is_visible()


def test_pointing_at_a_row_lights_up_its_marks(browser: Any, report: Path) -> None:
    visit = Visit(browser, report)
    visit.page.hover("tbody tr >> nth=0")
    lit = visit.page.eval_on_selector_all(".wide .mark.lit title", "titles => titles.map(t => t.textContent)")
    assert len(lit) == 2 and all(title.startswith("window(64)") for title in lit)


@pytest.mark.parametrize("width", [1300, 1024, 800])
def test_nothing_scrolls_sideways(browser: Any, tmp_path: Path, width: int) -> None:
    named = ["window(512) & causal | sinks(4)", "minference_block_sparse", "streaming_llm(window=256)"]
    entries = [made_up_entry(name, speed=2.0 + n, change=0.0123 * n) for n, name in enumerate(named)]
    visit = Visit(browser, write(made_up_results(entries), tmp_path), viewport={"width": width, "height": 900})
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    if width == 1300:
        wide, room = visit.page.eval_on_selector(".scroll", "box => [box.scrollWidth, box.clientWidth]")
        assert wide <= room


def test_it_prints(browser: Any, report: Path) -> None:
    visit = Visit(browser, report)
    printed = visit.page.pdf(format="A4")
    assert printed.startswith(b"%PDF") and len(printed) > 10_000
