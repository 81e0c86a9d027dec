"""What the page shows of volumes, and of what the venue's own candles confirm or contradict."""

import re
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import PHONE, Look, Start, Visit
from tests.browser.drawing import drawn, until
from tests.support.application import Application, ScriptedExchange

NONE = "\u2013"

VOLUMES = "#chart tr:nth-child(3) td:nth-child(2) canvas"
"""The canvas of the bars; the second row of the chart is the line between the panes."""

TRADED = {"volume": 2.5, "turnover": 2500.0, "buy_volume": 1.0, "buy_turnover": 1000.0}
VENUE_VALUES = [1000.0, 1002.0, 999.0, 1001.5, 2.75, None, None]
"""The venue's own candle of a minute whose close is 1001.0; it says neither turnover nor number of trades."""

TWO_FRAMES = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"

Record = Callable[..., None]


@pytest.fixture
def marked(record: Record) -> None:
    """Minutes of which three are verified, and one each differs, is the venue's own, and has no volume."""
    record(3, later=0, **TRADED, verified=True)
    record(1, later=1, **TRADED, verified=False, venue_values=VENUE_VALUES)
    record(1, later=2, volume=4, source="venue")
    record(1, later=3)


def select(page: Page, times: int) -> None:
    """Go to the left by some candles."""
    page.locator("#chart").focus()
    for _ in range(times):
        page.keyboard.press(",")


def test_bars_show_volumes_and_the_bought_part(visit: Visit, marked: None) -> None:
    page = visit.open()
    expect(page.locator("#chart-panel")).to_have_attribute("data-state", "shown")
    until(page, lambda: drawn(page, "buy", VOLUMES) > 50)
    assert drawn(page, "sell", VOLUMES) > 50
    assert drawn(page, "unsided", VOLUMES) > 50
    assert drawn(page, "buy") == 0
    assert drawn(page, "verified") > 0
    assert drawn(page, "differs") > 0
    assert page.locator("#key li:visible").all_inner_texts() == [
        "bought",
        "sold",
        "volume",
        "3 verified",
        "1 different",
        "1 venue's own",
    ]


def test_chart_without_volumes_has_no_bars(visit: Visit, record: Record) -> None:
    record(10)
    page = visit.open()
    until(page, lambda: drawn(page, "up") > 100)
    expect(page.locator(VOLUMES)).to_have_count(0)
    expect(page.locator("#key li:visible")).to_have_count(0)
    expect(page.locator("#legend .volume")).to_have_text(NONE)
    expect(page.locator("#legend .volume")).to_have_attribute("title", "Unknown, which is not 0")
    record(1, later=1, **TRADED)
    until(page, lambda: page.locator(VOLUMES).count() and drawn(page, "buy", VOLUMES) > 0, seconds=30)


def test_keyboard_selects_candles_and_reports_differences(visit: Visit, marked: None, record: Record) -> None:
    page = visit.open("exchange=exchange1")
    expect(page.locator("#chart-panel")).to_have_attribute("data-state", "shown")
    note, said = page.locator("#chart-note"), page.locator("#chart-said")
    expect(note).to_be_hidden()
    select(page, 1)
    expect(note).to_be_hidden()
    expect(said).to_contain_text("close 1 003.00, volume unknown.")
    select(page, 1)
    expect(note).to_have_text("The venue's own candle, for want of ticks.")
    expect(page.locator("#legend .state")).to_have_text("venue's candle")
    select(page, 1)
    expect(note).to_have_text(
        "The venue's own candle differs.\nclose: 1001 here, 1001.5 at the venue\nvolume: 2.5 here, 2.75 at the venue"
    )
    expect(said).to_contain_text("close: 1001 here, 1001.5 at the venue")
    expect(page.locator("#legend .bought")).to_have_text("40\u202f%")
    visit.keep("differs")
    record(6, later=3, exchange="exchange2")
    page.locator("#exchange").select_option("")
    expect(note).to_be_hidden()
    until(page, lambda: drawn(page, "differs") > 0)
    page.get_by_role("button", name="1 different").click()
    expect(note).to_have_text("The venue's own candle differs.\nHow: see the candles of 1m on one exchange.")
    page.locator("#chart").focus()
    page.keyboard.press("Escape")
    expect(note).to_be_hidden()
    expect(said).to_have_text("")
    expect(page.locator("#legend .close")).to_have_text("1 003.00")


