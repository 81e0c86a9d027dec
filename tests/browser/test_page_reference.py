"""The reference price on the page: in the table, the title, the chart and the panels."""

import re

from playwright.sync_api import expect

from tests.browser.conftest import Look, Start, Visit
from tests.browser.drawing import drawn, until
from tests.support.application import Application, ScriptedExchange, now_ms

MINUS = "\u2212"

REFERENCE_OF = """
    async ([prices, ages]) => {
        const { referencePrice } = await import("/static/market/reference.js");
        const now = Date.now();
        const price = referencePrice(prices.map((price, index) => ({ price, at: now - ages[index] })), now);
        return price && { price: price.price, exchanges: price.exchanges };
    }
"""


def test_reference_price_moves_with_the_median_only(visit: Visit, exchanges: list[ScriptedExchange]) -> None:
    page = visit.open()
    for exchange, price in zip(exchanges, (100.0, 102.0, 180.0), strict=True):
        exchange.send(price)
    reference = visit.row().locator(".reference")
    expect(reference).to_have_text("102.000")
    expect(page).to_have_title("102.000 · BTCUSDT · MarketFlow")
    expect(page.locator("#legend .close")).to_have_text("102.000")
    expect(page.locator("#reference-price")).to_have_text("102.000")
    expect(page.locator("#reference-count")).to_have_text("median of 3 of 3")
    moved = reference.get_attribute("data-move")  # by the first prices, unless one frame shows them all
    exchanges[2].send(190.0)
    expect(visit.price("exchange3")).to_have_text("190.000")
    expect(reference).to_have_text("102.000")
    assert reference.get_attribute("data-move") == moved
    exchanges[1].send(101.0)
    expect(reference).to_have_text("101.000")
    expect(reference).to_have_attribute("data-move", "down")


def test_page_and_server_have_the_same_reference(
    application: Application, visit: Visit, exchanges: list[ScriptedExchange]
) -> None:
    page = visit.open()
    for prices in ((100.1, 100.3, 90.0), (0.1, 0.2, 7.0), (67123.45, 67120.01, 67140.99)):
        at = now_ms()
        for exchange, price in zip(exchanges, prices, strict=True):
            exchange.send(price, at=at)
            expect(visit.price(exchange.name)).to_contain_text(re.compile("[0-9]"))
        until(page, lambda: application.get("/prices/reference/BTCUSDT")["price"] == sorted(prices)[1])  # noqa: B023
        answer = application.get("/prices/reference/BTCUSDT")
        computed = page.evaluate(REFERENCE_OF, [prices, [0, 0, 0]])
        assert computed == {"price": answer["price"], "exchanges": answer["exchanges"]}


def test_two_fresh_prices_have_a_mean_without_noise(
    application: Application, visit: Visit, exchanges: list[ScriptedExchange]
) -> None:
    page = visit.open()
    exchanges[0].send(0.1)
    expect(visit.price("exchange1")).to_contain_text("0.1")
    exchanges[1].send(0.2)
    until(page, lambda: application.get("/prices/reference/BTCUSDT")["exchanges"] == 2)
    answer = application.get("/prices/reference/BTCUSDT")
    assert page.evaluate(REFERENCE_OF, [[0.1, 0.2, 5.0], [0, 14_000, 15_100]]) == {
        "price": answer["price"],
        "exchanges": 2,
    }
    assert page.evaluate(REFERENCE_OF, [[0.1], [15_100]]) is None


def test_chart_begins_with_the_reference(visit: Visit, record: "object", exchanges: list[ScriptedExchange]) -> None:
    record(30)  # type: ignore[operator]
    page = visit.open()
    until(page, lambda: drawn(page, "up") > 100)
    assert visit.asked("/candles/reference/BTCUSDT?interval=1m")
    expect(page.locator("#exchange")).to_have_value("")
    expect(page.locator("#exchange option").first).to_have_text("reference")
    page.get_by_role("button", name="exchange2", exact=True).click()
    expect(page.locator("#exchange")).to_have_value("exchange2")
    expect(page.get_by_role("button", name="exchange2", exact=True)).to_have_attribute("aria-pressed", "true")
    visit.row().locator(".reference").click()
    expect(page.locator("#exchange")).to_have_value("")
    visit.price("exchange3").click()
    expect(page.locator("#exchange")).to_have_value("exchange3")
    page.get_by_role("button", name="Reference", exact=True).click()
    expect(page.locator("#exchange")).to_have_value("")


def test_gap_names_where_to_buy_and_sell(visit: Visit, exchanges: list[ScriptedExchange]) -> None:
    page = visit.open()
    for exchange, price in zip(exchanges, (1990.0, 2010.0, 2005.0), strict=True):
        exchange.send(price)
    gap = visit.row().locator(".gap")
    expect(gap).to_contain_text("100 bp")
    expect(gap).to_have_attribute("title", re.compile(r"^Buy on exchange1, sell on exchange2: 20\.00"))
    expect(page.locator("#comparison-gap")).to_have_text("100 bp: buy on exchange1, sell on exchange2")
    expect(visit.row().locator("td.highest")).to_have_attribute("data-exchange", "exchange2")
    expect(visit.row().locator("td.lowest")).to_have_attribute("data-exchange", "exchange1")
    expect(page.locator("#market thead")).to_contain_text("Gap")
    assert "spread" not in page.locator("body").inner_text().lower()
    expect(page.locator("#comparison li .offset")).to_have_text([f"{MINUS}74.8 bp", "+24.9 bp", "0.0 bp"])


# The feeds


def test_header_counts_the_feeds_that_bring_prices(visit: Visit, exchanges: list[ScriptedExchange]) -> None:
    page = visit.open()
    expect(page.locator("#connection")).to_have_text("3 of 3 feeds")
    exchanges[1].close()
    expect(page.locator("#connection")).to_have_text("2 of 3 feeds")
    expect(page.locator("body")).to_have_attribute("data-fed", "some")
    exchanges[1].open()
    expect(page.locator("#connection")).to_have_text("3 of 3 feeds")


def test_live_mode_without_exchanges_explains_each_feed(start: Start, look: Look) -> None:
    names = '[{name="here",address="127.0.0.1:9"},{name="there",address="127.0.0.1:11"}]'
    application = start(MODE="test", EXCHANGES=names)
    application.switch("live")
    visit = look(application.port)
    page = visit.open()
    problem = page.locator("#feeds li").first
    expect(problem).to_contain_text("here")
    expect(problem).to_contain_text("127.0.0.1:9")
    expect(problem).to_contain_text("Connection refused")
    expect(problem).to_contain_text(re.compile(r"since \d\d:\d\d:\d\d"))
    expect(problem).to_contain_text(re.compile(r"next try (in \d+\ss|now)"))
    empty = page.locator("#no-feeds")
    expect(empty).to_contain_text("No feed of the live mode is connected")
    expect(empty).to_contain_text("marketflow --venues binance,kraken")
    expect(empty).to_contain_text("marketflow exchange --port 9")
    visit.keep("live-without-exchanges")
