"""A standby that takes over a venue's feed from a process that is frozen: every minute is exact all the same."""

import signal
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from marketflow.model import MINUTE_MS, minute_start
from tests.faults.test_venue_kill import SYMBOLS, Trading, expected_rows, venue_settings, wrong_rows
from tests.support.application import now_ms
from tests.support.oracle import Rows
from tests.support.roles import Roles
from tests.support.servers import wait_until
from tests.support.venue_server import VenueServer


@pytest.mark.timeout(200)
def test_standby_that_replaces_a_frozen_process_leaves_rows_exact(
    server_folder: Path, servers: dict[str, object], rows: Callable[[], Rows]
) -> None:
    venue = "kraken"
    with VenueServer(venue, SYMBOLS) as server, ExitStack() as stack:
        trading = Trading(server)
        roles = Roles(stack, server_folder, servers | venue_settings(server, venue))
        stack.enter_context(trading.running())
        wait_until(lambda: 25_000 < now_ms() % MINUTE_MS < 45_000, timeout=61)
        leader, standby = roles.ingest(), roles.ingest()
        wait_until(server.has_subscriber, timeout=20)
        wait_until(standby.stands_by, timeout=20)
        start = minute_start(now_ms())
        leader.process.send_signal(signal.SIGSTOP)
        wait_until(standby.takes_ticks, timeout=20)
        wait_until(lambda: server.has_subscriber(2), timeout=20)
        leader.process.send_signal(signal.SIGCONT)
        over = start + MINUTE_MS
        wait_until(lambda: now_ms() > over, timeout=61)
        expected = expected_rows(trading, venue, [start])
        with suppress(AssertionError):
            wait_until(lambda: not wrong_rows(rows(), expected), timeout=60)
        wrong = wrong_rows(rows(), expected)
        assert not wrong, "\n".join([*wrong, standby.log[-4000:], leader.log[-4000:]])
