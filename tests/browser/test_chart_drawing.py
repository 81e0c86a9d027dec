"""How the chart draws: blank places, hollow candles, overlays, and the time zone."""

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from playwright.sync_api import Page, expect

from tests.browser.conftest import Look, Visit
from tests.browser.drawing import drawn, until
from tests.support.application import Application, ScriptedExchange

Record = Callable[..., None]

TRADED = {"volume": 2.0, "turnover": 2000.0, "buy_volume": 1.0, "buy_turnover": 1000.0}

SLOTS = """
    async ([openings, length]) => {
        const { slotsOf } = await import("/static/market/slots.js");
        return slotsOf(openings.map((at) => ({ at })), length).map(({ at, candle }) => [at, candle !== null]);
    }
"""

OVERLAY = """
    async ([name, candles, complete]) => {
        const { overlayAt } = await import("/static/market/overlays.js");
        return candles.map((_, index) => overlayAt(name, candles, index, complete));
    }
"""

COLUMNS = """
    ([name, fewest]) => {
        const canvas = document.querySelector("#chart tr:first-child td:nth-child(2) canvas");
        const up = getComputedStyle(document.documentElement).getPropertyValue(name);
        const [red, green, blue] = up.match(/[0-9]+/g).map(Number);
        const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
        copy.drawImage(canvas, 0, 0);
        const { data } = copy.getImageData(0, 0, canvas.width, canvas.height);
        const columns = [];
        for (let x = 0; x < canvas.width; x += 1) {
            let found = 0;
            for (let y = 0; y < canvas.height; y += 1) {
                const at = 4 * (y * canvas.width + x);
                found += data[at] === red && data[at + 1] === green && data[at + 2] === blue && data[at + 3] === 255;
            }
            if (found >= fewest) columns.push(x);
        }
        return [columns, canvas.width];
    }
"""
"""Columns with at least some pixels of a colour, and the width."""


def extent(page: Page) -> tuple[int, int, int]:
    """First and last column with rising candles, and the width."""
    found: list[Any] = []

    def any_column() -> bool:
        # The line of the newest price crosses all columns, with fewer pixels.
        found[:] = page.evaluate(COLUMNS, ["--up", 4])
        return bool(found[0])

    until(page, any_column)
    return found[0][0], found[0][-1], found[1]


def test_missing_minutes_leave_blank_places(visit: Visit) -> None:
    page = visit.open()
    slots = page.evaluate(SLOTS, [[0, 60_000, 300_000], 60_000])
    assert slots == [[0, True], [60_000, True], [120_000, False], [180_000, False], [240_000, False], [300_000, True]]
    year = page.evaluate(SLOTS, [[0, 60_000, 31_536_000_000, 31_536_060_000], 60_000])
    assert len(year) == 4 + 5_000


def test_six_candles_over_28_minutes_stand_apart(visit: Visit, record: Record) -> None:
    for later in (-27, -22, -17, -12, -6, 0):
        record(1, later=later)
    page = visit.open()
    expect(page.locator("#chart-panel")).to_have_attribute("data-state", "shown")
    first, last, width = extent(page)
    assert last - first > 0.7 * width


def test_few_candles_fill_the_chart_as_they_come(
    visit: Visit, record: Record, exchanges: list[ScriptedExchange]
) -> None:
    record(30)
    page = visit.open()
    first, last, width = extent(page)
    assert first < 0.1 * width
    assert last > 0.8 * width
    exchanges[0].send(1000.0)  # 14 minutes later
    expect(page.locator("#legend .volume")).to_have_text("\u2013")
    until(page, lambda: extent(page)[1] < 0.75 * width)
    first, last, _ = extent(page)
    assert first < 0.1 * width


def test_rising_candles_are_hollow(visit: Visit, record: Record) -> None:
    record(12)
    page = visit.open()
    until(page, lambda: drawn(page, "up") > 100)
    first, last, _ = extent(page)
    filled = drawn(page, "up") / (last - first)
    assert filled < 60, "columns of bodies that are full have more"
    page.locator("#key summary").click()
    expect(page.locator("#key dl")).to_contain_text("Hollow: the close is at or above the open.")


