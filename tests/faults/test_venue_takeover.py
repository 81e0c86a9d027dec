"""A venue's feed that another process takes over, or that is added again: every minute is exact."""

import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest

from marketflow.model import MINUTE_MS, Mode, Series, Slot, minute_start
from tests.faults.conftest import Record
from tests.faults.test_shards import Gaps
from tests.faults.test_venue_kill import SYMBOLS, Trading, all_holes, expected_rows, venue_settings, wrong_rows
from tests.support.application import Application, ScriptedExchange, now_ms, wait_until_over
from tests.support.oracle import Rows
from tests.support.roles import Roles, stop_all
from tests.support.servers import RedisServer, wait_until
from tests.support.simulated_venues import simulated_venue, venues_setting
from tests.support.venue_server import VenueServer

RATE = 100
"""Trades a second: few enough that their pages by REST take seconds of what a venue allows."""


@pytest.mark.timeout(300)
def test_standby_that_replaces_a_frozen_process_leaves_rows_exact(
    server_folder: Path, servers: dict[str, object], rows: Callable[[], Rows]
) -> None:
    venue = "kraken"
    with VenueServer(venue, SYMBOLS) as server, ExitStack() as stack:
        trading = Trading(server, RATE)
        roles = Roles(stack, server_folder, servers | venue_settings(server, venue))
        stack.enter_context(trading.running())
        wait_until(lambda: 25_000 < now_ms() % MINUTE_MS < 45_000, timeout=90)
        leader, standby = roles.ingest(), roles.ingest()
        wait_until(server.has_subscriber)
        wait_until(standby.stands_by)
        start = minute_start(now_ms())
        leader.process.send_signal(signal.SIGSTOP)
        wait_until(standby.takes_ticks)
        wait_until(lambda: server.has_subscriber(2))
        leader.process.send_signal(signal.SIGCONT)
        wait_until_over(start + MINUTE_MS)
        expected = expected_rows(trading, venue, [start])
        with suppress(AssertionError):
            wait_until(lambda: not wrong_rows(rows(), expected), timeout=90)
        wrong = wrong_rows(rows(), expected)
        assert not wrong, "\n".join([*wrong, standby.log[-4000:], leader.log[-4000:]])


@pytest.mark.timeout(300)
def test_open_holes_are_filled_once_a_removed_venue_is_added_again(
    server_folder: Path, servers: dict[str, object], rows: Callable[[], Rows]
) -> None:
    venue, config = "binance", server_folder / "settings.toml"

    def reload(application: Application, *exchanges: str) -> None:
        config.write_text(f"exchanges = [{', '.join(exchanges)}]\n")
        assert application.http.post("/reload").status_code == 200

    def states(application: Application) -> list[str]:
        return [hole["state"] for hole in all_holes(application)]

    with VenueServer(venue, SYMBOLS) as server, ScriptedExchange() as other, ExitStack() as stack:
        here = f'{{name="{venue}",venue="{venue}",url="{server.url}",rest_url="{server.rest_url}"}}'
        stays = f'{{name="{other.name}",address="{other.address}"}}'
        config.write_text(f"exchanges = [{here}, {stays}]\n")
        given = {name: value for name, value in venue_settings(server, venue).items() if name != "EXCHANGES"}
        trading = Trading(server, RATE)
        stack.enter_context(trading.running())
        wait_until(lambda: 5_000 < now_ms() % MINUTE_MS < 40_000, timeout=90)
        application = stack.enter_context(Application(server_folder, servers | given, ("--config", str(config))))
        start = minute_start(now_ms())
        wait_until(lambda: "open" in states(application))  # of what the venue never sends
        reload(application, stays)
        left, last = len(states(application)), minute_start(now_ms())
        assert "filled" not in states(application)
        connections = len(server.connections)
        reload(application, here, stays)
        wait_until(lambda: len(server.connections) > connections and server.received[-1])
        wait_until_over(last + MINUTE_MS)
        expected = expected_rows(trading, venue, [start])
        wait_until(lambda: not wrong_rows(rows(), expected), timeout=90)
        wait_until(lambda: states(application)[-left:] == ["filled"] * left)


@pytest.mark.timeout(240)
def test_cold_standby_of_a_killed_owner_leaves_rows_exact(
    server_folder: Path,
    servers: dict[str, object],
    rows: Callable[[], Rows],
    redis_db: RedisServer,
    record_property: Record,
) -> None:
    """Trades from while no process was connected are fetched by REST, so that each minute equals the venue's."""
    venue = "binance"
    with simulated_venue(venue, server_folder) as port, ExitStack() as stack:
        roles = Roles(stack, server_folder, servers | {"MODE": "live", "EXCHANGES": venues_setting({venue: port})})
        roles.settings["SYMBOLS"] = ",".join(SYMBOLS)
        wait_until(lambda: 5_000 < now_ms() % MINUTE_MS < 30_000, timeout=90)
        owner, standby = roles.ingest(), roles.ingest()
        if owner.stands_by():
            owner, standby = standby, owner
        wait_until(lambda: owner.takes_ticks() and standby.stands_by(), timeout=20)
        gaps = Gaps(redis_db, [venue])
        with gaps.measured():
            at = now_ms() + 5_000
            wait_until(lambda: now_ms() > at)
            killed = minute_start(now_ms())
            owner.kill()
            wait_until(standby.takes_ticks, timeout=20)
            wait_until(lambda: now_ms() > at + 10_000, timeout=20)
        record_property("longest gap in new slices", gaps.longest)
        minutes = [killed, killed + MINUTE_MS]
        wait_until_over(minutes[-1] + MINUTE_MS)

        def differing() -> list[str]:
            found, expected = rows(), klines(port, minutes)
            stored = {slot: {name: found.get(slot, {}).get(name) for name in row} for slot, row in expected.items()}
            return [f"{slot}: {stored[slot]} and not {row}" for slot, row in expected.items() if stored[slot] != row]

        with suppress(AssertionError):
            wait_until(lambda: not differing(), timeout=45)
        assert not differing(), standby.log[-4000:]
        stop_all(standby)


def klines(port: int, minutes: Sequence[int]) -> Mapping[Slot, Mapping[str, float]]:
    """The venue's own candles of minutes."""
    found = {}
    for symbol in SYMBOLS:
        query = f"symbol={symbol}&interval=1m&startTime={minutes[0]}&limit={len(minutes)}"
        for start, *prices, volume, _, turnover, count, _, _, _ in httpx.get(
            f"http://127.0.0.1:{port}/api/v3/klines?{query}"
        ).json():
            names = ("open_price", "max_price", "min_price", "close_price", "volume", "turnover")
            values = dict(zip(names, map(float, (*prices, volume, turnover)), strict=True))
            found[Slot(Series(Mode.LIVE, "binance", symbol), start)] = values | {"tick_count": count}
    return found
