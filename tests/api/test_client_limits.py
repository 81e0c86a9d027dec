"""Identity of clients behind proxies, and limits of one client."""

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from marketflow.api.middleware.client_limits import (
    CLIENTS_REMEMBERED,
    GUESSES_AT_ONCE,
    ROWS_AT_ONCE,
    ClientLimits,
    TokenBuckets,
)
from marketflow.errors import QuotaExceeded, Unavailable
from marketflow.model import Candle, Mode, Series, Tick
from marketflow.stores.ports import CandleRange
from marketflow.stores.postgres.request_coalescing import LONG_QUERIES, CoalescingReader, rows_of_summary
from marketflow.stores.postgres.rows import DAY_MS
from tests.api.world import World, client_of

SERIES = [Series(Mode.TEST, "exchange1", "BTCUSDT")]
MINUTE_MS = 60_000


def scope(peer: str, *forwarded: str, **headers: str) -> dict[str, Any]:
    found = [(b"x-forwarded-for", each.encode()) for each in forwarded]
    found += [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http", "client": (peer, 1), "headers": found}


@pytest.mark.parametrize(
    ("trusted", "peer", "forwarded", "client"),
    [
        ((), "192.0.2.1", [], "192.0.2.1"),
        ((), "192.0.2.1", ["198.51.100.7"], "192.0.2.1"),
        (("192.0.2.0/24",), "192.0.2.1", ["198.51.100.7"], "198.51.100.7"),
        (("192.0.2.0/24",), "192.0.2.1", ["203.0.113.9, 198.51.100.7"], "198.51.100.7"),
        (("192.0.2.0/24",), "192.0.2.1", ["203.0.113.9", "198.51.100.7, 192.0.2.5"], "198.51.100.7"),
        (("192.0.2.0/24",), "198.51.100.1", ["203.0.113.9"], "198.51.100.1"),
        (("127.0.0.1",), "127.0.0.1", ["198.51.100.7:4711"], "198.51.100.7"),
        (("127.0.0.1",), "127.0.0.1", ["nonsense"], "127.0.0.1"),
        (("127.0.0.1",), "127.0.0.1", ["203.0.113.9, unknown"], "127.0.0.1"),  # the client can forge it
        (("127.0.0.1", "192.0.2.1"), "127.0.0.1", ["203.0.113.9, unknown, 192.0.2.1"], "192.0.2.1"),
        (("127.0.0.1",), "127.0.0.1", ["198.51.100.7, ", ""], "198.51.100.7"),
        (("127.0.0.1",), "127.0.0.1", [""], "127.0.0.1"),
        (("::1",), "::1", ["[2001:db8:1:2:3:4:5:6]:443"], "2001:db8:1:2::/64"),
        ((), "2001:db8:1:2:ffff::1", [], "2001:db8:1:2::/64"),
        ((), "::ffff:192.0.2.1", [], "192.0.2.1"),
        (("192.0.2.1",), "::ffff:192.0.2.1", ["198.51.100.7"], "198.51.100.7"),
    ],
)
def test_client_is_last_untrusted_forwarded_address(
    trusted: tuple[str, ...], peer: str, forwarded: list[str], client: str
) -> None:
    assert ClientLimits(trusted).of(scope(peer, *forwarded)) == client


def test_forwarded_host_needs_trusted_proxy() -> None:
    given = {"host": "127.0.0.1:8080", "x_forwarded_host": "prices.example.com"}
    assert ClientLimits().host(scope("127.0.0.1", **given)) == "127.0.0.1:8080"
    assert ClientLimits(["127.0.0.1"]).host(scope("127.0.0.1", **given)) == "prices.example.com"


@pytest.mark.parametrize(
    ("host", "port", "addressed"),
    [
        ("prices.example.com", "8443", "prices.example.com:8443"),
        ("prices.example.com:9000", "8443", "prices.example.com:9000"),
        ("prices.example.com", "443", "prices.example.com"),
        ("[::1]", "8443", "[::1]:8443"),
        ("prices.example.com", "x", "prices.example.com"),
    ],
)
def test_forwarded_port_completes_host_without_port(host: str, port: str, addressed: str) -> None:
    given = scope("127.0.0.1", host=host, x_forwarded_port=port)
    assert ClientLimits(["127.0.0.1"]).host(given) == addressed
    assert ClientLimits().host(given) == host


def test_token_buckets_limit_each_client_and_evict_old_ones() -> None:
    now = 0.0
    bucket = TokenBuckets(2.0, 10.0, lambda: now)
    for _ in range(10):
        bucket.take("a", 1.0)
    with pytest.raises(QuotaExceeded) as refused:
        bucket.take("a", 1.0)
    assert refused.value.seconds == 0.5
    bucket.take("b", 1.0)
    now = 0.5
    bucket.take("a", 1.0)
    bucket.take("c", 1e9)  # over the capacity: takes all
    with pytest.raises(QuotaExceeded):
        bucket.take("c", 1.0)
    for number in range(2 * CLIENTS_REMEMBERED):
        bucket.take(str(number), 1.0)
    assert len(bucket._left) == CLIENTS_REMEMBERED


def test_query_that_needs_a_full_bucket_is_paid_afterwards() -> None:
    now = 0.0
    bucket = TokenBuckets(2.0, 10.0, lambda: now)
    bucket.take("a", 9.0)
    bucket.take("a", 1e9)
    with pytest.raises(QuotaExceeded) as refused:
        bucket.take("a", 1.0)
    assert refused.value.seconds == 5.0
    now = 5.0
    bucket.take("a", 1.0)


class SlowArchive:
    """An archive that counts its queries, and those at once; candles wait for `go_on`."""

    def __init__(self) -> None:
        self.queries = self.at_once = self.most = 0
        self.go_on = asyncio.Event()

    async def candles(self, series: Sequence[Series], wanted: CandleRange) -> list[dict[int, Candle]]:
        self.queries += 1
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        await self.go_on.wait()
        self.at_once -= 1
        return [{} for _ in series]

    async def summary(self, series: Sequence[Series], since: int, until: int) -> list[Candle | None]:
        self.queries += 1
        return [None for _ in series]

    async def last(self, series: Sequence[Series]) -> list[Tick | None]:
        return [None for _ in series]


def candle_range(number: int, length_ms: int = 15 * MINUTE_MS, limit: int = 1000) -> CandleRange:
    return CandleRange(length_ms, number, number + limit * length_ms, limit, False)


def test_only_long_candle_queries_are_limited_in_number() -> None:
    async def ask() -> None:
        archive = SlowArchive()
        shared = CoalescingReader(archive)
        long = [asyncio.create_task(shared.candles(SERIES, candle_range(number))) for number in range(5)]
        await asyncio.sleep(0)
        short = [
            asyncio.create_task(shared.candles(SERIES, candle_range(number, MINUTE_MS, 500))) for number in range(5)
        ]
        while archive.queries < LONG_QUERIES + 5:  # noqa: ASYNC110 - the archive signals nothing
            await asyncio.sleep(0)
        refused = await asyncio.gather(*long[LONG_QUERIES:], return_exceptions=True)
        assert [type(each) for each in refused] == [Unavailable] * (5 - LONG_QUERIES)
        assert archive.at_once == LONG_QUERIES + 5
        archive.go_on.set()
        await asyncio.gather(*short, *long[:LONG_QUERIES])

    asyncio.run(ask())


def test_coalesced_queries_cost_a_client_nothing() -> None:
    async def ask() -> None:
        now = 0.0
        clients = ClientLimits(monotonic=lambda: now)
        archive = SlowArchive()
        archive.go_on.set()
        shared = CoalescingReader(archive, charge=clients.charge)
        clients.attribute_to(scope("192.0.2.1"))
        affordable = int(ROWS_AT_ONCE // 15_000)
        for number in range(affordable):
            await shared.candles(SERIES, candle_range(number))
        with pytest.raises(QuotaExceeded):
            await shared.candles(SERIES, candle_range(affordable))
        await shared.candles(SERIES, candle_range(affordable - 1))  # from the cache
        clients.attribute_to(scope("192.0.2.2"))
        await shared.candles(SERIES, candle_range(-1))
        clients.attribute_to(scope("192.0.2.1"))
        now = 10.0
        await shared.candles(SERIES, candle_range(-2))

    asyncio.run(ask())


def test_wrong_tokens_are_counted_logged_and_limited(log: list[str]) -> None:
    world = World(token="right-right-right")
    context = world.context()
    given = {"Authorization": "Bearer wrong"}

    async def ask() -> tuple[list[int], httpx.Response]:
        async with client_of(context) as client:
            guessed = [await client.post("/mode/live", headers=given) for _ in range(int(GUESSES_AT_ONCE) + 5)]
            right = await client.post("/mode/live", headers={"Authorization": "Bearer right-right-right"})
            return [each.status_code for each in guessed], right

    statuses, refused = asyncio.run(ask())
    assert statuses == [401] * int(GUESSES_AT_ONCE) + [429] * 5
    assert (refused.status_code, refused.json()["code"]) == (429, "too_many_requests")
    assert int(refused.headers["retry-after"]) >= 1
    assert len([line for line in log if "no valid token" in line]) == 1
    assert not [line for line in log if "wrong" in line or "right-right" in line]


def test_all_time_queries_each_second_stay_within_limit() -> None:
    async def ask() -> None:
        now = 1_763_690_000.0
        clients = ClientLimits(monotonic=lambda: now)
        shared = CoalescingReader(SlowArchive(), monotonic=lambda: now, charge=clients.charge)
        clients.attribute_to(scope("192.0.2.1"))
        for _ in range(60):
            now += 1
            for number in range(5):
                series = [Series(Mode.TEST, f"exchange{each}", f"SYMBOL{number}") for each in range(3)]
                await shared.summary(series, 0, int(now) * 1000)

    asyncio.run(ask())


def test_summary_costs_days_and_minutes_at_boundaries() -> None:
    noon = DAY_MS // 2
    assert rows_of_summary(noon, noon + 3 * MINUTE_MS) == 3
    assert rows_of_summary(noon, noon + DAY_MS) == 1440
    assert rows_of_summary(0, 10 * DAY_MS + noon) == 10 + 720
    assert rows_of_summary(DAY_MS, 366 * DAY_MS) == 365
    assert rows_of_summary(0, 2000 * DAY_MS) == 366
    assert rows_of_summary(0, 2000 * DAY_MS, oldest=500 * DAY_MS) == 1500
    assert rows_of_summary(0, 2000 * DAY_MS, oldest=1999 * DAY_MS) == 1
    assert rows_of_summary(5, 5) == rows_of_summary(9, 5) == 0


def test_streams_per_client_are_limited(log: list[str]) -> None:
    broadcaster = World(streams=10).context().broadcaster
    broadcaster._max_streams_per_client = 2
    one, second = broadcaster.reserve("a"), broadcaster.reserve("a")
    with pytest.raises(QuotaExceeded):
        broadcaster.reserve("a")
    other = broadcaster.reserve("b")
    one()
    one()  # released already
    again = broadcaster.reserve("a")
    with pytest.raises(QuotaExceeded):
        broadcaster.reserve("a")
    for release in (again, other, second):
        release()
    assert not broadcaster._streams
    assert len([line for line in log if "a has 2 already (http.streams_per_client)" in line]) == 1


def test_rejected_stream_releases_its_reservation() -> None:
    world = World(streams=10)
    context = world.context()
    context.broadcaster._max_streams_per_client = 1

    async def ask() -> None:
        async with client_of(context) as client:
            for _ in range(3):
                assert (await client.head("/stream/prices")).status_code == 200
                assert (await client.get("/stream/prices?symbols=x")).status_code == 404
        assert not context.broadcaster._streams

    asyncio.run(ask())
