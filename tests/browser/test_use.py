"""Using the page: the switch, a connection that is lost, the keyboard, and colours that can be read."""

import re
from collections.abc import Callable

import pytest
from playwright.sync_api import Page, Route, expect

from tests.browser.conftest import PHONE, Look, Start, Visit
from tests.browser.drawing import drawn, until
from tests.support.application import Application, ScriptedExchange
from tests.support.proxy import Proxy

LOST = r"WebSocket|ERR_CONNECTION|ERR_EMPTY_RESPONSE|ERR_INCOMPLETE_CHUNKED_ENCODING|ERR_ABORTED"
"""What a browser says of a connection that a test has cut."""

DIGITS = re.compile("[0-9]")

UNAUTHORIZED = r"status of 401"


# The mode


def test_mode_switch_replaces_the_prices(start: Start, look: Look) -> None:
    application = start()
    visit = look(application.port)
    page = visit.open()
    live, test = (page.get_by_role("button", name=name, exact=True) for name in ("Live", "Test"))
    expect(live).to_have_attribute("aria-pressed", "true")
    test.click()
    expect(page.get_by_role("dialog")).to_contain_text("Switch to test mode?")
    visit.keep("dialog")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    assert application.get("/mode") == {"mode": "live"}
    test.click()
    page.get_by_role("button", name="Switch", exact=True).click()
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(test).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#feeds li .state")).to_have_text(["generated"] * 3)
    expect(visit.price("exchange1")).to_have_text(DIGITS)
    assert application.get("/mode") == {"mode": "test"}


def test_dialog_shows_which_exchanges_answer(start: Start, look: Look, exchanges: list[ScriptedExchange]) -> None:
    application = start(MODE="test")
    visit = look(application.port)
    page = visit.open()
    exchanges[1].close()
    page.get_by_role("button", name="Live", exact=True).click()
    lines = page.locator("#switch-exchanges li")
    expect(lines.locator(".state")).to_have_text(["answers", "does not answer", "answers"])
    expect(lines.nth(1)).to_contain_text("Connection refused")
    visit.keep("dialog-live")
    exchanges[1].open()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Live", exact=True).click()
    page.locator("#switch-do").click()
    expect(page.locator("#feeds li .state").first).to_have_text("connected")
    page.get_by_role("button", name="Test", exact=True).click()
    expect(page.locator("#switch-exchanges")).to_be_hidden()


def test_sent_mode_switch_cannot_be_cancelled(application: Application, visit: Visit) -> None:
    page = visit.open()
    held: list[Route] = []
    page.route("**/mode/test", lambda route: held.append(route))
    page.get_by_role("button", name="Test", exact=True).click()
    page.locator("#switch-do").click()
    until(page, lambda: held)
    expect(page.locator("#switch-cancel")).to_be_disabled()
    for _ in range(3):
        page.keyboard.press("Escape")
    page.mouse.click(5, 400)
    expect(page.get_by_role("dialog")).to_be_visible()
    expect(page.locator("#switch-do")).to_have_text("Switching …")
    held[0].continue_()
    expect(page.get_by_role("dialog")).to_be_hidden()
    assert application.get("/mode") == {"mode": "test"}


def test_mode_switch_of_another_client_is_shown(
    application: Application, visit: Visit, exchanges: list[ScriptedExchange]
) -> None:
    page = visit.open()
    exchanges[0].send(123456.0)
    expect(visit.price("exchange1")).to_have_text("123 456.00")
    application.switch("test")
    expect(page.locator("#modes [data-mode=test]")).to_have_attribute("aria-pressed", "true")
    expect(visit.price("exchange1")).not_to_have_text("123 456.00")
    expect(page.get_by_text("Test mode: generated prices")).to_be_visible()
    newest = visit.row("ETHUSDT").locator(".reference")
    expect(newest).to_have_attribute("data-move", re.compile("up|down"))
    application.switch("live")
    expect(page.get_by_text("Test mode: generated prices")).to_be_hidden()
    expect(newest).to_have_text("\u2013")
    expect(newest).not_to_have_attribute("data-move", re.compile("up|down"))
    expect(page.locator("#modes [data-mode=live]")).to_have_attribute("aria-pressed", "true")
    expect(visit.price("exchange1")).to_have_text("123 456.00")