def test_pointed_candle_shows_its_difference(visit: Visit, marked: None) -> None:
    page = visit.open("exchange=exchange1")
    expect(page.locator("#chart-panel")).to_have_attribute("data-state", "shown")
    box = page.locator("#chart").bounding_box()
    assert box

    # To the left in a third of a candle, up to the one that differs; the page has shown each place before the next.
    for right in range(int(box["width"]) - 60, 0, -12):
        page.mouse.move(box["x"] + right, box["y"] + 60)
        page.evaluate(TWO_FRAMES)
        if page.locator("#legend .state").inner_text() == "different":
            break
    expect(page.locator("#chart-note")).to_contain_text("volume: 2.5 here, 2.75 at the venue")
    page.mouse.move(0, 0)
    expect(page.locator("#chart-note")).to_be_hidden()


def test_button_goes_to_the_next_marked_candle(visit: Visit, record: Record) -> None:
    record(300, **TRADED, verified=True)
    for back in (10, 250):
        record(1, later=-back, verified=False, venue_values=VENUE_VALUES)
    page = visit.open()
    button = page.get_by_role("button", name="2 different")
    button.click()
    first = page.locator("#legend .open").inner_text()
    button.press("Enter")
    expect(page.locator("#legend .open")).not_to_have_text(first)
    expect(page.locator("#legend .state")).to_have_text("different")
    expect(page.locator("#chart-newest")).to_be_visible()
    until(page, lambda: drawn(page, "differs") > 0)
    button.click()
    expect(page.locator("#legend .open")).to_have_text(first)


def test_verification_of_an_older_candle_is_shown(visit: Visit, record: Record) -> None:
    record(50, **TRADED)
    page = visit.open()
    until(page, lambda: drawn(page, "up") > 100)
    expect(page.get_by_role("button", name="verified")).to_have_count(0)
    record(1, later=-30, **TRADED, verified=True)
    expect(page.get_by_role("button", name="1 verified")).to_be_visible(timeout=40_000)


def test_incomplete_candles_are_marked(application: Application, look: Look, record: Record) -> None:
    record(5, **TRADED)
    visit = look(application.port)

    def incomplete(route: "object") -> None:
        answer = route.fetch()  # type: ignore[attr-defined]
        body = answer.json()
        if len(body["candles"]) > 1:
            body["candles"][-2]["complete"] = False
        route.fulfill(response=answer, json=body)  # type: ignore[attr-defined]

    visit.page.route("**/candles/reference/BTCUSDT?interval=1m*", incomplete)
    page = visit.open()
    until(page, lambda: drawn(page, "incomplete") > 0)
    page.get_by_role("button", name="1 incomplete").click()
    expect(page.locator("#chart-note")).to_have_text("Incomplete: trades of it were not received.")


def test_candles_with_a_filled_hole_are_marked(visit: Visit, record: Record, postgres_db: dict[str, Any]) -> None:
    record(5, **TRADED, verified=True)
    with psycopg.connect(**postgres_db) as connection:
        connection.execute(
            """
            insert into holes (exchange, pair_name, mode, after_id, before_id, from_time, to_time, state, reason,
                               found_at, changed_at)
            select exchange, pair_name, mode, 5, 9, min(timestamp) + interval '70 s', min(timestamp) + interval '75 s',
                   'filled', '', now(), now()
            from aggregates group by exchange, pair_name, mode
            """
        )
    page = visit.open()
    until(page, lambda: drawn(page, "filled") > 10)
    page.get_by_role("button", name="1 filled").click()
    expect(page.locator("#chart-note")).to_have_text(
        "The venue's own candle is the same.\nFilled: trades of it were missing, and have been fetched from the venue."
    )
    expect(page.locator("#legend .state")).to_have_text("verified, filled")


