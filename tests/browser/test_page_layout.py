"""Where things stand on the page: many series, narrow windows, fingers, screen readers, and colours."""

import itertools
import math
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]
from playwright.sync_api import Page, expect
from psycopg import sql

from tests.browser.conftest import DESKTOP, PHONE, Look, Start, Visit
from tests.browser.drawing import drawn, until
from tests.support.application import Application, ScriptedExchange
from tests.support.servers import wait_until

TOUCH = {"has_touch": True, "is_mobile": True}
VIEWPORTS = [DESKTOP, {"width": 1024, "height": 768}, PHONE, {"width": 320, "height": 700}]

EIGHT = [*(f"venue{number}" for number in range(1, 8)), "averylongname"]


def exchanges_of(names: list[str]) -> str:
    each = ", ".join("{name=" + repr(name) + ",address='127.0.0.1:9'}" for name in names)
    return f"[{each}]"


@pytest.fixture
def crowded(start: Start) -> Application:
    """Forty symbols on eight exchanges."""
    symbols = ", ".join(f'"S{number:03}USDT"' for number in range(40))
    return start(MODE="test", SYMBOLS=f"[{symbols}]", EXCHANGES=exchanges_of(EIGHT), GENERATOR__RATE=100)


def serious(page: Page) -> list[str]:
    """What axe finds on the page that is critical or serious."""
    violations = Axe().run(page).response["violations"]
    found = [each for each in violations if each["impact"] in ("critical", "serious")]
    return [f"{each['id']}: {each['nodes'][0]['html'][:200]}" for each in found]


@pytest.mark.parametrize("viewport", VIEWPORTS, ids=lambda viewport: str(viewport["width"]))
@pytest.mark.parametrize("colours", ["light", "dark"])
def test_axe_finds_nothing_serious(start: Start, look: Look, viewport: dict[str, int], colours: str) -> None:
    touch = TOUCH if viewport["width"] < 500 else {}
    visit = look(start(MODE="test").port, viewport=viewport, color_scheme=colours, reduced_motion="reduce", **touch)
    page = visit.open("overlays=ma20")
    expect(page.locator("#chart-panel")).to_have_attribute("data-state", "shown")
    expect(visit.price("exchange3", "BTCUSDT")).to_have_text(re.compile("[0-9]"))
    assert serious(page) == []
    visit.keep(f"page-{viewport['width']}-{colours}")
    if viewport is DESKTOP:
        page.keyboard.press("?")
        assert serious(page) == []


SMALL = """
    () => [...document.querySelectorAll("button, select, input, summary, nav a")]
        .filter((one) => one.checkVisibility({ visibilityProperty: true }))
        .map((one) => [one.id || one.textContent.trim(), one.getBoundingClientRect()])
        .filter(([, { width, height }]) => width < 44 || height < 44)
        .map(([name, { width, height }]) => `${name}: ${width} x ${height}`)
"""
"""What can be pressed and is smaller than 44 pixels."""


@pytest.mark.parametrize("width", [320, 390])
def test_phone_has_the_chart_first_and_large_targets(
    look: Look, application: Application, exchanges: list[ScriptedExchange], width: int
) -> None:
    visit = look(application.port, viewport=PHONE | {"width": width}, **TOUCH)
    page = visit.open()
    exchanges[0].send(100.0, 101.0)
    expect(page.locator("#chart-panel")).to_have_attribute("data-state", "shown")
    assert page.evaluate(SMALL) == []
    chart, prices = (page.locator(place).bounding_box() for place in ("#chart-panel", "#market"))
    assert chart
    assert prices
    assert chart["y"] < prices["y"]
    assert visit.fits()


CUT = """
    () => [...document.querySelectorAll("main *, header *")]
        .filter((one) => [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim()))
        .filter((one) => one.checkVisibility())
        .filter((one) => one.scrollWidth > one.clientWidth + 1 && getComputedStyle(one).overflow !== "visible")
        .filter((one) => !one.closest(".unseen"))
        .map((one) => one.textContent)
"""
"""Texts that are cut off."""


