"""What /metrics exposes: the counters of the ingest process, and those of requests.

The counters of the ingest process are read at each scrape, so they cost no time per tick. No label takes a value that a
client or an exchange can choose.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, choose_encoder, generate_latest
from prometheus_client.registry import Collector

from marketflow import __version__
from marketflow.alerts.alert_model import KINDS
from marketflow.api.context import Context
from marketflow.api.middleware.registered_metrics import RegisteredMetrics
from marketflow.counters import AlertCounters, Delays, ExchangeCounters, IngestCounters
from marketflow.health import Health
from marketflow.model import FINE_STATES, HoleState, Mode


def exposition(context: Context, registered: RegisteredMetrics, accept: str) -> tuple[bytes, str]:
    """Return all metrics as text and its media type, by an `Accept` header."""
    try:
        encode, content_type = choose_encoder(accept)
    except (ValueError, TypeError):  # the version in Accept is invalid
        encode, content_type = generate_latest, CONTENT_TYPE_PLAIN_0_0_4
    return encode(_Exposed(context, registered)), content_type


class _Exposed(Collector):
    """Collects all metrics of one scrape."""

    def __init__(self, context: Context, registered: RegisteredMetrics) -> None:
        self._context = context
        self._registered = registered

    def collect(self) -> Iterable[Metric]:
        counters = self._context.counters()
        yield from _state(self._context.health(), counters)
        if counters is not None:
            yield from _feeds(counters.exchanges)
            yield from _flow(counters)
            yield from _alerts(counters.alerts)
            yield from _shards(counters)
        yield from self._registered.collect()


_Samples = Iterable[tuple[Sequence[str], float]]


def _state(health: Health, counters: IngestCounters | None) -> Iterator[Metric]:
    yield _gauge("build_info", "Version of this process.", ["version"], [([__version__], 1)])
    yield _gauge("mode", "1 for the current mode.", ["mode"], (([mode], mode is health.mode) for mode in Mode))
    stores = {"redis": health.redis, "postgres": health.postgres}
    up = (([name], state == "ok") for name, state in stores.items())
    yield _gauge("store_up", "Whether a store is available.", ["store"], up)
    yield _gauge("feeds_up", "Whether an ingest process can be reached.", [], [([], counters is not None)])
    connected = (([exchange], state in FINE_STATES) for exchange, state in health.exchanges.items())
    yield _gauge("feed_connected", "Whether ticks come from an exchange.", ["exchange"], connected)


def _feeds(exchanges: dict[str, ExchangeCounters]) -> Iterator[Metric]:
    each = exchanges.items()
    yield _counter("ticks", "Good ticks received.", ["exchange"], (([name], of.ticks) for name, of in each))
    rejected = (([name, reason], count) for name, of in each for reason, count in of.rejected.items())
    yield _counter("ticks_rejected", "Lines dropped.", ["exchange", "reason"], rejected)
    replaced = (([name], of.timestamps_replaced) for name, of in each)
    text = "Ticks dated by receipt, because their timestamp was missing or the clock of the feed is wrong."
    yield _counter("timestamps_replaced", text, ["exchange"], replaced)
    reconnects = (([name], of.reconnects) for name, of in each)
    yield _counter("feed_reconnects", "Connections lost, and failed attempts.", ["exchange"], reconnects)
    doubles = (([name], of.doubles) for name, of in each)
    yield _counter("feed_doubles", "Trades that came more than once and counted once.", ["exchange"], doubles)
    holes = (([name, state], of.holes.get(state, 0)) for name, of in each for state in HoleState)
    text = "Holes of the mode that runs: all open ones, and others of the last 24 hours."
    yield _gauge("holes", text, ["exchange", "state"], holes)
    verified = (([name, result], count) for name, of in each for result, count in of.verified.items())
    text = "Minutes of ticks compared with the venue's own candles, by result."
    yield _counter("candles_verified", text, ["exchange", "result"], verified)
    text = "From the event time of a trade to its receipt, one sample an exchange and 100 ms."
    delays = (([name], of.trade_delay) for name, of in each if of.trade_delay is not None)
    yield _histogram("feed_trade_delay_seconds", text, ["exchange"], delays)
    last = (([name], of.last_tick_at / 1000) for name, of in each if of.last_tick_at is not None)
    text = "When the last good tick of the mode that runs was received (Unix time)."
    yield _gauge("feed_last_tick_timestamp_seconds", text, ["exchange"], last)


def _flow(counters: IngestCounters) -> Iterator[Metric]:
    text = "From the receipt of a tick to its write in Redis."
    yield _histogram("tick_to_cache_seconds", text, [], [([], counters.tick_to_cache)])
    for name, text, count in (
        ("ticks_too_late", "Late ticks whose minute had been evicted from memory.", counters.ticks_too_late),
        ("cache_errors", "Writes to Redis that failed.", counters.cache_errors),
        ("archive_errors", "Writes to PostgreSQL that failed and are retried.", counters.archive_errors),
        ("aggregates_written", "Rows written, updates included.", counters.rows_written),
        ("aggregates_refused", "Rows dropped because PostgreSQL rejects them.", counters.rows_refused),
        ("aggregates_dropped", "Rows dropped because the backlog was full.", counters.rows_dropped),
        ("given_up", "Batches lost to an internal error.", counters.given_up),
    ):
        yield _counter(name, text, [], [([], count)])
    stalls = (([name], count) for name, count in counters.stalls.items())
    yield _counter(
        "branch_stalls", "How often a branch finished nothing for 30 s while work waited.", ["branch"], stalls
    )
    yield _gauge("aggregates_pending", "Rows in the backlog for PostgreSQL.", [], [([], counters.rows_pending)])


def _alerts(alerts: AlertCounters) -> Iterator[Metric]:
    events = (([kind], alerts.events.get(kind, 0)) for kind in KINDS.values())
    yield _counter("alert_events", "Events of alerts that were stored.", ["kind"], events)
    text = "Posts of events to webhooks by result, and deliveries that were given up."
    results = (([result], alerts.deliveries.get(result, 0)) for result in ("acknowledged", "failed", "given_up"))
    yield _counter("alert_deliveries", text, ["result"], results)
    text = "Events that were dropped because too many waited for PostgreSQL."
    yield _counter("alert_events_dropped", text, [], [([], alerts.events_dropped)])
    text = "Events that wait for PostgreSQL."
    yield _gauge("alert_events_pending", text, [], [([], alerts.events_pending)])
    text = "Deliveries that their webhook has not acknowledged, when last looked at."
    yield _gauge("alert_deliveries_pending", text, [], [([], alerts.deliveries_pending)])


def _shards(counters: IngestCounters) -> Iterator[Metric]:
    if counters.shards_owned:
        owned = (([shard], is_owned) for shard, is_owned in counters.shards_owned.items())
        yield _gauge("shard_owned", "Whether an ingest process that can be reached owns a shard.", ["shard"], owned)
        standby = (([shard], is_ready) for shard, is_ready in counters.shards_standby.items())
        yield _gauge("shard_standby", "Whether a shard has a standby that could take over at once.", ["shard"], standby)
        text = "How often the owner of a shard was gone and replaced."
        yield _counter("shard_takeovers", text, [], [([], counters.shard_takeovers)])


def _counter(name: str, text: str, labels: Sequence[str], samples: _Samples) -> Metric:
    family = CounterMetricFamily(f"marketflow_{name}", text, labels=labels)
    for values, count in samples:
        family.add_metric(values, count)
    return family


def _gauge(name: str, text: str, labels: Sequence[str], samples: _Samples) -> Metric:
    family = GaugeMetricFamily(f"marketflow_{name}", text, labels=labels)
    for values, state in samples:
        family.add_metric(values, float(state))
    return family


def _histogram(name: str, text: str, labels: Sequence[str], samples: Iterable[tuple[Sequence[str], Delays]]) -> Metric:
    family = HistogramMetricFamily(f"marketflow_{name}", text, labels=labels)
    for values, delays in samples:
        bounds = (*map(str, delays.bounds), "+Inf")
        family.add_metric(values, list(zip(bounds, map(float, accumulate(delays.counts)), strict=True)), delays.total)
    return family