def test_overlays_are_computed_from_what_is_known(visit: Visit) -> None:
    page = visit.open()
    minute, day = 60_000, 86_400_000
    closes = [{"at": n * minute, "close": float(n), "volume": 1.0, "turnover": float(n)} for n in range(25)]
    means = page.evaluate(OVERLAY, ["ma20", closes, True])
    assert means[:19] == [None] * 19
    assert means[19:21] == [9.5, 10.5]
    vwap = page.evaluate(OVERLAY, ["vwap", closes, True])
    assert vwap[0] == 0
    assert vwap[24] == 12
    later = [candle | {"at": candle["at"] + minute} for candle in closes]
    assert page.evaluate(OVERLAY, ["vwap", later, False])[24] is None
    two_days = [{"at": at, "close": 1.0, "volume": 2.0, "turnover": 3.0 + at} for at in (day - minute, day)]
    assert page.evaluate(OVERLAY, ["vwap", two_days, False]) == [None, (3.0 + day) / 2]
    unknown = [candle | {"volume": None} if n == 3 else candle for n, candle in enumerate(closes)]
    assert page.evaluate(OVERLAY, ["vwap", unknown, True])[2:5] == [1, None, None]


def test_overlays_are_chosen_and_kept_in_the_address(visit: Visit, record: Record) -> None:
    record(100, **TRADED)
    page = visit.open()
    until(page, lambda: drawn(page, "up") > 100)
    assert drawn(page, "line-2") == 0
    button = page.get_by_role("button", name="MA 20", exact=True)
    expect(button).to_have_attribute("aria-pressed", "false")
    button.click()
    until(page, lambda: drawn(page, "line-2") > 100)
    expect(page.locator("#legend")).to_contain_text("MA 20990.50")
    page.get_by_role("button", name="VWAP", exact=True).click()
    assert page.url.endswith("overlays=ma20.vwap")
    expect(page.locator("#legend")).to_contain_text(re.compile(r"VWAP1.000\.00"))
    page.reload()
    visit.is_live()
    until(page, lambda: drawn(page, "line-2") > 100)
    page.get_by_role("button", name="MA 20", exact=True).click()
    until(page, lambda: drawn(page, "line-2") == 0)


def test_overlay_is_not_drawn_over_missing_minutes(visit: Visit, record: Record) -> None:
    record(30, later=-60)
    record(30)
    page = visit.open("overlays=ma20")
    until(page, lambda: drawn(page, "line-2") > 100)
    columns, _ = page.evaluate(COLUMNS, ["--line-2", 1])
    first, last = columns[0], columns[-1]
    widest = max(after - before for before, after in pairwise(columns))
    assert widest > 0.3 * (last - first)


def test_times_are_local_or_utc(look: Look, application: Application, exchanges: list[ScriptedExchange]) -> None:
    visit = look(application.port, timezone_id="Asia/Kolkata")
    page = visit.open("interval=1h")
    exchanges[0].send(100.0)
    zone, opened = page.locator("#zone"), page.locator("#legend .time")
    expect(zone).to_have_text("Local")
    expect(opened).to_have_text(re.compile(":30$"))
    zone.click()
    expect(zone).to_have_text("UTC")
    expect(opened).to_have_text(re.compile(":00$"))
    expect(page.locator("footer")).to_contain_text("Times are UTC.")
    page.reload()
    visit.is_live()
    expect(zone).to_have_text("UTC")
    expect(opened).to_have_text(re.compile(":00$"))
    zone.click()
    expect(opened).to_have_text(re.compile(":30$"))


def test_question_mark_shows_the_keys(visit: Visit) -> None:
    page = visit.open()
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keys")).to_be_visible()
    expect(page.get_by_role("dialog", name="Keys")).to_contain_text("Filter symbols")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog", name="Keys")).to_be_hidden()
    page.locator("#filter").focus()
    page.keyboard.press("?")
    expect(page.locator("#filter")).to_have_value("?")
    expect(page.get_by_role("dialog", name="Keys")).to_be_hidden()
    page.get_by_role("button", name="Keys").click()
    page.get_by_role("button", name="Close").click()
    expect(page.get_by_role("dialog", name="Keys")).to_be_hidden()
