"""Lookups of hosts that hang: they end in time, and take one thread a host."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis

from marketflow.cli.export.row_reader import snapshot
from marketflow.errors import Unavailable
from marketflow.stores.host_lookup import look_up
from marketflow.stores.postgres.connections.bounded_connection import BoundedConnection
from marketflow.stores.postgres.reader import PostgresReader
from marketflow.stores.redis.connection import async_client, cluster_keywords, connection_keywords, sync_client
from tests.support.servers import RedisServer
from tests.support.tls import OPENSSL, certificate, tls_front

NAME = "hangs.invalid"
PORT = 1  # on which nothing listens
POSTGRES = {"host": NAME, "port": PORT, "user": "marketflow", "dbname": "marketflow"}


@pytest.fixture
def lookups(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The hosts that were looked up, which hangs until the end of the test."""
    yield from _looked_up(monkeypatch, answers=0)


@pytest.fixture
def answered_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The hosts that were looked up, which is answered where the list is empty, and hangs otherwise."""
    yield from _looked_up(monkeypatch, answers=1)


def _looked_up(monkeypatch: pytest.MonkeyPatch, answers: int) -> Iterator[list[str]]:
    hosts: list[str] = []
    ended = threading.Event()

    resolve = socket.getaddrinfo

    def look_up_or_hang(host: str, *others: Any, **keywords: Any) -> list[Any]:
        if host != NAME:  # an address, about which no server is asked
            return resolve(host, *others, **keywords)
        hosts.append(host)
        if len(hosts) <= answers:
            return [(0, 0, 0, "", ("127.0.0.2", 0)), (0, 0, 0, "", ("127.0.0.1", 0))]  # the first has no server
        ended.wait(30)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", look_up_or_hang)
    yield hosts
    ended.set()
    for thread in threading.enumerate():
        if thread.name == "lookup":
            thread.join()  # else the next test would share its lookup, which is then answered


def test_lookup_that_hangs_ends_in_time_and_takes_one_thread(lookups: list[str]) -> None:
    began = time.monotonic()
    for _ in range(3):
        with pytest.raises(TimeoutError, match=r"^hangs\.invalid cannot be looked up: no answer within 0\.1 s$"):
            look_up(NAME, 0.1)
    assert time.monotonic() - began < 5
    assert lookups == [NAME]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "fe80::1%lo", "/run/redis.sock", ""])
def test_address_or_path_is_not_looked_up(lookups: list[str], host: str) -> None:
    assert look_up(host, 0.1) == ([] if host in ("/run/redis.sock", "") else [host])
    assert lookups == []


def test_lookup_returns_addresses_in_the_order_of_the_resolver(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET6, 1, 6, "", ("::1", 0, 0, 0)), (socket.AF_INET, 1, 6, "", ("127.0.0.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert look_up(NAME, 5) == ["::1", "127.0.0.1"]


def test_lookup_raises_error_of_the_resolver(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(socket.gaierror, match="Name or service not known"):
        look_up(NAME, 5)
    with pytest.raises(psycopg.OperationalError, match=r"failed to resolve host 'hangs\.invalid': .*not known"):
        _use_postgres()
    with pytest.raises(redis.ConnectionError, match=r"hangs\.invalid:1.*not known"):
        _use_redis(tls=False)


def test_host_is_looked_up_again_after_a_thread_could_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", ("127.0.0.1", 0))])

    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as exhausted:
        exhausted.setattr(threading.Thread, "start", fail)
        with pytest.raises(OSError, match=r"^hangs\.invalid cannot be looked up: can't start new thread$"):
            look_up(NAME, 5)
    assert look_up(NAME, 5) == ["127.0.0.1"]


def test_host_is_looked_up_again_after_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts: list[str] = []

    def answer(host: str, *_: object, **__: object) -> list[object]:
        hosts.append(host)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    for _ in range(2):
        look_up(NAME, 5)
    assert hosts == [NAME, NAME]


@pytest.mark.parametrize("tls", [False, True])
def test_clients_of_stores_do_not_wait_for_a_lookup_that_hangs(lookups: list[str], tls: bool) -> None:
    began = time.monotonic()
    with pytest.raises(redis.TimeoutError, match="cannot be looked up"):
        _use_redis(tls)
    for use in (_use_postgres, _use_export):
        with pytest.raises((psycopg.OperationalError, Unavailable), match="cannot be looked up"):
            use()
    assert time.monotonic() - began < 10
    assert set(lookups) == {NAME}


@pytest.mark.parametrize("tls", [False, True])
def test_event_loop_does_not_wait_for_a_lookup_that_hangs(lookups: list[str], tls: bool) -> None:
    began = time.monotonic()
    asyncio.run(_use_redis_on_event_loop(tls))
    asyncio.run(_use_postgres_on_event_loop())
    assert time.monotonic() - began < 10
    assert set(lookups) == {NAME}


@pytest.mark.parametrize("tls", [False, True])
def test_client_uses_the_answered_lookup_and_makes_no_other(answered_once: list[str], tls: bool) -> None:
    """The second lookup of each would hang, which nothing could interrupt."""
    began = time.monotonic()
    for use in (partial(_use_redis, tls), partial(_use_cluster, tls), _use_postgres, _use_export):
        answered_once.clear()
        with pytest.raises((redis.ConnectionError, psycopg.OperationalError, Unavailable), match="refused"):
            use()
        assert answered_once == [NAME]
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("tls", [False, True])
def test_event_loop_makes_no_lookup_after_the_answered_one(answered_once: list[str], tls: bool) -> None:
    began = time.monotonic()
    for use in (_use_redis_on_event_loop(tls), _use_postgres_on_event_loop()):
        answered_once.clear()
        asyncio.run(use)
        assert answered_once
    assert time.monotonic() - began < 10


@pytest.mark.skipif(OPENSSL is None, reason="there is no openssl")
def test_certificate_is_checked_against_the_name_and_not_an_address(
    redis_db: RedisServer, tmp_path: Path, answered_once: list[str]
) -> None:
    key, crt = certificate(tmp_path, "named", f"DNS:{NAME}")
    with tls_front(redis_db.port, key, crt) as port:

        async def ask(host: str) -> None:
            async with async_client(connection_keywords(host, port, "", 0, tls=True, tls_ca=str(crt)), 2, 5) as client:
                await client.ping()

        with sync_client(connection_keywords(NAME, port, "", 0, tls=True, tls_ca=str(crt)), 5) as client:
            client.ping()
        answered_once.clear()
        asyncio.run(ask(NAME))
        with pytest.raises(redis.ConnectionError, match="certificate"):
            asyncio.run(ask("127.0.0.1"))


def _use_redis(tls: bool) -> None:
    with sync_client(connection_keywords(NAME, PORT, "", 0, tls=tls), 0.1) as client:
        client.ping()


def _use_cluster(tls: bool) -> None:
    with sync_client(cluster_keywords([(NAME, PORT)], 8, "", "", tls, "", "", ""), 0.1) as client:
        client.ping()


def _use_postgres() -> None:
    BoundedConnection.open(POSTGRES)


def _use_export() -> None:
    with snapshot(POSTGRES):
        pass


async def _use_redis_on_event_loop(tls: bool) -> None:
    client = async_client(connection_keywords(NAME, PORT, "", 0, tls=tls), 2, 0.1)
    with pytest.raises((redis.TimeoutError, redis.ConnectionError)):  # the limit of the pool may come first
        await client.ping()
    await client.aclose()


async def _use_postgres_on_event_loop() -> None:
    reader = PostgresReader(POSTGRES)
    await reader.open()
    with pytest.raises(Unavailable):
        await reader.ping()
    await reader.close()
