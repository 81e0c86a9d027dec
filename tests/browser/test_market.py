"""The page at / in a real browser: what it shows is what was just fed."""

import re
from collections.abc import Callable

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import DESKTOP, PHONE, Look, Start, Visit
from tests.browser.drawing import AXIS, drawn, until
from tests.support.application import ScriptedExchange, now_ms

NONE, MINUS = "\u2013", "\u2212"


def now_at(visit: Visit, exchange: ScriptedExchange, price: float) -> None:
    """Send a price until the age of its row is "now", which it is for two seconds after each tick."""

    def shown() -> bool:
        exchange.send(price)
        return bool(visit.row().locator(".age").text_content() == "now")

    until(visit.page, shown)


def test_new_price_is_shown_at_once(visit: Visit, exchanges: list[ScriptedExchange]) -> None:
    page = visit.open()
    now_at(visit, exchanges[0], 67123.45)
    expect(visit.price("exchange1")).to_have_text("67 123.45")
    expect(visit.row().locator(".reference")).to_have_text("67 123.45")
    expect(page).to_have_title("67 123.45 · BTCUSDT · MarketFlow")
    exchanges[0].send(67124.5)
    expect(visit.price("exchange1")).to_have_text("67 124.50")
    expect(visit.price("exchange1")).to_have_attribute("data-move", "up")
    exchanges[0].send(67120)
    expect(visit.price("exchange1")).to_have_attribute("data-move", "down")
    exchanges[1].send(0.0812345, symbol="DOGEUSDT")
    expect(visit.price("exchange2", "DOGEUSDT")).to_have_text("0.081235")
    expect(visit.price("exchange1", "DOGEUSDT")).to_have_text(NONE)


DISAGREED = """
    async () => {
        const text = (place) => document.querySelector(place).textContent;
        const found = [];
        for (let count = 0; count < 120; count += 1) {
            await new Promise(requestAnimationFrame);
            await new Promise((done) => setTimeout(done)); // what is in the document now has been shown
            const row = "#market tr[data-symbol=BTCUSDT]";
            const newest = text(`${row} .reference`);
            const table = [...document.querySelectorAll(`${row} .quote`)].map((cell) => cell.textContent);
            const compared = [...document.querySelectorAll("#comparison .price")].map((one) => one.textContent);
            const shown = { newest, legend: text("#legend .close"), table: table.join(), compared: compared.join() };
            if (shown.newest !== shown.legend || shown.table !== shown.compared) found.push(shown);
        }
        return found;
    }
"""
"""What the table, the comparison and the chart's legend showed in the same frame, where they differed."""


def test_all_panels_show_the_same_moment(start: Start, look: Look) -> None:
    visit = look(start(MODE="test").port)
    page = visit.open("interval=1d")
    expect(page.locator("#legend .close")).to_have_text(re.compile("[0-9]"))
    first = visit.row().locator(".reference").text_content()
    assert page.evaluate(DISAGREED) == []
    assert visit.row().locator(".reference").text_content() != first


def test_values_of_a_candle_take_a_row_for_each_group(start: Start, look: Look) -> None:
    """One row of prices and one of traded amounts; no value wraps into a third row."""
    visit = look(start(MODE="test").port, viewport=DESKTOP)
    page = visit.open()
    expect(page.locator("#legend .vwap")).to_have_text(re.compile("[0-9]"))
    rows = "(lines) => lines.map((line) => new Set([...line.children].map((pair) => pair.offsetTop)).size)"
    assert page.locator("#legend .line:not(.overlays)").evaluate_all(rows) == [1, 1]


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (1366, 768)])
def test_three_exchanges_are_listed_on_low_screens(start: Start, look: Look, width: int, height: int) -> None:
    visit = look(start(MODE="test").port, viewport={"width": width, "height": height})
    page = visit.open()
    expect(page.locator("#comparison .price").last).to_have_text(re.compile("[0-9]"))
    expect(page.locator("#comparison-gap")).to_contain_text("buy on")
    assert page.locator("#comparison").evaluate("(one) => one.scrollHeight <= one.clientHeight")


def test_period_panel_shows_extremes_and_average(visit: Visit, exchanges: list[ScriptedExchange]) -> None:
    page = visit.open("period=1h")
    exchanges[0].send(100.0, 120.0)
    exchanges[1].send(110.0)
    values = page.locator("#figures")
    expect(values.locator("[data-figure=highest]")).to_have_text("120.000")
    expect(values.locator("[data-figure=lowest]")).to_have_text("100.000")
    expect(values.locator("[data-figure=average]")).to_have_text("110.000")
    expect(values.locator("[data-note=average]")).to_have_text("3 ticks")
    expect(values.locator("[data-note=highest]")).to_contain_text("exchange1")
    page.locator("#exchange").select_option("exchange2")
    expect(values.locator("[data-figure=highest]")).to_have_text("110.000")
    page.locator("#exchange").select_option("exchange3")
    expect(page.locator("#period-problem")).to_have_text("No tick in this period.")
    page.locator("#period").select_option("30d")
    assert "period=30d" in page.url


