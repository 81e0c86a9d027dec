"""Fills candles without ticks: flat ones at the close before them, and never beyond what is on record.

A gap at an edge of the range is filled as far as there is a candle on its other side, so that the same time is answered
the same in every range.
"""

from bisect import bisect_right
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from marketflow.api.queries.candles import CandleRequest, CandleRows
from marketflow.api.queries.either_store import both, unless_unavailable
from marketflow.model import Amounts, Candle

RunQuery = Callable[[CandleRequest], Awaitable[CandleRows]]


class _Neighbours(NamedTuple):
    """The last candle before a range and the first one after it; None where there is none, or it is unknown."""

    before: Candle | None
    after: Candle | None
    complete: bool
    """Whether a later query finds the same ones."""


async def filled_candles(run: RunQuery, wanted: CandleRequest, horizon: int) -> CandleRows:
    """Return the candles of a request with those without ticks.

    Args:
        run: answers a request without filling.
        wanted: the request.
        horizon: Unix ms; there are no candles from this time on.

    Raises:
        Unavailable: no candle was found, and a store that was needed is unavailable.
    """
    grid = wanted.grid
    since = None if wanted.since is None else grid.at_or_after(min(wanted.since, horizon))
    until = horizon if wanted.until is None else grid.at_or_after(min(wanted.until, horizon))
    rows = await run(wanted)
    neighbours = await _neighbours(run, wanted, rows, since, until if until < horizon else None)
    begin = since if since is not None and neighbours.before else min(rows.candles, default=None)
    end = until if neighbours.after else grid.end_of(max(rows.candles)) if rows.candles else None
    settled = rows.settled and neighbours.complete
    if begin is None or end is None:
        return rows._replace(settled=settled)
    starts = grid.starts(begin, end)
    starts = starts[-wanted.limit :] if since is None else starts[: wanted.limit]
    known = [*rows.candles]
    candles, filled = {}, set()
    last = neighbours.before
    if starts and (earlier := bisect_right(known, starts[0])):
        last = rows.candles[known[earlier - 1]]
    for start in starts:
        if (candle := rows.candles.get(start)) is None:
            assert last is not None, "the first candle has ticks, or there is one before it"
            candle = _flat(last, start)
            filled.add(start)
        candles[start] = last = candle
    return rows._replace(candles=candles, filled=frozenset(filled), settled=settled)


async def _neighbours(
    run: RunQuery, wanted: CandleRequest, rows: CandleRows, since: int | None, until: int | None
) -> _Neighbours:
    """Find the candles beside a range, as far as a gap at its edge asks for them; `until` is None without an end."""
    is_full = since is not None and len(rows.candles) >= wanted.limit
    needs_before = since is not None and since not in rows.candles
    needs_after = until is not None and not is_full and not _reaches(rows, until)
    before, after = await both(
        unless_unavailable(run(CandleRequest(wanted.grid, None, since, 1))) if needs_before else _none(),
        unless_unavailable(run(CandleRequest(wanted.grid, until, None, 1))) if needs_after else _none(),
    )
    first, last = (next(iter(each.candles.values()), None) if each else None for each in (before, after))
    # One that is not there yet may come.
    return _Neighbours(first, last, not (needs_before and before is None) and not (needs_after and last is None))


def _reaches(rows: CandleRows, until: int) -> bool:
    return bool(rows.candles) and rows.grid.end_of(max(rows.candles)) >= until


async def _none() -> None:
    return None


def _flat(last: Candle, start: int) -> Candle:
    """Return a candle without ticks at the close of the last one; where amounts are known, nothing was traded."""
    amounts = None if last.amounts is None else Amounts(0.0, *(_zero(each) for each in _further(last.amounts)))
    price = last.close
    return Candle(price, price, price, price, 0.0, 0, start, start, start, start, 0, 0, amounts=amounts)


def _further(amounts: Amounts) -> tuple[float | None, float | None, float | None]:
    return amounts.turnover, amounts.buy_volume, amounts.buy_turnover


def _zero(amount: float | None) -> float | None:
    return None if amount is None else 0.0