@pytest.mark.parametrize("width", [1440, 1180, 1024, 700])
def test_eight_exchanges_and_forty_symbols_fit(crowded: Application, look: Look, width: int) -> None:
    visit = look(crowded.port, viewport={"width": width, "height": 800})
    page = visit.open()
    expect(visit.price("averylongname", "S000USDT")).to_have_text(re.compile("[0-9]"))
    expect(visit.row("S000USDT").locator(".trend")).to_have_text(re.compile("%"))  # it widens the table
    assert visit.fits()
    assert page.locator("#comparison").evaluate("(one) => one.scrollHeight <= one.clientHeight")
    assert page.evaluate(CUT) == []
    market = page.locator(".market")
    expect(market).to_have_attribute("data-more", re.compile("bottom"))
    # At 1024 px that depends on how much of 24 hours there is to be named.
    if page.locator(".scroller").evaluate("(one) => one.scrollWidth > one.clientWidth + 1"):
        expect(market).to_have_attribute("data-more", re.compile("right"))
        symbol = visit.row("S000USDT").locator("th")
        before = symbol.bounding_box()
        page.locator(".scroller").evaluate("(one) => { one.scrollLeft = one.scrollWidth; }")
        expect(market).to_have_attribute("data-more", re.compile("left"))
        expect(market).not_to_have_attribute("data-more", re.compile("right"))
        assert symbol.bounding_box() == before
    else:
        assert width == 1024
    expect(visit.row("S000USDT").locator(".age")).to_be_in_viewport(ratio=0.99)
    visit.keep(f"eight-exchanges-{width}")


LONG_NAMES = [
    "first-long-exchange-name",
    "second_long_exchange_name",
    "SomeExchange.International",
    "amsterdam-stock-exchange",
]

LINES = """
    (cells) => cells.flatMap((cell) => {
        const range = document.createRange();
        const letters = [...cell.childNodes].filter((node) => node.nodeType === Node.TEXT_NODE)
            .flatMap((node) => [...node.textContent].map((letter, at) => [node, letter, at]));
        let line = "", top = null, lines = [];
        for (const [node, letter, at] of letters) {
            range.setStart(node, at);
            range.setEnd(node, at + 1);
            const here = range.getBoundingClientRect().top;
            if (top !== null && here !== top) { lines.push(line); line = ""; }
            top = here;
            line += letter;
        }
        return [...lines, line];
    })
"""
"""The lines of the texts of elements."""


@pytest.mark.parametrize(
    "names", [["exchange1", "exchange2", "exchange3", "exchange4"], LONG_NAMES], ids=["short", "long"]
)
def test_four_exchanges_are_all_listed_and_headings_wrap_between_words(
    start: Start, look: Look, names: list[str]
) -> None:
    symbols = "BTCUSDT,DOGEUSDT,TONUSDT,SOLUSDT,RENDERUSDT"
    application = start(MODE="test", SYMBOLS=symbols, EXCHANGES=exchanges_of(names))
    visit = look(application.port, viewport=DESKTOP)
    page = visit.open()
    expect(page.locator("#comparison li")).to_have_count(4)
    expect(page.locator("#comparison .price").last).to_have_text(re.compile("[0-9]"))
    assert page.locator("#comparison").evaluate("(one) => one.scrollHeight <= one.clientHeight")
    lines = page.locator("#market thead th").evaluate_all(LINES)
    words = {word for name in names for word in re.findall(r"[A-Z]?[a-z]+[0-9]?[-_.]?", name)}
    assert {word for line in lines for word in re.findall(r"[A-Z]?[a-z]+[0-9]?[-_.]?", line)} - words == {
        *("Symbol", "Reference", "h", "Gap", "Age")
    }
    assert visit.row("RENDERUSDT").locator(".symbol").evaluate("(one) => one.scrollWidth <= one.clientWidth")
    visit.keep(f"four-exchanges-{names[0]}")


def test_table_of_four_exchanges_fits_its_panel(start: Start, look: Look) -> None:
    venues = ["binance", "kraken", "coinbase", "okx"]
    visit = look(start(MODE="test", EXCHANGES=exchanges_of(venues)).port, viewport=DESKTOP)
    page = visit.open()
    expect(visit.row("BTCUSDT").locator(".percent")).to_have_text(re.compile("%"))
    expect(page.locator(".market")).not_to_have_attribute("data-more", re.compile("right"))
    assert page.locator(".scroller").evaluate("(one) => one.scrollWidth <= one.clientWidth")