def test_chart_follows_each_tick(visit: Visit, exchanges: list[ScriptedExchange]) -> None:
    page = visit.open("interval=1d")
    exchanges[0].send(100.0)
    expect(page.locator("#legend .close")).to_have_text("100.000")
    exchanges[0].send(110.0)
    expect(page.locator("#legend .close")).to_have_text("110.000")
    until(page, lambda: drawn(page, "up") > 100)
    assert drawn(page, "down") == 0
    exchanges[0].send(90.0)
    expect(page.locator("#legend .close")).to_have_text("90.0000")
    until(page, lambda: drawn(page, "down") > 100)
    assert drawn(page, "up") == 0
    expect(page.locator("#legend .high")).to_have_text("110.0000")
    expect(page.locator("#legend .change")).to_have_text(f"{MINUS}10.00 %")
    # What the stream does not tell comes from the API in a while.
    expect(page.locator("#legend .ticks")).to_have_text("3")
    expect(page.locator("#legend .average")).to_have_text("100.0000")


def test_chart_follows_interval_symbol_and_exchange(
    visit: Visit, record: Callable[..., None], exchanges: list[ScriptedExchange]
) -> None:
    record(30)
    record(30, symbol="ETHUSDT", exchange="exchange2")
    page = visit.open()
    until(page, lambda: drawn(page, "up") > 1000)
    page.get_by_role("button", name="5m", exact=True).click()
    expect(page.locator("[data-interval='5m']")).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#chart-panel")).to_have_attribute("data-state", "shown")
    assert visit.asked("/candles/reference/BTCUSDT?interval=5m")
    expect(page.locator("#legend .close")).to_have_text("1 000.00")
    page.locator("#symbol").select_option("ETHUSDT")
    page.locator("#exchange").select_option("exchange2")
    expect(visit.row("ETHUSDT")).to_have_class(re.compile("chosen"))
    until(page, lambda: visit.asked("/candles/exchange2/ETHUSDT?interval=5m"))
    assert page.url.endswith("#symbol=ETHUSDT&exchange=exchange2&interval=5m")
    page.reload()
    visit.is_live()
    expect(page.locator("#symbol")).to_have_value("ETHUSDT")
    expect(page.locator("#exchange")).to_have_value("exchange2")
    expect(page.locator("[data-interval='5m']")).to_have_attribute("aria-pressed", "true")
    exchanges[1].send(1234.5, symbol="ETHUSDT")
    expect(page.locator("#legend .close")).to_have_text("1 234.50")
    visit.row("BTCUSDT").locator("td[data-exchange=exchange3]").click()
    expect(page.locator("#symbol")).to_have_value("BTCUSDT")
    expect(page.locator("#exchange")).to_have_value("exchange3")
    visit.row("SOLUSDT").get_by_role("button").click()
    expect(page.locator("#symbol")).to_have_value("SOLUSDT")
    expect(page.locator("#exchange")).to_have_value("exchange3")


def test_scrolling_left_loads_older_candles(visit: Visit, record: Callable[..., None]) -> None:
    record(1800)
    page = visit.open()
    expect(page.locator("#chart-panel")).to_have_attribute("data-state", "shown")
    assert not visit.asked("1m&to=")
    page.locator("#chart").focus()

    def asked_further_left(times: int) -> bool:
        page.keyboard.press("Shift+ArrowLeft")
        return len(visit.asked("1m&to=")) == times

    until(page, lambda: asked_further_left(1))
    expect(page.locator("#chart-newest")).to_be_visible()
    until(page, lambda: asked_further_left(2))
    page.locator("#chart-newest").click()
    expect(page.locator("#chart-newest")).to_be_hidden()
    page.mouse.move(0, 0)  # the legend shows the candle under the mouse
    expect(page.locator("#legend .close")).to_have_text("1 000.00")


