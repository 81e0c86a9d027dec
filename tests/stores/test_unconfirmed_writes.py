"""Writes whose replies are read later, with a real Redis and real faults."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import redis

from marketflow.errors import Unavailable
from marketflow.model import Tick
from marketflow.stores.redis import codec, keys
from marketflow.stores.redis.connection import TIMEOUT_SECONDS, connection_keywords, sync_client
from marketflow.stores.redis.unconfirmed_writes import (
    CONFIRM_SECONDS,
    MOST_OUTSTANDING,
    REPLIES_SECONDS,
    UnconfirmedWrites,
)
from marketflow.stores.redis.writer import TICKS_A_CALL, RedisWriter
from tests.support.market import BTC, ETH, MINUTE
from tests.support.proxy import Proxy
from tests.support.redis_faults import frozen, killed, out_of_memory, read_only
from tests.support.servers import HOST, RedisServer, wait_until

TTL_SECONDS = 300


class SetTime:
    """Monotonic time that a test sets."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


class World:
    """Writes on a connection to a server, through a proxy."""

    def __init__(self, server: RedisServer, proxy: Proxy) -> None:
        self.server, self.proxy, self.time = server, proxy, SetTime()
        self.client = sync_client(connection_keywords(HOST, proxy.port, server.password, 0))
        self.writes = UnconfirmedWrites(self.client, self.time)

    def put(self, number: int) -> bool:
        return self.writes.send([("SET", "number", number)])

    def stored(self) -> bytes | None:
        with self.server.client() as client:
            value = client.get("number")
        assert value is None or isinstance(value, bytes)
        return value


@pytest.fixture
def server(server_folder: Path) -> Iterator[RedisServer]:
    with RedisServer(server_folder / "redis", persistent=False) as server:
        yield server


@pytest.fixture
def world(server: RedisServer) -> Iterator[World]:
    with Proxy(server.port) as proxy:
        world = World(server, proxy)
        yield world
        world.writes.close()
        world.client.close()


def test_first_write_and_one_after_a_pause_are_confirmed(world: World) -> None:
    assert world.put(1)
    assert not world.put(2)
    world.time.seconds += 2 * CONFIRM_SECONDS
    assert world.put(3)
    assert world.stored() == b"3"


def test_unconfirmed_write_does_not_wait_for_its_reply(world: World) -> None:
    assert world.put(1)
    with frozen(world.server):
        assert not world.put(2)
    wait_until(lambda: world.stored() == b"2")
    world.writes.confirm()


def test_unconfirmed_writes_are_done_in_their_order(world: World) -> None:
    assert [world.put(number) for number in range(500)].count(True) == 1
    world.writes.confirm()
    assert world.stored() == b"499"


def test_outstanding_replies_are_bounded(world: World) -> None:
    confirmed = [world.put(number) for number in range(2 * MOST_OUTSTANDING + 3)]
    assert [number for number, each in enumerate(confirmed) if each] == [
        0,
        MOST_OUTSTANDING + 1,
        2 * MOST_OUTSTANDING + 2,
    ]


@pytest.mark.parametrize("fault", [out_of_memory, read_only])
def test_late_error_is_raised_by_the_next_confirmation(world: World, fault: object) -> None:
    assert world.put(1)
    with fault(world.server):  # type: ignore[operator]
        assert not world.put(2)
        with pytest.raises(redis.ResponseError):
            world.writes.confirm()
    assert world.put(3), "the first write after an error is confirmed"


def test_error_within_a_transaction_is_raised(world: World) -> None:
    world.put(1)
    transaction = [("MULTI",), ("SET", "number", 2), ("LPUSH", "number", 3), ("EXEC",)]
    assert not world.writes.send(transaction)
    with pytest.raises(redis.ResponseError):
        world.writes.confirm()
    assert world.put(4)
    assert world.stored() == b"4"


@pytest.mark.parametrize("fault", [Proxy.stall, Proxy.swallow, Proxy.refuse])
def test_lost_replies_are_an_error_and_the_next_write_connects_again(world: World, fault: object) -> None:
    assert world.put(1)
    fault(world.proxy)  # type: ignore[operator]
    world.time.seconds += 2 * CONFIRM_SECONDS
    with pytest.raises((redis.ConnectionError, redis.TimeoutError)):
        world.put(2)
    world.proxy.heal()
    wait_until(lambda: works(world))
    assert world.stored() == b"3"


def works(world: World) -> bool:
    try:
        return world.put(3)
    except redis.RedisError:
        return False


def test_killed_server_is_an_error_and_loses_no_later_write(world: World) -> None:
    assert world.put(1)
    with killed(world.server):
        world.time.seconds += 2 * CONFIRM_SECONDS
        with pytest.raises(redis.ConnectionError):
            world.put(2)
    assert works(world)
    assert world.stored() == b"3"


def test_restarted_server_fails_no_write_when_all_were_confirmed(server: RedisServer) -> None:
    client = sync_client(connection_keywords(HOST, server.port, server.password, 0))
    writes = UnconfirmedWrites(client)
    assert writes.send([("SET", "number", 1)])
    with killed(server):
        pass
    assert writes.send([("SET", "number", 2)])
    writes.close()
    client.close()


def test_cut_connection_loses_unconfirmed_writes_with_an_error(world: World) -> None:
    assert world.put(1)
    assert not world.put(2)
    world.proxy.cut()
    with pytest.raises(redis.ConnectionError):
        wait_until(lambda: world.put(3))
    assert works(world)
    assert world.stored() == b"3"


