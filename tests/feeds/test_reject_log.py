"""What is dropped and what is dated by receipt is a line of log a minute, for each exchange."""

from marketflow.counters import ExchangeCounters
from marketflow.feeds.reject_log import FeedRates


def counted(ticks: int, replaced: int = 0, **rejected: int) -> ExchangeCounters:
    return ExchangeCounters(ticks, {"stale": 0, "bad_price": 0} | rejected, replaced, 0, None)


def test_log_counts_dropped_and_redated_since_its_last_line(log: list[str]) -> None:
    rates = FeedRates()
    rates.log({"exchange1": counted(100), "exchange2": counted(7, stale=3)}, 60.0)
    assert len(log) == 1
    assert "in the last 60 s 3 lines were dropped (3 stale), 0 of 7 ticks dated by receipt" in log[0]
    rates.log({"exchange1": counted(150, replaced=20), "exchange2": counted(9, stale=4, bad_price=2)}, 60.0)
    assert len(log) == 3
    assert "0 lines were dropped, 20 of 50 ticks dated by receipt" in log[1]
    assert "3 lines were dropped (1 stale, 2 bad_price), 0 of 2 ticks dated by receipt" in log[2]
    rates.log({"exchange1": counted(200, replaced=20), "exchange2": counted(11, stale=4, bad_price=2)}, 60.0)
    assert len(log) == 3
