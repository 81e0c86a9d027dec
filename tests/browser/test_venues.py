"""The page on one of each simulated venue."""

import re
from contextlib import ExitStack
from pathlib import Path

from playwright.sync_api import expect

from marketflow.settings import VENUES
from tests.browser.conftest import Look
from tests.support.application import Application
from tests.support.servers import wait_until
from tests.support.simulated_venues import simulated_venue, venues_setting


def test_page_shows_prices_of_every_venue(server_folder: Path, servers: dict[str, object], look: Look) -> None:
    with ExitStack() as stack:
        ports = {venue: stack.enter_context(simulated_venue(venue, server_folder)) for venue in VENUES}
        settings = servers | {"MODE": "live", "SYMBOLS": "BTCUSDT ETHUSDT", "EXCHANGES": venues_setting(ports)}
        application = stack.enter_context(Application(server_folder, settings))
        wait_until(lambda: set(application.get("/health")["exchanges"].values()) == {"connected"}, timeout=30)
        visit = look(application.port)
        page = visit.open("interval=1m")
        for venue in VENUES:
            expect(visit.price(venue, "ETHUSDT")).to_have_text(re.compile(r"^3.\d{3}\.\d+$"))
        expect(page.locator("#feeds li .state")).to_have_text(["connected"] * len(VENUES))
        visit.keep("venues")
