"""What several ingest processes publish and report, as if it came from one."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from marketflow.cluster.messages import ExchangeReport, FeedsQuery, FeedsReport, IngestState
from marketflow.counters import AlertCounters, Delays, ExchangeCounters, IngestCounters
from marketflow.model import FeedState, Mode

_FROM_WORST = (FeedState.CONNECTING, FeedState.STALE, FeedState.CONNECTED, FeedState.GENERATED)


def merged_state(mode: Mode, states: Sequence[IngestState], owners: Mapping[str, Sequence[IngestState]]) -> IngestState:
    """Return one state of several.

    Args:
        mode: the mode that runs.
        states: of all processes; one at least.
        owners: those of the owners of each exchange. An exchange is as its worst part.
    """
    exchanges = {
        exchange: min((state.exchanges[exchange] for state in of if exchange in state.exchanges), key=_FROM_WORST.index)
        for exchange, of in owners.items()
        if any(exchange in state.exchanges for state in of)
    }
    first = [(exchange, state) for exchange, of in owners.items() for state in reversed(of)]
    return IngestState(
        mode,
        exchanges,
        all(state.cache_complete for state in states),
        all(state.archive_available for state in states),
        tuple(sorted({branch for state in states for branch in state.stalled})),
        {exchange: state.clock_offsets_ms[exchange] for exchange, state in first if exchange in state.clock_offsets_ms},
        {exchange: state.feeds[exchange] for exchange, state in first if exchange in state.feeds},
        max(state.newest_alert_event for state in states),
    )


def merged_counters(
    counters: Sequence[IngestCounters], owners: Mapping[str, Sequence[IngestCounters]]
) -> IngestCounters:
    """Return the sums over all processes, and for each exchange over the owners of its shards."""
    exchanges = {
        exchange: _summed([each.exchanges[exchange] for each in of if exchange in each.exchanges])
        for exchange, of in owners.items()
        if any(exchange in each.exchanges for each in of)
    }
    total: IngestCounters = _summed([msgspec.structs.replace(each, exchanges={}) for each in counters])
    return msgspec.structs.replace(total, exchanges=exchanges)


def _summed(items: Sequence[Any]) -> Any:
    """Return the sum of counters of one kind, field by field; the later of two times."""
    total = items[0]
    for item in items[1:]:
        total = _plus(total, item)
    return total


def _plus(one: Any, other: Any) -> Any:
    match one, other:
        case (None, only) | (only, None):
            return only
        case dict(), dict():
            return one | {key: _plus(one.get(key), value) for key, value in other.items()}
        case Delays(), Delays():
            counts = tuple(map(sum, zip(one.counts, other.counts, strict=True)))
            return Delays(one.bounds, counts, one.total + other.total) if one.bounds == other.bounds else other
        case ((ExchangeCounters() | AlertCounters() | IngestCounters()), _):
            fields = {name: _plus(getattr(one, name), getattr(other, name)) for name in one.__struct_fields__}
            if isinstance(one, ExchangeCounters):
                fields["last_tick_at"] = max(filter(None, (one.last_tick_at, other.last_tick_at)), default=None)
            return type(one)(**fields)
    return one + other


def page_of_each(query: FeedsQuery, processes: int) -> FeedsQuery:
    """Return what to ask each process for, so that `merged_report` has the page."""
    if processes == 1:
        return query
    return msgspec.structs.replace(query, offset=0, limit=query.offset + query.limit)


def merged_report(query: FeedsQuery, reports: Sequence[FeedsReport], exchanges: Sequence[str]) -> FeedsReport:
    """Return the page of a query from the reports of several processes, each of its own series.

    Args:
        query: the query.
        reports: one at least, of `page_of_each`.
        exchanges: the configured ones, in order.
    """
    if len(reports) == 1:
        return reports[0]
    place = {exchange: number for number, exchange in enumerate(exchanges)}
    found: dict[str, ExchangeReport] = {}
    for report in reports:
        for each in report.exchanges:
            found[each.exchange] = _merged(found[each.exchange], each) if each.exchange in found else each
    series = {(each.exchange, each.symbol): each for report in reports for each in report.series}
    ordered = sorted(series.values(), key=lambda each: (place.get(each.exchange, len(place)), each.symbol))
    return FeedsReport(
        reports[0].mode,
        tuple(sorted(found.values(), key=lambda each: place.get(each.exchange, len(place)))),
        tuple(ordered[query.offset : query.offset + query.limit]),
        sum(report.total for report in reports),
    )


def _merged(one: ExchangeReport, other: ExchangeReport) -> ExchangeReport:
    """Return the report of an exchange whose shards are in two processes: that of the worse, with the sums of both."""
    worse, better = sorted((one, other), key=lambda each: _FROM_WORST.index(each.state))
    later = max(one, other, key=lambda each: each.error_at or 0)
    return msgspec.structs.replace(
        worse,
        ticks_per_second=one.ticks_per_second + other.ticks_per_second,
        doubles=_plus(one.doubles, other.doubles),
        holes=_plus(one.holes, other.holes),
        reconnects=one.reconnects + other.reconnects,
        clock_offset_ms=worse.clock_offset_ms if worse.clock_offset_ms is not None else better.clock_offset_ms,
        rest_weight_used=_plus(one.rest_weight_used, other.rest_weight_used),
        error=later.error,
        error_at=later.error_at,
        absent=_union(one.absent, other.absent),
        halted=_union(one.halted, other.halted),
    )


def _union(one: Iterable[str], other: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({*one, *other}))
