"""While the page opens nothing moves, and it says what it waits for."""

import re

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import DESKTOP, PHONE, Look, Start
from tests.browser.test_page_layout import EIGHT, exchanges_of
from tests.support.application import Application
from tests.support.servers import wait_until

SERIES: dict[str, dict[str, str]] = {
    "15 series": {"EXCHANGES": exchanges_of(["exchange1", "exchange2", "exchange3"])},
    "320 series": {
        "EXCHANGES": exchanges_of(EIGHT),
        "SYMBOLS": ",".join(f"S{number:03}USDT" for number in range(40)),
    },
}

SHIFTS = """
    () => new Promise((done) => {
        const name = (node) => node?.id || node?.className || node?.nodeName;
        const shift = ({ value, sources }) => [value, sources.map(({ node }) => name(node)).join(", ")];
        const observer = new PerformanceObserver((list) => done(list.getEntries().map(shift)));
        observer.observe({ type: "layout-shift", buffered: true });
        setTimeout(() => done([]), 2000); // there was none
    })
"""
"""Each layout shift so far, and what it moved."""


@pytest.mark.parametrize(
    "viewport", [PHONE, {"width": 1024, "height": 768}, DESKTOP], ids=lambda size: str(size["width"])
)
@pytest.mark.parametrize("series", SERIES)
def test_nothing_moves_while_the_page_opens(start: Start, look: Look, viewport: dict[str, int], series: str) -> None:
    application = start(MODE="test", **SERIES[series])
    wait_until(lambda: len(application.get("/market")["prices"]) == int(series.split()[0]))
    visit = look(application.port, viewport=viewport)
    page = visit.open()
    expect(page.locator("#chart-panel")).to_have_attribute("data-state", "shown")
    expect(page.locator("[data-figure=average]")).to_have_text(re.compile("[0-9]"))
    expect(page.locator("#range")).to_be_visible()
    expect(page.locator("[data-traded=volume]")).to_have_text(re.compile("[0-9]"))
    page.locator("#market .trend").first.scroll_into_view_if_needed()
    expect(page.locator("#market .percent").first).to_have_text(re.compile("%"))
    shifts = sorted(page.evaluate(SHIFTS), reverse=True)
    assert sum(value for value, _ in shifts) <= 0.05, shifts[:5]


def test_slow_server_leaves_no_blank_page(application: Application, look: Look) -> None:
    visit = look(application.port)
    page = visit.page
    page.clock.install()
    page.route_web_socket(re.compile("/ws"), lambda _: None)  # connected, and silent
    page.goto(visit.origin)
    expect(page.locator("#opening")).to_contain_text("Waiting for MarketFlow.")
    expect(page.locator("#opening")).to_be_in_viewport()
    expect(page.locator("#connection")).to_have_text("Connecting")
    expect(page.locator("main")).to_be_hidden()
    page.clock.fast_forward(13_000)
    expect(page.locator("#banner-text")).to_contain_text("The connection is silent.")
    expect(page.locator("#opening")).to_be_visible()


def test_refused_stream_is_reported_in_words(application: Application, look: Look) -> None:
    visit = look(application.port)
    page = visit.page
    refused = True
    page.route_web_socket(re.compile("/ws"), lambda socket: socket.close() if refused else socket.connect_to_server())
    page.goto(visit.origin)
    expect(page.locator("#banner-text")).to_contain_text("a proxy does not pass WebSockets on")
    expect(page.locator("#opening")).to_be_visible()
    visit.keep("refused")
    refused = False
    visit.is_live()
    expect(page.locator("main")).to_be_visible()
    expect(page.locator("#opening")).to_be_hidden()