PLACES = """
    () => [...document.querySelectorAll("#market thead th")].map((one) => Math.round(one.getBoundingClientRect().left))
"""
"""Where the columns of the table begin."""


def test_columns_stay_while_gaps_change(start: Start, look: Look, exchanges: list[ScriptedExchange]) -> None:
    for exchange, name in zip(exchanges, ("binance", "kraken", "okx"), strict=True):
        exchange.name = name
    visit = look(start().port, viewport={"width": 1024, "height": 900})
    page = visit.open()
    places = set()
    for prices, text in [
        ((1000.0, 1001.0, 1000.5), "10.0 bp buy on binance, sell on kraken"),
        ((1010.0, 1001.0, 1000.5), "94.5 bp buy on okx, sell on binance"),
        ((1001.5, 1001.0, 1000.5), "10.0 bp buy on okx, sell on binance"),
        ((1000.6, 1001.0, 1000.5), "5.0 bp buy on okx, sell on kraken"),
    ]:
        for exchange, price in zip(exchanges, prices, strict=True):
            exchange.send(price)
        expect(visit.row().locator(".gap")).to_have_text(re.compile(text.replace(" ", r"\s*")))
        places.add(tuple(page.evaluate(PLACES)))
    assert len(places) == 1


def test_phone_shows_the_whole_gap(start: Start, look: Look) -> None:
    visit = look(start(MODE="test", EXCHANGES=exchanges_of(LONG_NAMES)).port, viewport=PHONE, **TOUCH)
    page = visit.open()
    expect(visit.row("BTCUSDT").locator(".gap")).to_have_text(re.compile("buy on"))
    assert page.locator(".scroller").evaluate("(one) => one.scrollWidth <= one.clientWidth")


def test_collapsed_panel_stays_collapsed(visit: Visit) -> None:
    page = visit.open()
    title = page.get_by_role("button", name="Period", exact=True)
    expect(title).to_have_attribute("aria-expanded", "true")
    title.click()
    expect(page.locator("#figures")).to_be_hidden()
    page.reload()
    visit.is_live()
    expect(page.locator("#figures")).to_be_hidden()
    expect(title).to_have_attribute("aria-expanded", "false")
    title.press("Enter")
    expect(page.locator("#figures")).to_be_visible()


def oklab(colour: str) -> list[float]:
    """The colour in a space whose distances are those that are seen (OKLab)."""
    red, green, blue = (linear(int(channel)) for channel in re.findall("[0-9]+", colour)[:3])
    cones = (
        0.4122214708 * red + 0.5363325363 * green + 0.0514459929 * blue,
        0.2119034982 * red + 0.6806995451 * green + 0.1073969566 * blue,
        0.0883024619 * red + 0.2817188376 * green + 0.6299787005 * blue,
    )
    long, middle, short = (cone ** (1 / 3) for cone in cones)
    return [
        0.2104542553 * long + 0.7936177850 * middle - 0.0040720468 * short,
        1.9779984951 * long - 2.4285922050 * middle + 0.4505937099 * short,
        0.0259040371 * long + 0.7827717662 * middle - 0.8086757660 * short,
    ]


def linear(channel: int) -> float:
    value = channel / 255
    return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_twelve_line_colours_can_be_told_apart(look: Look, application: Application, colours: str) -> None:
    page = look(application.port, color_scheme=colours).open()
    names = [f"--line-{number}" for number in range(1, 13)]
    style = "(names) => names.map((name) => getComputedStyle(document.documentElement).getPropertyValue(name))"
    lines = page.evaluate(style, names)
    assert all(re.match("rgb", line) for line in lines)
    distances = [math.dist(oklab(one), oklab(other)) for one, other in itertools.combinations(lines, 2)]
    assert min(distances) > 0.08  # the smallest that is seen at all is about 0.02


# The last 24 hours of each symbol


