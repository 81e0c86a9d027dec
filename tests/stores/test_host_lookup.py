"""Lookups of hosts that hang: they end in time, and take one thread a host."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
import redis

from marketflow.errors import Unavailable
from marketflow.stores.host_lookup import await_lookup
from marketflow.stores.postgres.connections.bounded_connection import BoundedConnection
from marketflow.stores.postgres.reader import PostgresReader
from marketflow.stores.redis.connection import async_client, connection_keywords, sync_client

NAME = "hangs.invalid"


@pytest.fixture
def lookups(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The hosts that were looked up, which hangs until the end of the test."""
    hosts: list[str] = []
    ended = threading.Event()

    def hang(host: str, *_: object, **__: object) -> list[Any]:
        hosts.append(host)
        ended.wait(30)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    yield hosts
    ended.set()


def test_lookup_that_hangs_ends_in_time_and_takes_one_thread(lookups: list[str]) -> None:
    began = time.monotonic()
    for _ in range(3):
        with pytest.raises(TimeoutError, match=r"^hangs\.invalid cannot be looked up: no answer within 0\.1 s$"):
            await_lookup(NAME, 0.1)
    assert time.monotonic() - began < 5
    assert lookups == [NAME]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "fe80::1%lo", "/run/redis.sock", ""])
def test_address_or_path_is_not_looked_up(lookups: list[str], host: str) -> None:
    await_lookup(host, 0.1)
    assert lookups == []


def test_host_is_looked_up_again_after_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts: list[str] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: hosts.append(host))
    for _ in range(2):
        await_lookup(NAME, 5)
    assert hosts == [NAME, NAME]


@pytest.mark.parametrize("tls", [False, True])
def test_clients_of_stores_do_not_wait_for_a_lookup_that_hangs(lookups: list[str], tls: bool) -> None:
    began = time.monotonic()
    with (
        sync_client(connection_keywords(NAME, 6379, "", 0, tls=tls), 0.1) as client,
        pytest.raises(redis.TimeoutError, match="cannot be looked up"),
    ):
        client.ping()
    with pytest.raises(psycopg.OperationalError, match="cannot be looked up"):
        BoundedConnection.open({"host": NAME, "port": 5432, "user": "marketflow", "dbname": "marketflow"})
    assert time.monotonic() - began < 10
    assert set(lookups) == {NAME}


@pytest.mark.parametrize("tls", [False, True])
def test_event_loop_does_not_wait_for_a_lookup_that_hangs(lookups: list[str], tls: bool) -> None:
    async def ask() -> None:
        client = async_client(connection_keywords(NAME, 6379, "", 0, tls=tls), 2, 0.1)
        with pytest.raises((redis.TimeoutError, redis.ConnectionError)):  # the limit of the pool may come first
            await client.ping()
        await client.aclose()
        reader = PostgresReader({"host": NAME, "port": 5432, "user": "marketflow", "dbname": "marketflow"})
        await reader.open()
        with pytest.raises(Unavailable):
            await reader.ping()
        await reader.close()

    began = time.monotonic()
    asyncio.run(ask())
    assert time.monotonic() - began < 10
    assert set(lookups) == {NAME}
