"""What most fault tests stand on: exchanges, servers behind proxies, and the application as a process in between."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.application import Application, ScriptedExchange, exchanges_setting
from tests.proxy import Proxy
from tests.servers import HOST, RedisServer, wait_until

WINDOW_SECONDS = 2
"""Length of a minute in these tests, so that several pass while something is broken."""

WINDOW_MS = WINDOW_SECONDS * 1000


@pytest.fixture
def redis_proxy(redis_db: RedisServer) -> Iterator[Proxy]:
    """The way to the session's Redis."""
    with Proxy(redis_db.port) as proxy:
        yield proxy


@pytest.fixture
def postgres_proxy(postgres_db: dict[str, Any]) -> Iterator[Proxy]:
    """The way to the session's PostgreSQL."""
    with Proxy(postgres_db["port"]) as proxy:
        yield proxy


StartApplication = Callable[..., Application]


@pytest.fixture
def start(server_folder: Path, exchanges: list[ScriptedExchange]) -> Iterator[StartApplication]:
    """Starts applications in live mode on all three exchanges with minutes of WINDOW_SECONDS; ends them in the end.

    Takes more settings as a dict, and `wait=False` to come back before the exchanges are connected.
    """
    with ExitStack() as stack:

        def started(settings: dict[str, object], wait: bool = True) -> Application:
            given: dict[str, object] = {
                "MODE": "live",
                "EXCHANGES": exchanges_setting(*exchanges),
                "FLOW__WINDOW_SECONDS": WINDOW_SECONDS,
                "FLOW__RECONNECT_AFTER_SECONDS": 0.1,
            }
            application = stack.enter_context(Application(server_folder, given | settings))
            if wait:
                states = {exchange.name: "connected" for exchange in exchanges}
                wait_until(lambda: application.get("/health")["exchanges"] == states)
            return application

        yield started


def through(
    settings: dict[str, object], redis: Proxy | None = None, postgres: Proxy | None = None
) -> dict[str, object]:
    """Settings of servers, with proxies in the way."""
    ports = {"REDIS__PORT": redis, "POSTGRES__PORT": postgres}
    return settings | {name: proxy.port for name, proxy in ports.items() if proxy} | {"REDIS__HOST": HOST}