def test_token_is_requested_and_kept_for_the_tab(start: Start, look: Look) -> None:
    application = start(HTTP__TOKEN="swordfish-swordfish")
    visit = look(application.port)
    visit.expected.append(UNAUTHORIZED)
    page = visit.open()
    page.get_by_role("button", name="Test", exact=True).click()
    switch, token, problem = (
        page.locator("#switch-do"),
        page.get_by_role("dialog").get_by_label("Token"),
        page.locator("#switch-problem"),
    )
    expect(token).to_be_hidden()
    switch.click()
    expect(token).to_be_focused()
    expect(problem).to_have_text("Switching the mode needs the token of this MarketFlow.")
    token.fill("schwertfisch\u00e4")
    page.keyboard.press("Enter")
    expect(problem).to_have_text("A token has only ASCII letters, digits and signs.")
    token.fill("trout")
    page.keyboard.press("Enter")
    expect(problem).to_have_text("This token is not the right one.")
    visit.keep("token")
    assert application.get("/mode") == {"mode": "live"}
    token.fill("swordfish-swordfish")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(page.locator("#modes [data-mode=test]")).to_have_attribute("aria-pressed", "true")
    page.get_by_role("button", name="Live", exact=True).click()
    switch.click()
    expect(page.get_by_role("dialog")).to_be_hidden()
    assert application.get("/mode") == {"mode": "live"}
    assert "swordfish-swordfish" not in page.content()
    assert not [url for url in visit.requests if "swordfish-swordfish" in url]


def test_rejected_mode_switch_shows_the_reason(start: Start, look: Look) -> None:
    application = start()
    with Proxy(application.port) as proxy:
        visit = look(proxy.port)
        visit.expected.append(LOST)
        page = visit.open()
        page.get_by_role("button", name="Test", exact=True).click()
        proxy.refuse()
        page.locator("#switch-do").click()
        expect(page.locator("#switch-problem")).to_have_text("The mode was not switched. MarketFlow does not answer.")
        expect(page.locator("#switch-do")).to_be_enabled()


# The connection


def test_lost_connection_is_shown_until_reconnected(
    application: Application, look: Look, exchanges: list[ScriptedExchange]
) -> None:
    with Proxy(application.port) as proxy:
        visit = look(proxy.port)
        visit.expected.append(LOST)
        page = visit.open()
        exchanges[0].send(100.0)
        expect(visit.price("exchange1")).to_have_text("100.000")
        proxy.refuse()
        expect(page.locator("#banner")).to_be_visible()
        expect(page.locator("#banner-text")).to_have_text("The connection is lost. Showing the last known prices.")
        expect(page.locator("#banner-countdown")).to_contain_text("Trying again in")
        expect(page.locator("#connection")).to_have_text("Disconnected")
        expect(page).to_have_title("Disconnected · BTCUSDT · MarketFlow")
        for place in ("#market", "#feeds", ".gap-line"):
            assert page.locator(place).evaluate("(one) => getComputedStyle(one).filter") == "grayscale(1)"
        expect(page.locator("#health-summary")).to_have_text("unknown while disconnected")
        visit.keep("disconnected")
        exchanges[0].send(200.0)
        proxy.heal()
        expect(visit.price("exchange1")).to_have_text("200.000")
        expect(page.locator("#banner")).to_be_hidden()
        expect(page.locator("#connection")).to_have_text("3 of 3 feeds")
        expect(page.locator("#health-summary")).to_have_text("all well")
        exchanges[0].send(300.0)
        expect(visit.price("exchange1")).to_have_text("300.000")
        expect(page.locator("#legend .close")).to_have_text("300.000")


def test_chart_keeps_its_scroll_position(
    application: Application, look: Look, record: Callable[..., None], exchanges: list[ScriptedExchange]
) -> None:
    record(400)
    with Proxy(application.port) as proxy:
        visit = look(proxy.port)
        visit.expected.append(LOST)
        page = visit.open()
        expect(page.locator("#chart-panel")).to_have_attribute("data-state", "shown")
        page.locator("#chart").focus()

        def pointed_at(share: float) -> float:
            box = page.locator("#chart").bounding_box()
            assert box
            page.mouse.move(box["x"] + share * box["width"], box["y"] + 50)
            page.wait_for_timeout(100)  # until the legend is that candle's
            return float(page.locator("#legend .open").inner_text())

        def scrolled() -> bool:
            page.keyboard.press("Shift+ArrowLeft")
            return pointed_at(0.8) < 900

        until(page, scrolled)
        page.keyboard.press("+")
        seen = [pointed_at(0.1), pointed_at(0.8)]
        proxy.refuse()
        expect(page.locator("#banner")).to_be_visible()
        exchanges[0].send(2000.0)
        proxy.heal()
        expect(page.locator("#banner")).to_be_hidden()
        page.mouse.move(0, 0)
        expect(page.locator("#legend .close")).to_have_text("2 000.00")
        # A price of more or wider digits takes the chart some pixels.
        assert [pointed_at(0.1), pointed_at(0.8)] == pytest.approx(seen, abs=1)
        assert len(visit.asked("limit=500")) == 1