def test_slow_replies_are_an_error_after_a_second_in_all() -> None:
    """Each reply comes in time; all of them together would take minutes, and a stop would wait."""
    with socket.create_server((HOST, 0)) as listener:
        client = sync_client(connection_keywords(HOST, listener.getsockname()[1], "", 0) | {"protocol": 2})
        answering = threading.Thread(target=answer_slowly, args=(listener,), daemon=True)
        answering.start()
        writes = UnconfirmedWrites(client)
        began = time.monotonic()
        with pytest.raises(redis.TimeoutError):
            writes.send([("SET", "number", number) for number in range(100)])
        assert time.monotonic() - began < REPLIES_SECONDS + TIMEOUT_SECONDS
        client.close()
    answering.join(5)


def answer_slowly(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection, suppress(OSError):
        while received := connection.recv(65536):
            if b"SET" in received:
                while True:
                    time.sleep(TIMEOUT_SECONDS / 5)
                    connection.sendall(b"+OK\r\n")
            connection.sendall(b"+OK\r\n" * received.count(b"*"))


def test_close_delivers_what_is_outstanding(world: World) -> None:
    world.put(1)
    world.put(2)
    world.writes.close()
    world.client.close()
    assert world.stored() == b"2"
    with pytest.raises(redis.ConnectionError):
        world.put(3)


# In the writer


@pytest.fixture
def cache(server: RedisServer) -> Iterator[RedisWriter]:
    place = connection_keywords(HOST, server.port, server.password, 0)
    cache = RedisWriter.connect(place, [BTC, ETH], lambda: MINUTE * 1_000_000, TTL_SECONDS)
    cache.recover()
    yield cache
    cache.close()


def put(cache: RedisWriter, price: float) -> bool:
    return cache.put_newest({BTC: Tick(price, MINUTE, MINUTE * 1_000_000)})


def is_complete(cache: RedisWriter) -> bool:
    return cache.complete


def put_or_unavailable(cache: RedisWriter) -> bool:
    try:
        put(cache, 3.0)
    except Unavailable:
        return False
    return True


def test_probe_finds_the_late_error_of_the_last_write(cache: RedisWriter, server: RedisServer) -> None:
    put(cache, 1.0)
    assert not cache.needs_refill()
    put(cache, 2.0)
    with out_of_memory(server):
        assert not put(cache, 3.0)
        assert is_complete(cache)
        assert not cache.needs_refill(), "not before Redis can be used again"
        assert not is_complete(cache)
        with pytest.raises(Unavailable):
            put(cache, 4.0)  # the circuit breaker is open
    wait_until(cache.needs_refill)


def test_frozen_redis_costs_one_timeout_then_rejects_writes(cache: RedisWriter, server: RedisServer) -> None:
    put(cache, 1.0)
    with frozen(server):
        wait_until(lambda: not put_or_unavailable(cache))
        assert not cache.complete
        began = time.monotonic()
        assert not put_or_unavailable(cache)
        assert time.monotonic() - began < TIMEOUT_SECONDS / 2


def test_newest_price_is_never_left_without_expiry(cache: RedisWriter, server: RedisServer) -> None:
    put(cache, 1.0)
    put(cache, 2.0)
    cache.needs_refill()
    with server.client() as client:
        assert client.hget(keys.latest_key(BTC), "price") == b"2.0"
        assert 0 < client.pttl(keys.latest_key(BTC)) <= TTL_SECONDS * 1000


def test_newest_ticks_of_many_series_take_few_replies(server: RedisServer) -> None:
    """Each reply costs as much as its write; 7,000 of them were once too late, and all slices were written again."""
    series = [BTC._replace(symbol=f"S{number}USDT") for number in range(3000)]
    place = connection_keywords(HOST, server.port, server.password, 0)
    cache = RedisWriter.connect(place, series, lambda: MINUTE * 1_000_000, TTL_SECONDS)
    cache.recover()
    with server.client() as client, client.pubsub() as announcements:
        announcements.subscribe(keys.PLAIN.newest_channel)
        for price in (1.0, 2.0):
            cache.put_newest({each: Tick(price, MINUTE, MINUTE * 1_000_000) for each in series})
        assert not cache.needs_refill()
        assert calls(client, "eval") == 2 * 3000 / TICKS_A_CALL, "one answer each"
        assert calls(client, "hset") == 6000, "within the script"
        for each in (series[0], series[-1]):
            fields = {"price": "2.0", "timestamp": f"{MINUTE}", "received": f"{MINUTE}", "sequence": f"{MINUTE}000000"}
            stored: dict[bytes, bytes] = client.hgetall(keys.latest_key(each))
            assert {name.decode(): value.decode() for name, value in stored.items()} == fields
            assert 0 < client.pttl(keys.latest_key(each)) <= TTL_SECONDS * 1000
        announced = 0
        while announced < 6000:
            message = announcements.get_message(ignore_subscribe_messages=True, timeout=5)
            if message is not None:
                announced += len(codec.decode_newest(message["data"]))
    cache.close()


def calls(client: "redis.Redis", command: str) -> int:
    """How often a command has run since the start of the server."""
    statistics: dict[str, dict[str, int]] = client.info("commandstats")
    return statistics.get(f"cmdstat_{command}", {"calls": 0})["calls"]


def test_timeout_is_longer_than_the_time_unconfirmed() -> None:
    assert CONFIRM_SECONDS < TIMEOUT_SECONDS
