"""Timestamps of a protocol that says milliseconds: another magnitude is an error of the feed, not a date."""

import pytest

from marketflow.feeds.decoder import Decoder, TradeLine
from marketflow.model import Mode
from tests.feeds.test_decoder import NOW, NOW_MS, Rejected

YEAR_2100_MS = 4_102_444_800_000


def decoder() -> Decoder:
    return Decoder(Mode.LIVE, "binance", ["BTCUSDT"], lambda: NOW, 5000, Rejected(), milliseconds_only=True)


@pytest.mark.parametrize(
    ("timestamp", "reason"),
    [
        (NOW_MS * 1000, "bad_time"),
        (NOW, "bad_time"),
        (NOW_MS // 1000, "bad_time"),
        (0, "bad_time"),
        (-NOW_MS, "bad_time"),
        (YEAR_2100_MS, "ahead"),
        (NOW_MS - 60_000, "stale"),
    ],
)
def test_time_of_another_magnitude_is_rejected_however_often(timestamp: int, reason: str) -> None:
    feed = decoder()
    for _ in range(100):
        assert feed.fold([TradeLine("BTCUSDT", 10.0, timestamp, 1.0, "buy")]) == {}
    assert feed.rejected == {reason: 100}
    assert feed.fold([TradeLine("BTCUSDT", 10.0, NOW_MS, 1.0, "buy")])