def test_page_reports_that_no_feed_is_connected(visit: Visit, exchanges: list[ScriptedExchange]) -> None:
    page = visit.open()
    expect(page.locator("#connection")).to_have_text("3 of 3 feeds")
    for exchange in exchanges:
        exchange.close()
    expect(page.locator("#connection")).to_have_text("0 of 3 feeds")
    visit.keep("unfed")
    for exchange in exchanges:
        exchange.open()
    expect(page.locator("#connection")).to_have_text("3 of 3 feeds")


def test_silent_connection_is_reported_as_lost(
    application: Application, look: Look, exchanges: list[ScriptedExchange]
) -> None:
    with Proxy(application.port) as proxy:
        visit = look(proxy.port)
        visit.expected.append(LOST)
        visit.page.clock.install()
        page = visit.open()
        proxy.stall()
        page.clock.fast_forward(13_000)
        expect(page.locator("#banner-text")).to_have_text("The connection is silent. Showing the last known prices.")
        proxy.heal()
        page.locator("#banner-retry").click()
        expect(page.locator("#banner")).to_be_hidden()
        exchanges[0].send(300.0)
        expect(visit.price("exchange1")).to_have_text("300.000")


def test_many_tabs_share_one_server_without_blocking(
    application: Application, look: Look, exchanges: list[ScriptedExchange]
) -> None:
    """Without the sixth holding up all others, as connections of HTTP/1.1 would."""
    first = look(application.port)
    visits = [first, *(look(application.port, beside=first) for _ in range(7))]
    for visit in visits:
        visit.open("interval=1d")
    exchanges[0].send(100.0, 110.0)
    for visit in visits:
        expect(visit.price("exchange1")).to_have_text("110.000")
        # The number of ticks comes from the API, not from the stream of prices.
        expect(visit.page.locator("#legend .ticks")).to_have_text("2")
        until(visit.page, lambda: drawn(visit.page, "up") > 100)  # noqa: B023 - used at once


def test_page_reconnects_after_a_restart(start: Start, look: Look, exchanges: list[ScriptedExchange]) -> None:
    application = start()
    visit = look(application.port)
    visit.expected.append(LOST + "|status of 503")  # the page may ask while the stores are being connected to
    page = visit.open()
    application.stop()
    expect(page.locator("#banner-text")).to_have_text("MarketFlow has ended. Showing the last known prices.")
    application.start()
    visit.is_live()
    exchanges[2].send(42.0)
    expect(visit.price("exchange3")).to_have_text("42.0000")


def test_failed_candles_can_be_requested_again(application: Application, look: Look) -> None:
    visit = look(application.port)
    visit.expected.append(LOST + "|ERR_FAILED")
    page = visit.page
    page.route("**/candles/**", lambda route: route.abort())
    visit.open()
    expect(page.locator("#chart-cover-text")).to_contain_text("The candles could not be loaded.")
    page.unroute("**/candles/**")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("#chart-cover-text")).to_contain_text("No candles of BTCUSDT yet.")


# The keyboard

FOCUSED = "document.activeElement.id || document.activeElement.textContent.trim()"

STOPS = """
    [...document.querySelectorAll("a, button, select, input, summary, [tabindex]")]
        .filter((element) => element.tabIndex >= 0 && !element.disabled && element.checkVisibility())
        .map((element) => element.id || element.textContent.trim())
"""

OUTLINED = "getComputedStyle(document.activeElement).outlineStyle !== 'none'"


def ticked(exchanges: list[ScriptedExchange]) -> None:
    for symbol in ("BTCUSDT", "ETHUSDT"):
        exchanges[0].send(100.0, 101.0, symbol=symbol)


@pytest.mark.parametrize("viewport", [{"width": 1440, "height": 900}, PHONE], ids=["desktop", "phone"])
def test_tab_key_follows_the_visual_order(
    application: Application, look: Look, exchanges: list[ScriptedExchange], viewport: dict[str, int]
) -> None:
    visit = look(application.port, viewport=viewport)
    page = visit.open()
    ticked(exchanges)
    expect(page.locator("#chart-panel")).to_have_attribute("data-state", "shown")
    stops = page.evaluate(STOPS)
    assert {"Test", "API", "theme", "filter", "BTCUSDT", "symbol", "exchange", "1m", "chart", "period"} <= set(stops)
    reached = []
    for _ in stops:
        page.keyboard.press("Tab")
        assert page.evaluate(OUTLINED), page.evaluate(FOCUSED)
        reached.append(page.evaluate(FOCUSED))
    assert reached == stops