def test_own_candles_of_the_venue_are_marked(visit: Visit, record: Record) -> None:
    record(20, symbol="ETHUSDT", **TRADED)
    record(20, **TRADED, source="venue")
    page = visit.open("symbol=ETHUSDT")
    until(page, lambda: drawn(page, "up") > 100)
    assert drawn(page, "venue") == 0
    page.locator("#symbol").select_option("BTCUSDT")
    until(page, lambda: drawn(page, "venue") > 20)


# What was traded in 24 hours


def test_day_volume_sums_hours_and_minutes(visit: Visit, record: Record, exchanges: list[ScriptedExchange]) -> None:
    record(600, **TRADED)
    page = visit.open()
    traded = {name: page.locator(f"[data-traded={name}]") for name in ("volume", "turnover", "vwap")}
    expect(traded["volume"]).to_have_text("1 500")
    expect(traded["turnover"]).to_have_text("1.50\u202fM")
    expect(traded["vwap"]).to_have_text("1 000.00")
    expect(page.locator("#traded-from")).to_have_text(re.compile("^since "))
    record(1600, **TRADED)
    # The newest 14 of the 1440 minutes are not recorded; the one that runs is part of them.
    expect(traded["volume"]).to_have_text(re.compile(r"3.56[0-9]"))
    expect(page.locator("#traded-from")).to_have_text("")


def test_unknown_day_volume_is_a_dash(visit: Visit, record: Record) -> None:
    record(20, **TRADED)
    record(1, later=-5, volume=None)
    page = visit.open()
    volume = page.locator("[data-traded=volume]")
    expect(volume).to_have_text(NONE)
    expect(volume).to_have_attribute("title", re.compile("^Unknown, which is not 0"))


@pytest.mark.parametrize("viewport", [{"width": 1440, "height": 900}, {"width": 1024, "height": 768}, PHONE])
@pytest.mark.parametrize("colours", ["light", "dark"])
def test_legend_explains_every_mark(
    look: Look, application: Application, marked: None, viewport: dict[str, int], colours: str
) -> None:
    visit = look(application.port, viewport=viewport, color_scheme=colours)
    page = visit.open()
    until(page, lambda: drawn(page, "up") > 0)
    visit.keep(f"marks-{viewport['width']}-{colours}")
    page.locator("#key summary").click()
    for state in ("bought", "sold", "verified", "differs", "incomplete", "filled", "venue"):
        expect(page.locator(f"#key dl .swatch.{state}")).to_be_visible()
    visit.keep(f"legend-{viewport['width']}-{colours}")
    box = page.locator("#key dl").bounding_box()
    assert box
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= viewport["width"]
    assert visit.fits()
    page.keyboard.press("Escape")
    expect(page.locator("#key dl")).to_be_hidden()


@pytest.mark.parametrize("symbols", [3, 64])
def test_page_of_many_series_uses_little_time(start: Start, look: Look, symbols: int) -> None:
    """15 and 320 series at five exchanges that send a thousand ticks a second together."""
    names = ", ".join(f'"S{number:03}USDT"' for number in range(symbols))
    exchanges = ", ".join(f'{{name="venue{number}",address="127.0.0.1:{number}"}}' for number in range(1, 6))
    application = start(MODE="test", SYMBOLS=f"[{names}]", EXCHANGES=f"[{exchanges}]", GENERATOR__RATE=200)
    for width in (1440, 1024, 390):
        visit = look(application.port, viewport={"width": width, "height": 900})
        page = visit.open()
        expect(visit.price("venue5", "S000USDT")).to_have_text(re.compile("[0-9]"))
        until(page, lambda: drawn(page, "up") + drawn(page, "down") > 0)  # noqa: B023 - used at once
        share = busy(page, 3.0)
        print(f"{5 * symbols} series, {width} px: {share:.0%} of a core")
        visit.keep(f"series-{5 * symbols}-{width}")
        assert visit.fits()
        assert share < 0.5
        page.close()


def busy(page: Page, seconds: float) -> float:
    """The share of a core that the page's thread uses, in its own time, so that other processes do not count."""
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})

    def used() -> float:
        metrics = session.send("Performance.getMetrics")["metrics"]
        (duration,) = (each["value"] for each in metrics if each["name"] == "TaskDuration")
        return float(duration)

    before = used()
    page.wait_for_timeout(seconds * 1000)
    return (used() - before) / seconds
