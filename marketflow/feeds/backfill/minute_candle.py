"""The candle of all trades of a minute: each sum is rounded once, so it is the venue's to the last digit."""

from collections.abc import Sequence

from marketflow.feeds.decoder import traded
from marketflow.feeds.venues.venue import Trade
from marketflow.model import NANOSECONDS_PER_MS, Candle


def minute_candle(trades: Sequence[Trade]) -> Candle:
    """The candle of one minute's trades, at least one, by ascending id.

    Ids decide what comes first: many trades share one time. Their times stand for those of a receipt, which nobody
    knows.
    """
    prices = [trade.price for trade in trades]
    times = [trade.at for trade in trades]
    high, low = max(prices), min(prices)
    total, ticks, amounts = traded(prices, trades)
    return Candle(
        prices[0],
        high,
        low,
        prices[-1],
        total,
        ticks,
        min(times),
        max(times),
        times[prices.index(high)],
        times[prices.index(low)],
        min(times) * NANOSECONDS_PER_MS,
        max(times) * NANOSECONDS_PER_MS + len(trades),
        amounts=amounts,
    )
