"""The venue's own candles of a minute: closed ones only, and none for a minute without trades, at every venue.

Venues differ in how they say that nothing was traded: no row, a flat one with a volume of 0, or a count of 0.
"""

from marketflow.feeds.backfill.rest_client import RestClient, RestFailed
from marketflow.feeds.decoder import MAX_PRICE
from marketflow.feeds.venues.limits import http_date
from marketflow.feeds.venues.venue import RestReply, VenueCandle
from marketflow.model import MINUTE_MS, Amounts, Candle, VenueValues


class RangeNotHonoured(RestFailed):
    """The venue answers with candles of another time than was asked for."""


def candles_between(
    client: RestClient, rest_symbol: str, since_ms: int, until_ms: int, now_ms: int
) -> dict[int, VenueCandle]:
    """The venue's candles of the closed minutes that start from `since_ms` to before `until_ms`, by their start.

    A minute that the venue does not count as closed yet is absent as one without trades is: ask some seconds after.

    Args:
        client: of the venue.
        rest_symbol: by its name in REST calls.
        since_ms: Unix ms.
        until_ms: Unix ms.
        now_ms: this machine's time in Unix ms.

    Raises:
        RangeNotHonoured: the venue does not give candles from that far back, or gives others than those asked for.
        VenueRefusal: the venue refuses to answer.
        RestFailed: it cannot be asked, or its answer is none.
    """
    rest = client.venue.rest
    since = since_ms + -since_ms % MINUTE_MS
    if rest.candles_kept_ms is not None and since < now_ms - rest.candles_kept_ms:
        hours = rest.candles_kept_ms / 3_600_000
        raise RangeNotHonoured(f"{client.venue.name} gives candles of the last {hours:g} hours only")
    found: dict[int, VenueCandle] = {}
    until = min(until_ms, now_ms)
    for begin in range(since, until, rest.candles_a_call * MINUTE_MS):
        end = min(begin + rest.candles_a_call * MINUTE_MS, until)
        while end > begin:
            rows = _page(client, rest_symbol, begin, end, now_ms)
            found |= {row.start: row for row in rows if _has_trades(row.values)}
            # Older ones may have been cut off, if the venue gives fewer rows a call than it says.
            end = min((row.start for row in rows), default=begin)
    return dict(sorted(found.items()))


def venue_minute(row: VenueCandle) -> Candle:
    """The candle of a minute as the venue has it; of the times of its prices only the minute is known.

    An open that is the close of the minute before may lie beyond the prices of this one: the nearest of them is taken.
    """
    start, values, vwap = row.start, row.values, row.vwap
    amounts = None
    if values.volume is not None:
        amounts = Amounts(values.volume, values.turnover, row.buy_volume, row.buy_turnover)
    if vwap is None and values.volume and values.turnover is not None:
        vwap = values.turnover / values.volume
    ticks, total = (values.ticks, vwap * values.ticks) if values.ticks and vwap else (0, 0.0)
    opening, closing = (min(max(price, values.low), values.high) for price in (values.open, values.close))
    prices = opening, values.high, values.low, closing
    times = start, start + MINUTE_MS - 1, start, start
    return Candle(*prices, total, ticks, *times, 0, 0, amounts=amounts, source="venue")


def _page(client: RestClient, symbol: str, begin: int, end: int, now_ms: int) -> list[VenueCandle]:
    """The closed rows of the minutes from `begin` to before `end`."""
    rest = client.venue.rest

    def parse(reply: RestReply) -> tuple[list[VenueCandle], int]:
        return rest.candles(reply), min(now_ms, _date(reply) or now_ms)

    rows, venue_now = client.ask(rest.candles_call(symbol, begin, end, now_ms), parse)
    _check_range(client, symbol, rows, begin, end)
    closed = {
        row for row in rows if begin <= row.start < end and row.is_closed is not False and _is_over(row, venue_now)
    }
    if len({row.start for row in closed}) < len(closed):
        raise RestFailed(f"{client.venue.name} gives two candles of {symbol} for one minute")
    return list(closed)


def _check_range(client: RestClient, symbol: str, rows: list[VenueCandle], begin: int, end: int) -> None:
    name = client.venue.name
    for row in rows:
        if row.start % MINUTE_MS or not _is_valid(row):
            raise RestFailed(f"a candle of {name} is none of a minute, or has no valid numbers: {row}")
    starts = [row.start for row in rows]
    rest = client.venue.rest
    is_cut = len(rows) >= rest.candles_a_call and min(starts) > begin
    others = [start < begin for start in starts if not begin <= start < end]
    is_other = len(others) == len(rows) and any(
        not (rest.gives_older_candles if is_older else rest.gives_newer_candles) for is_older in others
    )
    if rows and (is_cut or is_other):
        raise RangeNotHonoured(
            f"{name} gives candles of {symbol} from {min(starts)} to {max(starts)}, not from {begin} to before {end}"
        )


def _is_over(row: VenueCandle, now_ms: int) -> bool:
    return row.start + MINUTE_MS <= now_ms


def _is_valid(row: VenueCandle) -> bool:
    values = row.values
    prices = values.open, values.high, values.low, values.close
    said = values.volume, values.turnover, values.ticks, row.vwap, row.buy_volume, row.buy_turnover
    amounts = [each or 0 for each in said]
    return min(prices) > 0 and max(*prices, *amounts) <= MAX_PRICE and min(amounts) >= 0 and values.low <= values.high


def _has_trades(values: VenueValues) -> bool:
    return values.ticks != 0 and not (values.ticks is None and values.volume == 0)


def _date(reply: RestReply) -> int | None:
    """The venue's clock by the header of its answer, in whole seconds of Unix ms."""
    seconds = http_date(reply.headers.get("Date", ""))
    return None if seconds is None else int(seconds * 1000)
