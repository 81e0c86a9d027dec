"""Event times of recorded frames move by whole minutes; nothing else in a frame changes."""

import random

import msgspec
import pytest

from marketflow.feeds.recording.event_times import mover
from marketflow.feeds.simulated.dialects import DIALECTS
from marketflow.feeds.venues.registry import VENUES
from marketflow.feeds.venues.venue import Trade

AT = 1_790_667_453_786


@pytest.mark.parametrize("venue", VENUES)
def test_trades_keep_all_but_their_time(venue: str) -> None:
    chance = random.Random(7)
    for minutes in (0, 1, -1, 90 * 24 * 60, -500_001):
        trade = Trade("BTCUSDT", 84034.9, 0.00044625, AT + chance.randrange(60_000), 109473031, "buy")
        frame = DIALECTS[venue].trade(trade).encode()
        (before,) = VENUES[venue].decode(frame)
        (after,) = VENUES[venue].decode(mover(venue, minutes)(frame))
        assert isinstance(before, Trade)
        assert after == msgspec.structs.replace(before, at=before.at + minutes * 60_000)


@pytest.mark.parametrize(
    ("venue", "frame", "moved"),
    [
        (
            "binance",
            b'{"e":"trade","E":1790667453786,"s":"T","t":1790667453786,"p":"1.50","q":"0.00000000","T":1790667453786}',
            b'{"e":"trade","E":1790667573786,"s":"T","t":1790667453786,"p":"1.50","q":"0.00000000","T":1790667573786}',
        ),
        ("binance", b'{"E":1790667453786123,"T":1790667453786123}', b'{"E":1790667573786123,"T":1790667573786123}'),
        (
            "coinbase",
            b'{"type":"match","time":"2026-12-31T23:58:59.104422Z","price":"77572.87"}',
            b'{"type":"match","time":"2027-01-01T00:00:59.104422Z","price":"77572.87"}',
        ),
        (
            "kraken",
            b'{"price":84035.0,"qty":0.00500000,"trade_id":109473033,"timestamp":"2026-09-29T07:37:33.888245Z"}',
            b'{"price":84035.0,"qty":0.00500000,"trade_id":109473033,"timestamp":"2026-09-29T07:39:33.888245Z"}',
        ),
        ("okx", b'{"ts":"1788118931677","tradeId":"1051102132"}', b'{"ts":"1788119051677","tradeId":"1051102132"}'),
        (
            "bybit",
            b'{"ts":1789875217841,"data":[{"T":1789875217840,"i":"2290000001211680903"}]}',
            b'{"ts":1789875337841,"data":[{"T":1789875337840,"i":"2290000001211680903"}]}',
        ),
        ("", b'{"symbol":"A","timestamp": 1790667453786}', b'{"symbol":"A","timestamp": 1790667573786}'),
        ("", b'{"symbol":"A","timestamp":"1790667453"}', b'{"symbol":"A","timestamp":"1790667573"}'),
        ("kraken", b'{"timestamp":"soon"}', b'{"timestamp":"soon"}'),
        ("kraken", b'{"timestamp":"2026-99-99T07:37:00Z"}', b'{"timestamp":"2026-99-99T07:37:00Z"}'),
        ("okx", b"\x00\xff", b"\x00\xff"),
    ],
)
def test_only_times_change_in_a_frame(venue: str, frame: bytes, moved: bytes) -> None:
    assert mover(venue, 2)(frame) == moved
    assert mover(venue, 0)(frame) == frame