def test_arrow_keys_select_rows(visit: Visit, exchanges: list[ScriptedExchange]) -> None:
    page = visit.open()
    ticked(exchanges)
    expect(visit.price("exchange1", "ETHUSDT")).to_have_text(DIGITS)
    page.get_by_role("button", name="BTCUSDT").focus()
    page.keyboard.press("End")
    page.keyboard.press("Enter")
    expect(page.locator("#symbol")).to_have_value("ETHUSDT")
    expect(visit.row("ETHUSDT").get_by_role("button")).to_have_attribute("aria-current", "true")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    expect(page.locator("#symbol")).to_have_value("SOLUSDT")


# Colours

CONTRASTS = """
    () => {
        const channels = (colour) => (colour.match(/[0-9.]+/g) ?? []).map(Number);
        const light = (colour) => channels(colour).slice(0, 3)
            .map((value) => value / 255)
            .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
            .reduce((sum, value, at) => sum + value * [0.2126, 0.7152, 0.0722][at], 0);
        const ground = (element) => {
            const colour = getComputedStyle(element).backgroundColor;
            return (channels(colour)[3] ?? 1) === 1 ? colour : ground(element.parentElement);
        };
        const poor = [];
        let count = 0;
        for (const element of document.querySelectorAll("body *")) {
            const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
            if (!own || !element.checkVisibility({ visibilityProperty: true })) continue;
            const [one, other] = [getComputedStyle(element).color, ground(element)];
            const [dark, bright] = [light(one), light(other)].sort((a, b) => a - b);
            const ratio = (bright + 0.05) / (dark + 0.05);
            count += 1;
            if (ratio < 4.5) poor.push([element.textContent.trim(), one, other, ratio]);
        }
        return { count, poor };
    }
"""
"""Texts whose contrast to what lies behind them is below what WCAG 2.2 AA asks for, and how many there are in all."""


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_every_text_has_enough_contrast(
    application: Application, look: Look, exchanges: list[ScriptedExchange], colours: str
) -> None:
    visit = look(application.port, color_scheme=colours, reduced_motion="reduce")
    page = visit.open()
    ticked(exchanges)
    exchanges[1].close()
    expect(page.locator("#feeds li[data-level=bad]")).to_have_count(1)
    expect(page.locator("#chart-panel")).to_have_attribute("data-state", "shown")
    expect(page.locator("[data-figure=highest]")).to_have_text(DIGITS)
    visit.keep(colours)
    readable(page)
    exchanges[1].open()
    page.get_by_role("button", name="Test", exact=True).click()
    readable(page)


def readable(page: Page) -> None:
    found = page.evaluate(CONTRASTS)
    assert found["count"] > 50
    assert found["poor"] == []


def test_reduced_motion_disables_animations(
    look: Look, application: Application, exchanges: list[ScriptedExchange]
) -> None:
    visit = look(application.port, reduced_motion="reduce")
    page = visit.open()
    for price in (100.0, 110.0):
        exchanges[0].send(price)
        expect(visit.price("exchange1")).to_have_text(f"{price:.3f}")
    assert page.evaluate("document.getAnimations().length") == 0
    expect(visit.price("exchange1")).to_have_attribute("data-move", "up")


def test_forced_colours_still_show_selection_and_feed_states(
    look: Look, application: Application, exchanges: list[ScriptedExchange]
) -> None:
    visit = look(application.port, forced_colors="active")
    page = visit.open()
    ticked(exchanges)
    exchanges[1].close()
    expect(page.locator("#feeds li[data-level=bad]")).to_have_count(1)

    def style(place: str, name: str, pseudo: str = "") -> str:
        told: str = page.locator(place).evaluate(
            "(one, [pseudo, name]) => getComputedStyle(one, pseudo).getPropertyValue(name)", [pseudo, name]
        )
        return told

    for choices in ("#modes", "#intervals"):
        assert style(f"{choices} [aria-pressed=true]", "outline-style") == "solid"
        assert style(f"{choices} [aria-pressed=false] >> nth=0", "outline-style") == "none"
    assert style("#market tr.chosen th", "border-left-width") == "4px"
    marks = {
        style(f"#feeds li[data-level={level}] >> nth=0", "background-color", "::before") for level in ("good", "bad")
    }
    assert len(marks) == 2
    visit.keep("forced-colours")
    exchanges[1].open()
