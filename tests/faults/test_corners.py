"""The largest allowed settings: slow is allowed there, refused requests and false alarms are not."""

import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from pathlib import Path

import pytest

from tests.support.roles import Roles
from tests.support.servers import HOST, wait_until

EXCHANGES = 50
SYMBOLS = [f"S{number:03d}USDT" for number in range(40)]
CLIENTS = 80
"""More than there are connections for queries."""

SECONDS = 4.0


def settings_of_many_series() -> dict[str, object]:
    tables = ", ".join(f'{{name="exchange{n}",address="{HOST}:{20_000 + n}"}}' for n in range(1, EXCHANGES + 1))
    return {
        "MODE": "test",
        "EXCHANGES": f"[{tables}]",
        "SYMBOLS": json.dumps(SYMBOLS),
        "FLOW__WORKERS_PER_EXCHANGE": 5,
    }


def paths() -> Iterable[str]:
    for symbol in itertools.cycle(SYMBOLS):
        yield f"/prices/average/{symbol}?period=10m"
        yield f"/prices/latest/exchange1/{symbol}"
        yield f"/prices/highest/{symbol}?period=1m"


@pytest.mark.alone
def test_many_series_leave_no_request_unanswered(server_folder: Path, servers: dict[str, object]) -> None:
    """With more clients than connections on a busy event loop there is no 503, and no store is reported as down."""
    statuses: Counter[int] = Counter()
    stores: Counter[tuple[str, str]] = Counter()
    with ExitStack() as stack:
        roles = Roles(stack, server_folder, servers | settings_of_many_series())
        roles.ingest()
        api = roles.api()
        wait_until(lambda: api.get("/health")["status"] == "ok", timeout=20)
        ends_at = time.monotonic() + SECONDS

        def ask(number: int) -> None:
            with closing(HTTPConnection(HOST, api.port, timeout=30)) as connection:
                for path in itertools.islice(paths(), number, None):
                    if time.monotonic() > ends_at:
                        return
                    connection.request("GET", path)
                    answer = connection.getresponse()
                    answer.read()
                    statuses[answer.status] += 1

        clients = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(CLIENTS)]
        for client in clients:
            client.start()
        api.http.timeout = 30
        while any(client.is_alive() for client in clients):
            health = api.get("/health")
            stores[health["redis"], health["postgres"]] += 1
            time.sleep(0.05)
    assert set(statuses) == {200}, statuses
    assert set(stores) == {("ok", "ok")}, stores
    assert statuses.total() > CLIENTS