def test_row_shows_the_change_of_24_hours(
    visit: Visit, record: Callable[..., None], postgres_db: dict[str, Any], exchanges: list[ScriptedExchange]
) -> None:
    record(90, symbol="ETHUSDT")
    record(1700)
    columns = ("average_price", "min_price", "max_price", "open_price", "close_price")
    with psycopg.connect(**postgres_db) as connection:  # so that none is below zero
        changes = sql.SQL(", ").join(sql.SQL("{0} = {0} + 1000").format(sql.Identifier(name)) for name in columns)
        connection.execute(sql.SQL("update aggregates set {} where pair_name = 'BTCUSDT'").format(changes))
    exchanges[0].send(2000.0)  # 560 to 620 a day ago
    exchanges[0].send(900.0, symbol="ETHUSDT")
    visit.open()
    row = visit.row()
    expect(row.locator(".percent")).to_have_text(re.compile(r"^\+[1-9][0-9]{2}\.[0-9]{2}\s%$"))
    expect(row.locator(".since")).to_have_text("")
    expect(row.locator(".trend")).to_have_attribute("title", re.compile("^Since "))
    expect(row.locator(".spark polyline")).to_have_attribute("points", re.compile(r"^([0-9.]+,[0-9.]+ ){20}"))
    expect(visit.row("DOGEUSDT").locator(".percent")).to_have_text("\u2013")
    expect(visit.row("ETHUSDT").locator(".trend")).to_have_attribute("data-move", "down")
    expect(visit.row("ETHUSDT").locator(".since")).to_have_text(re.compile(r"^[12]\sh|min$"))


TRENDS_AT_ONCE = """
    const fetched = window.fetch;
    window.trends = { running: 0, most: 0 };
    window.fetch = async (path, options) => {
        if (!/candles\\/reference\\/.*interval=1h/.test(path)) return fetched(path, options);
        window.trends.running += 1;
        window.trends.most = Math.max(window.trends.most, window.trends.running);
        try { return await fetched(path, options); } finally { window.trends.running -= 1; }
    };
"""
"""Counts the requests for trends under way, inside the page: Playwright reports the end of a request late."""


def test_trends_take_one_request_a_symbol(crowded: Application, look: Look) -> None:
    symbols = [f"S{number:03}USDT" for number in range(40)]
    for symbol in symbols:  # without candles the page requests a trend again
        wait_until(lambda: crowded.get(f"/candles/reference/{symbol}", interval="1h")["candles"])  # noqa: B023
    visit = look(crowded.port, viewport={"width": 1024, "height": 3000})
    visit.page.add_init_script(TRENDS_AT_ONCE)
    page = visit.open()
    for symbol in symbols:
        expect(visit.row(symbol).locator(".percent")).to_have_text(re.compile("[0-9]"))
    page.wait_for_timeout(3000)  # each row is drawn three times
    asked = [url for url in visit.asked("/candles/reference/") if "interval=1h" in url]
    assert sorted(urlsplit(url).path for url in asked) == [f"/candles/reference/{symbol}" for symbol in symbols]
    assert page.evaluate("window.trends.most") == 2


def test_first_tick_is_followed_by_its_trend(visit: Visit, exchanges: list[ScriptedExchange]) -> None:
    page = visit.open()
    expect(page.locator("#market-empty")).to_be_visible()
    exchanges[0].send(100.0)
    expect(visit.row().locator(".percent")).to_have_text(re.compile("[0-9]"), timeout=10_000)
    assert not [url for url in visit.asked("interval=1h") if "reference/ETHUSDT" in url]  # of which there is no price


PAINTS = """
    async (ms) => {
        let [painted, dirty, counting] = [0, false, true];
        // After a frame: what has changed before it, by timers, and in it, by charts, is one paint.
        const after = new MessageChannel();
        after.port1.onmessage = () => { painted += dirty; dirty = false; };
        const count = () => { after.port2.postMessage(0); if (counting) requestAnimationFrame(count); };
        requestAnimationFrame(count);
        const seen = new MutationObserver(() => { dirty = true; });
        const all = { subtree: true, childList: true, characterData: true, attributes: true };
        const began = performance.now();
        seen.observe(document.querySelector("main"), all);
        await new Promise((done) => setTimeout(done, ms));
        counting = false;
        return [painted, (performance.now() - began) / 1000]; // a busy browser runs a timer late
    }
"""


def test_page_is_painted_at_most_five_times_a_second(start: Start, look: Look) -> None:
    page = look(start(MODE="test", GENERATOR__RATE=200).port).open()
    until(page, lambda: drawn(page, "up") + drawn(page, "down") > 0)
    painted, seconds = page.evaluate(PAINTS, 4000)
    assert 4 < painted <= seconds * 5 + 1
