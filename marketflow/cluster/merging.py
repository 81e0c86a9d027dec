"""Merges the states, counters and reports of several ingest processes into one."""

from collections.abc import Mapping, Sequence

import msgspec

from marketflow.cluster.messages import ExchangeReport, FeedsQuery, FeedsReport, IngestState, Published
from marketflow.cluster.shard_table import Table
from marketflow.counters import plus
from marketflow.model import FeedState, Mode
from marketflow.settings.shards import LEAD, exchange_of

_FROM_WORST = (FeedState.CONNECTING, FeedState.STALE, FeedState.HALTED, FeedState.CONNECTED, FeedState.GENERATED)


def merged_exchanges(owners: Mapping[str, Sequence[IngestState]]) -> dict[str, FeedState]:
    """Return the state of each exchange: the worst one that an owner of its shards reports."""
    known = {name: [each.exchanges[name] for each in of if name in each.exchanges] for name, of in owners.items()}
    return {exchange: min(states, key=_FROM_WORST.index) for exchange, states in known.items() if states}


def merged_state(mode: Mode, states: Sequence[IngestState], owners: Mapping[str, Sequence[IngestState]]) -> IngestState:
    """Return one state of several.

    Args:
        mode: the current mode.
        states: of all processes that write; one at least.
        owners: the states of the owners of each exchange.
    """
    first = [(exchange, state) for exchange, of in owners.items() for state in reversed(of)]
    return IngestState(
        mode,
        merged_exchanges(owners),
        all(state.cache_complete for state in states),
        all(state.archive_available for state in states),
        tuple(sorted({branch for state in states for branch in state.stalled})),
        {exchange: state.clock_offsets_ms[exchange] for exchange, state in first if exchange in state.clock_offsets_ms},
        {exchange: state.feeds[exchange] for exchange, state in first if exchange in state.feeds},
        max(state.newest_alert_event for state in states),
    )


def owners_of(table: Table, known: Mapping[str, Published]) -> dict[str, list[Published]]:
    """Return the states of the owners of each exchange; none if a part of it has no owner and is not received.

    Args:
        table: has the owner of each shard.
        known: the states of all processes, by run.
    """
    of_exchange: dict[str, dict[str, Published | None]] = {}
    for shard, owner in owner_by_shard(table, known).items():
        of_exchange.setdefault(exchange_of(shard), {})["" if owner is None else owner.run] = owner
    return {
        exchange: [each for each in of.values() if each is not None] if "" not in of else []
        for exchange, of in of_exchange.items()
    }


def owner_by_shard(table: Table, known: Mapping[str, Published]) -> dict[str, Published | None]:
    """Return the state of the owner of each shard; None if it has none that is known. See `owners_of`."""
    shards = sorted({*table.rows, *(shard for each in known.values() for shard in each.shards)} - {LEAD})
    return {shard: _owner(shard, table, known) for shard in shards}


def _owner(shard: str, table: Table, known: Mapping[str, Published]) -> Published | None:
    """Return the state of a shard's owner by the table, or of its previous owner until the new one has begun."""
    row = table.rows.get(shard)
    by_table = known.get(row.owner or "") if row is not None else None
    owning = [each for each in known.values() if shard in each.owned]
    return by_table if by_table in owning or not owning else owning[0]


def page_of_each(query: FeedsQuery, processes: int) -> FeedsQuery:
    """Return the query for each process whose reports contain the page that `merged_report` returns."""
    if processes == 1:
        return query
    return msgspec.structs.replace(query, offset=0, limit=query.offset + query.limit)


def merged_report(query: FeedsQuery, reports: Sequence[FeedsReport], exchanges: Sequence[str]) -> FeedsReport:
    """Return the page of a query from the reports of several processes, each of its own series.

    Args:
        query: selects the page.
        reports: the replies to `page_of_each`; one at least.
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
    worse = min(one, other, key=lambda each: _FROM_WORST.index(each.state))
    later = max(one, other, key=lambda each: each.error_at or 0)
    summed = ("ticks_per_second", "doubles", "holes", "reconnects", "rest_weight_used")
    return msgspec.structs.replace(
        worse,
        **{name: plus(getattr(one, name), getattr(other, name)) for name in summed},
        error=later.error,
        error_at=later.error_at,
        absent=tuple(sorted({*one.absent, *other.absent})),
        halted=tuple(sorted({*one.halted, *other.halted})),
    )
