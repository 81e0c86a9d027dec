"""/metrics: its names and values; no client can make the number of series grow."""

import asyncio
from collections.abc import Iterable

import httpx
import pytest
from msgspec import structs
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

from marketflow.api.middleware.request_metrics import OTHER
from marketflow.model import Mode
from tests.api.world import World, client_of
from tests.support.exposition import INGEST_COUNTERS, Samples, samples_of

COUNTERS = {
    "ticks_too_late_total": 11,
    "cache_errors_total": 12,
    "archive_errors_total": 13,
    "aggregates_written_total": 14,
    "aggregates_refused_total": 15,
    "aggregates_pending": 16,
    "aggregates_dropped_total": 17,
    "given_up_total": 18,
}


def after(world: World, *requests: tuple[str, str]) -> Samples:
    """Return the samples after these requests (method and path) to one application."""

    async def respond() -> httpx.Response:
        async with client_of(world.context()) as client:
            for method, path in requests:
                await client.request(method, path)
            return await client.get("/metrics")

    answer = asyncio.run(respond())
    assert answer.status_code == 200
    return samples_of(answer.text)


def test_metrics_are_prometheus_text_without_caching() -> None:
    answer = World(counters=INGEST_COUNTERS).ask("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert answer.headers["cache-control"] == "no-store"


def test_metrics_have_all_counters_of_ingest() -> None:
    samples = samples_of(World(counters=INGEST_COUNTERS).ask("/metrics").text)
    assert samples.of("ticks_total", exchange="exchange1") == 700
    assert samples.of("ticks_total", exchange="Exchange2") == 0
    assert samples.of("ticks_rejected_total", exchange="exchange1", reason="malformed") == 3
    assert samples.of("ticks_rejected_total", exchange="exchange1", reason="bad_price") == 0
    assert samples.of("timestamps_replaced_total", exchange="exchange1") == 2
    assert samples.of("feed_reconnects_total", exchange="exchange1") == 5
    last = "feed_last_tick_timestamp_seconds"
    assert samples.of(last, exchange="exchange1") == 1_763_690_430.25
    assert samples.of(last, exchange="Exchange2") is None
    assert samples.of("feed_connected", exchange="exchange1") == 1
    assert {name: samples.of(name) for name in COUNTERS} == COUNTERS


def test_latency_histogram_has_cumulative_buckets() -> None:
    samples = samples_of(World(counters=INGEST_COUNTERS).ask("/metrics").text)
    buckets = [samples.of("tick_to_cache_seconds_bucket", le=le) for le in ("0.001", "0.01", "+Inf")]
    assert buckets == [90, 99, 100]
    assert samples.of("tick_to_cache_seconds_count") == 100
    assert samples.of("tick_to_cache_seconds_sum") == 0.75


def test_metrics_have_doubles_holes_and_delays_of_feeds() -> None:
    samples = samples_of(World(counters=INGEST_COUNTERS).ask("/metrics").text)
    assert samples.of("feed_doubles_total", exchange="exchange1") == 23
    assert samples.of("feed_doubles_total", exchange="Exchange2") == 0
    assert samples.of("holes", exchange="exchange1", state="open") == 24
    assert samples.of("holes", exchange="exchange1", state="given_up") == 0
    assert samples.of("candles_verified_total", exchange="exchange1", result="verified") == 29
    assert samples.of("candles_verified_total", exchange="exchange1", result="different") == 30
    delay = "feed_trade_delay_seconds"
    buckets = [samples.of(f"{delay}_bucket", exchange="exchange1", le=le) for le in ("0.1", "1.0", "+Inf")]
    assert buckets == [25, 51, 78]
    assert samples.of(f"{delay}_sum", exchange="exchange1") == 28.5
    assert samples.of(f"{delay}_count", exchange="Exchange2") is None  # of an earlier version


def test_metrics_have_mode_and_store_state() -> None:
    world = World()
    world.mode.current = Mode.LIVE
    samples = samples_of(world.ask("/metrics").text)
    assert samples.of("mode", mode="live") == 1
    assert samples.of("mode", mode="test") == 0
    assert samples.of("store_up", store="redis") == 1
    assert samples.of("store_up", store="postgres") == 1


def test_metrics_without_ingest_process_have_no_tick_counters() -> None:
    samples = samples_of(World(counters=None).ask("/metrics").text)
    assert samples.of("feeds_up") == 0
    assert not [name for name, _ in samples if name.startswith(("marketflow_ticks", "marketflow_aggregates"))]
    assert samples_of(World(counters=INGEST_COUNTERS).ask("/metrics").text).of("feeds_up") == 1


def test_metrics_have_owner_and_standby_of_each_shard() -> None:
    shards = {"exchange1/1of2": True, "exchange1/2of2": False}
    of_shards = structs.replace(INGEST_COUNTERS, shards_owned=shards, shards_standby=shards, shard_takeovers=3)
    samples = samples_of(World(counters=of_shards).ask("/metrics").text)
    for name in ("shard_owned", "shard_standby"):
        assert [samples.of(name, shard=shard) for shard in shards] == [1, 0]
    assert samples.of("shard_takeovers_total") == 3
    alone = structs.replace(INGEST_COUNTERS, shards_owned={})
    assert samples_of(World(counters=alone).ask("/metrics").text).of("shard_takeovers_total") is None


# Requests


def test_requests_count_by_route_method_and_status() -> None:
    world = World()
    world.trade(5.0, 100)
    latest = "/prices/latest/{symbol}"
    counted = after(
        world,
        ("GET", "/prices/latest/BTCUSDT"),
        ("GET", "/prices/latest/btcusdt"),
        ("GET", "/prices/latest/NONE"),
        ("HEAD", "/prices/latest/exchange1/BTCUSDT"),
        ("DELETE", "/mode"),
    )
    assert counted.requests() == {
        (latest, "GET", "200"): 2,
        (latest, "GET", "404"): 1,
        ("/prices/latest/{exchange}/{symbol}", "HEAD", "200"): 1,
        ("/mode", "DELETE", "405"): 1,
    }


def test_unknown_paths_and_methods_share_one_series() -> None:
    invented = [(f"METHOD{number}", f"/path/{number}") for number in range(20)]
    assert after(World(), *invented).requests() == {(OTHER, OTHER, "404"): 20}


def test_requests_rejected_before_routing_are_counted() -> None:
    async def respond() -> str:
        async with client_of(World().context()) as client:
            refused = await client.post("/mode/live", headers={"sec-fetch-site": "cross-site"})
            assert refused.status_code == 403
            return (await client.get("/metrics")).text

    assert samples_of(asyncio.run(respond())).requests() == {(OTHER, "POST", "403"): 1}


def test_internal_errors_are_counted_as_500() -> None:
    world = World()

    def failing() -> None:
        raise ZeroDivisionError

    world.cache.on_ask = failing
    path = "/prices/latest/{symbol}"
    assert after(world, ("GET", "/prices/latest/BTCUSDT")).requests() == {(path, "GET", "500"): 1}


def test_request_duration_is_observed() -> None:
    samples = after(World(), ("GET", "/livez"))
    labels = {"route": "/livez", "method": "GET", "status": "200"}
    assert 0 < (samples.of("http_request_seconds_sum", **labels) or 0) < 10
    assert samples.of("http_request_seconds_bucket", le="+Inf", **labels) == 1


# Streams


def test_streams_are_counted_without_duration() -> None:
    samples = after(World(), ("GET", "/stream/prices"), ("HEAD", "/stream/prices"), ("GET", "/stream/prices?symbols=x"))
    assert samples.of("stream_clients", transport="sse") == 0
    assert samples.of("stream_clients", transport="websocket") == 0
    assert samples.of("stream_events_total", transport="sse") == 2  # a snapshot and the end
    assert samples.of("stream_events_total", transport="websocket") == 0
    assert samples.requests() == {("/stream/prices", "HEAD", "200"): 1, ("/stream/prices", "GET", "404"): 1}


# Forms


def test_openmetrics_is_sent_on_request() -> None:
    answer = World(counters=INGEST_COUNTERS).ask(
        "/metrics", headers={"accept": "application/openmetrics-text;version=1.0.0"}
    )
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert {f"marketflow_{name}" for name in ("ticks", "mode", "tick_to_cache_seconds")} <= _names(
        parse_openmetrics(answer.text)
    )


@pytest.mark.parametrize(
    "accept", ["application/openmetrics-text;version=no.number", "text/plain;version=", "*/*", ";"]
)
def test_invalid_accept_gets_plain_text(accept: str) -> None:
    answer = World().ask("/metrics", headers={"accept": accept})
    assert answer.headers["content-type"].startswith("text/plain; version=")


def _names(families: Iterable[object]) -> set[str]:
    return {family.name for family in families}  # type: ignore[attr-defined]