def test_price_on_the_axis_is_the_newest_when_scrolled(
    visit: Visit, record: Callable[..., None], exchanges: list[ScriptedExchange]
) -> None:
    record(300)
    page = visit.open()
    exchanges[0].send(860.0, 850.0)  # all the others rise
    until(page, lambda: drawn(page, "down", AXIS) > 100)
    page.locator("#chart").focus()

    def gone_from_sight() -> bool:
        page.keyboard.press("Shift+ArrowLeft")
        return page.locator("#chart-newest").is_visible()

    until(page, gone_from_sight)
    visit.keep("scrolled-back")
    assert drawn(page, "down", AXIS) > 100
    assert drawn(page, "up", AXIS) == 0


def test_late_and_simultaneous_candles_are_all_drawn(visit: Visit, record: Callable[..., None]) -> None:
    record(10)
    page = visit.open()
    expect(page.locator("#legend .close")).to_have_text("1 000.00")
    record(1, later=2)
    record(1, later=4)
    expect(page.locator("#legend .close")).to_have_text("1 004.00")
    until(page, lambda: drawn(page, "up") > 0)
    before = drawn(page, "up")
    record(1, later=3)  # in between
    until(page, lambda: drawn(page, "up") > before)


def test_empty_page_says_that_there_are_no_prices(visit: Visit) -> None:
    page = visit.open()
    expect(page.locator("#market-empty")).to_be_visible()
    expect(page.locator("#chart-cover-text")).to_contain_text("No candles of BTCUSDT yet.")
    expect(page.locator("#period-problem")).to_have_text("No tick in this period.")
    expect(visit.price("exchange1")).to_have_text(NONE)
    expect(page.locator("#feeds li .state")).to_have_text(["connected"] * 3)
    visit.keep("empty")


def test_first_tick_fills_the_empty_page(visit: Visit, exchanges: list[ScriptedExchange]) -> None:
    page = visit.open()
    expect(page.locator("#market-empty")).to_be_visible()
    exchanges[0].send(5.0)
    expect(page.locator("#market-empty")).to_be_hidden()
    expect(page.locator("#chart-panel")).to_have_attribute("data-state", "shown")
    expect(page.locator("[data-figure=highest]")).to_have_text("5.0000")


def test_stale_price_is_marked_and_not_compared(start: Start, look: Look, exchanges: list[ScriptedExchange]) -> None:
    visit = look(start(FLOW__MAX_CLOCK_SKEW_SECONDS=120).port)
    page = visit.open()
    for exchange in exchanges:
        exchange.send(100.0 + exchange.port % 7, at=now_ms() - 40_000)
    row = visit.row()
    expect(row).to_have_class("chosen stale")
    expect(row.locator(".age")).to_have_text(re.compile(r"^([45][0-9]\ss|1\smin)$"))
    expect(row.locator(".gap")).to_have_text(NONE)
    expect(page.locator("#comparison li.stale")).to_have_count(3)
    expect(page).to_have_title(re.compile(r"^10[0-6]\.000 \(stale\) · BTCUSDT"))
    visit.keep("stale")
    now_at(visit, exchanges[1], 101.0)
    expect(row).to_have_class("chosen")
    expect(page.locator("#comparison li.stale")).to_have_count(2)


def test_health_panel_shows_feeds_and_stores(visit: Visit, exchanges: list[ScriptedExchange]) -> None:
    page = visit.open()
    expect(page.locator("#feeds li[data-level=good]")).to_have_count(3)
    expect(page.locator("#stores li")).to_have_text(["PostgreSQLok", "Redisok"])
    expect(page.locator("#health-summary")).to_have_text("all well")
    exchanges[1].close()
    expect(page.locator("#feeds li .state")).to_have_text(["connected", "connecting", "connected"])
    expect(page.locator("#health-summary")).to_have_text("degraded")
    exchanges[1].open()
    expect(page.locator("#feeds li[data-level=good]")).to_have_count(3)


def test_page_works_with_one_symbol_and_exchange(start: Start, look: Look) -> None:
    names = '[{name="only",address="127.0.0.1:1"}]'
    visit = look(start(MODE="test", SYMBOLS='["BTCUSDT"]', EXCHANGES=names).port)
    page = visit.open()
    expect(page.locator("#market tbody tr")).to_have_count(1)
    expect(visit.price("only")).to_have_text(re.compile("[0-9]"))
    expect(visit.row().locator(".gap")).to_have_text(NONE)


