"""A real browser on the page of a real application, whose exchanges send what a test tells them to.

One browser for this folder and not for the session: Playwright's event loop runs for as long, and tests elsewhere have
their own.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright
from psycopg import sql

from tests.support.application import ROOT, Application, ScriptedExchange, exchanges_setting
from tests.support.servers import HOST, wait_until

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
OUTPUT = Path(os.environ.get("MARKETFLOW_TEST_OUTPUT", ROOT / "test-output"))
"""Folder of the screenshots."""

DESKTOP = {"width": 1440, "height": 900}
PHONE = {"width": 390, "height": 844}

FIRST_TICK = r"status of 404 .*/prices/(highest|average|lowest)/"
"""A page that is shown the first tick of a series asks at once, and the tick may not be in its slice yet."""

expect.set_options(timeout=15_000)


class Visit:
    """An open page, its requests, and its errors and warnings.

    Args:
        page: Playwright's.
        origin: of the application; nothing else may be asked.
    """

    def __init__(self, page: Page, origin: str) -> None:
        self.page = page
        self.origin = origin
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.expected = [FIRST_TICK]
        """Patterns of complaints that belong to what the test does."""
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("websocket", lambda socket: self.requests.append(socket.url))
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.complaints.append(f"uncaught: {error}"))

    def _heard(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.text} {message.location['url']}")

    def open(self, choice: str = "") -> Page:
        """Go to the page with a choice such as `interval=5m`, and wait until it has the stream's snapshot."""
        self.page.goto(f"{self.origin}/#{choice}")
        self.is_live()
        return self.page

    def is_live(self) -> None:
        expect(self.page.locator("body")).to_have_attribute("data-connection", "open")

    def row(self, symbol: str = "BTCUSDT") -> "Any":
        return self.page.locator(f"#market tr[data-symbol={symbol}]")

    def price(self, exchange: str, symbol: str = "BTCUSDT") -> "Any":
        return self.row(symbol).locator(f"td[data-exchange={exchange}]")

    def asked(self, path: str) -> list[str]:
        """The requests whose path and query hold this text."""
        return [url for url in self.requests if path in url]

    def fits(self) -> bool:
        """Whether nothing is to be scrolled sideways."""
        fits: bool = self.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        return fits

    def keep(self, name: str) -> None:
        """Save a screenshot."""
        OUTPUT.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=OUTPUT / f"{name}.png", full_page=True)

    def check(self) -> None:
        """No request left the host, and nobody complained of what no test has to do with."""
        elsewhere = {url for url in self.requests if urlsplit(url).hostname != HOST and not url.startswith("data:")}
        assert not elsewhere
        assert self.requests
        complaints = [each for each in self.complaints if not any(re.search(known, each) for known in self.expected)]
        assert not complaints


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    # The shell first: without a window of the browser around it, a page takes 2.4 s of CPU instead of 5.2.
    chromium = shutil.which("chromium-headless-shell") or shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no Chromium (Debian's package chromium-headless-shell, or chromium)")
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=chromium, args=FLAGS) as browser:
        yield browser


Look = Callable[..., Visit]


@pytest.fixture
def look(browser: Browser) -> Iterator[Look]:
    """Opens a tab at an application: in a browser of its own, with what Playwright calls options of a context, or
    beside another tab."""
    visits = []
    with ExitStack() as stack:

        def looked(port: int, beside: Visit | None = None, **options: Any) -> Visit:
            if beside is None:
                context = stack.enter_context(browser.new_context(**{"viewport": DESKTOP} | options))
            else:
                context = beside.page.context
            visits.append(Visit(context.new_page(), f"http://{HOST}:{port}"))
            return visits[-1]

        yield looked
        for visit in visits:
            visit.check()


Start = Callable[..., Application]


@pytest.fixture
def start(server_folder: Path, servers: dict[str, object], exchanges: list[ScriptedExchange]) -> Iterator[Start]:
    """Starts an application in live mode on three exchanges; takes more settings; waits for tables and connections."""
    with ExitStack() as stack:

        def started(**settings: object) -> Application:
            given: dict[str, object] = {
                "MODE": "live",
                "EXCHANGES": exchanges_setting(*exchanges),
                "FLOW__RECONNECT_AFTER_SECONDS": 0.1,
            }
            application = stack.enter_context(Application(server_folder, servers | given | settings))
            # Tests write to tables that are not there before, on a busy machine.
            wait_until(lambda: application.get("/health")["postgres"] == "ok")
            if (given | settings)["MODE"] == "live":
                states = {exchange.name: "connected" for exchange in exchanges}
                wait_until(lambda: application.get("/health")["exchanges"] == states, timeout=20)
            return application

        yield started


@pytest.fixture
def application(start: Start) -> Application:
    """One in live mode that has not seen a tick."""
    return start()


@pytest.fixture
def visit(look: Look, application: Application) -> Visit:
    """A tab on a desktop."""
    return look(application.port)


@pytest.fixture
def record(postgres_db: dict[str, Any]) -> Callable[..., None]:
    """Puts minutes into the table: prices rise by one with each, up to 1000 a quarter of an hour ago.

    Younger ones would not be looked for there. Other columns have the same value in each; recording a minute again
    replaces those.
    """

    begun = datetime.now(UTC)  # a minute may end in the middle of a test

    def recorded(
        minutes: int, exchange: str = "exchange1", symbol: str = "BTCUSDT", later: int = 0, **columns: object
    ) -> None:
        columns = {"source": "ticks"} | columns
        query = sql.SQL(
            """
            insert into aggregates (pair_name, exchange, mode, timestamp, average_price, min_price, max_price,
                                    open_price, close_price, tick_count, {names})
            select %s, %s, 'live', date_trunc('minute', %s::timestamptz) - (n + 14 - %s) * interval '1 minute',
                   p + .5, p - 1, p + 2, p, p + 1, 10, {values}
            from (select n, 1000 + %s - n as p from generate_series(1, %s) n) _
            on conflict (exchange, pair_name, mode, timestamp) do update set ({names}) = row ({values})
            """
        ).format(
            names=sql.SQL(", ").join(map(sql.Identifier, columns)),
            values=sql.SQL(", ").join(map(sql.Literal, columns.values())),
        )
        with psycopg.connect(**postgres_db) as connection:
            connection.execute(query, (symbol, exchange, begun, later, later, minutes))

    return recorded
