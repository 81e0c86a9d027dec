"""The candle of all trades of a minute, with sums as of their decimal digits, which are the venue's to the last one."""

from collections.abc import Sequence
from decimal import Decimal

from marketflow.feeds.venues.venue import Trade
from marketflow.model import NANOSECONDS_PER_MS, Amounts, Candle


def minute_candle(trades: Sequence[Trade]) -> Candle:
    """The candle of one minute's trades, at least one, by ascending id.

    Ids decide what comes first: many trades share one time. Their times stand for those of a receipt, which nobody
    knows.
    """
    prices = [trade.price for trade in trades]
    times = [trade.at for trade in trades]
    high, low = max(prices), min(prices)
    return Candle(
        prices[0],
        high,
        low,
        prices[-1],
        float(sum(_digits(trade.price) * trade.count for trade in trades)),
        sum(trade.count for trade in trades),
        min(times),
        max(times),
        times[prices.index(high)],
        times[prices.index(low)],
        min(times) * NANOSECONDS_PER_MS,
        max(times) * NANOSECONDS_PER_MS + len(trades),
        amounts=_amounts(trades),
    )


def _amounts(trades: Sequence[Trade]) -> Amounts:
    volume = turnover = buy_volume = buy_turnover = Decimal()
    for trade in trades:
        quantity = _digits(trade.quantity)
        paid = quantity * _digits(trade.price)
        volume += quantity
        turnover += paid
        if trade.side == "buy":
            buy_volume += quantity
            buy_turnover += paid
    return Amounts(float(volume), float(turnover), float(buy_volume), float(buy_turnover))


def _digits(value: float) -> Decimal:
    """The digits by which the number came: the shortest that give it."""
    return Decimal(repr(value))