def test_filter_narrows_two_hundred_symbols(start: Start, look: Look) -> None:
    names = ", ".join(f'"S{number:03}USDT"' for number in range(200))
    visit = look(start(MODE="test", SYMBOLS=f"[{names}]").port)
    page = visit.open()
    expect(page.locator("#market tbody tr")).to_have_count(200)
    expect(visit.price("exchange1", "S000USDT")).to_have_text(re.compile("[0-9]"))
    assert visit.price("exchange1", "S199USDT").text_content() == ""  # out of sight, so it is not drawn
    page.keyboard.press("/")
    page.keyboard.type("19")
    expect(page.locator("#market-count")).to_have_text("12 of 200")
    page.keyboard.press("Enter")
    expect(page.locator("#symbol")).to_have_value("S019USDT")
    page.keyboard.type("9")
    expect(page.locator("#market-count")).to_have_text("1 of 200")
    expect(visit.price("exchange1", "S199USDT")).to_have_text(re.compile("[0-9]"))
    page.keyboard.type("x")
    expect(page.locator("#market-blank")).to_have_text("No symbol has “199x” in its name")
    page.keyboard.press("Escape")
    expect(page.locator("#market-count")).to_have_text("200")
    expect(visit.row("S019USDT")).to_be_in_viewport()
    visit.keep("many")


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_selected_symbol_of_many_is_scrolled_into_view(start: Start, look: Look, viewport: dict[str, int]) -> None:
    names = ", ".join(f'"S{number:03}USDT"' for number in range(200))
    visit = look(start(MODE="test", SYMBOLS=f"[{names}]").port, viewport=viewport)
    page = visit.open("symbol=S150USDT")
    if viewport is DESKTOP:
        expect(visit.row("S150USDT")).to_be_in_viewport()
    assert page.evaluate("window.scrollY") == 0
    page.locator(".market").scroll_into_view_if_needed()  # on a phone the chart is first
    expect(visit.row("S150USDT")).to_be_in_viewport()
    expect(visit.price("exchange1", "S150USDT")).to_have_text(re.compile("[0-9]"))
    page.locator("#filter").fill("S001")
    expect(visit.row("S150USDT")).to_be_hidden()
    page.locator("#filter").clear()
    expect(visit.row("S150USDT")).to_be_in_viewport()
    height = page.evaluate("document.querySelector('.market').offsetHeight")
    assert height < viewport["height"] * 0.8
    visit.keep(f"many-{viewport['width']}")


def test_long_names_do_not_hide_prices(start: Start, look: Look) -> None:
    name = "ALONGNAMEOFASYMBOLTHATNOBODYKNOW"
    application = start(MODE="test", SYMBOLS=f'["BTCUSDT", "{name}"]')
    for viewport in (DESKTOP, PHONE | {"width": 320}):
        visit = look(application.port, viewport=viewport)
        visit.open()
        expect(visit.price("exchange3", name)).to_have_text(re.compile("[0-9]"))
        expect(visit.row(name).get_by_role("button")).to_have_attribute("title", name)
        visit.row(name).scroll_into_view_if_needed()  # on a phone the chart is first
        expect(visit.row(name).locator(".age")).to_be_in_viewport(ratio=1)
        assert visit.fits()
        visit.keep(f"long-{viewport['width']}")


CUT = """
    (elements) => elements
        .filter((one) => one.scrollWidth > one.clientWidth || one.getBoundingClientRect().right > innerWidth)
        .map((one) => one.textContent)
"""
"""Texts of elements that have no room for them."""


def test_phone_shows_the_page_without_horizontal_scrolling(start: Start, look: Look) -> None:
    application = start(MODE="test")
    for width in (320, 360, PHONE["width"]):
        visit = look(application.port, viewport=PHONE | {"width": width}, has_touch=True, is_mobile=True)
        visit.open()
        visit.row("SOLUSDT").scroll_into_view_if_needed()
        expect(visit.price("exchange3", "SOLUSDT")).to_have_text(re.compile("[0-9]"))
        expect(visit.page.locator("#chart-panel")).to_have_attribute("data-state", "shown")
        until(visit.page, lambda: drawn(visit.page, "up") + drawn(visit.page, "down") > 0)  # noqa: B023 - used at once
        assert visit.fits()
        assert visit.page.locator("#comparison li > *").evaluate_all(CUT) == []
        visit.keep(f"phone-{width}")


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_page_follows_the_colour_scheme_of_the_system(start: Start, look: Look, colours: str) -> None:
    visit = look(start(MODE="test").port, color_scheme=colours)
    page = visit.open()
    expect(page.locator("#market .reference")).to_have_text([re.compile("[0-9]")] * 5)
    expect(page.locator("#legend .ticks")).to_have_text(re.compile("[0-9]"))
    visit.keep(f"desktop-{colours}")
    brightness = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)")
    assert (sum(brightness) > 384) is (colours == "light")
    other = "dark" if colours == "light" else "light"
    page.locator("#theme").click()
    expect(page.locator("html")).to_have_attribute("data-colours", other)
    page.reload()
    expect(page.locator("html")).to_have_attribute("data-colours", other)
