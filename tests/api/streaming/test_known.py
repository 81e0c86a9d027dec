"""Ids of events: whoever comes back with one has seen that event, and is sent everything after it."""

from itertools import pairwise

import pytest

from marketflow.api.streaming.events import Message
from marketflow.api.streaming.known_state import NOTHING, Known, Position
from marketflow.api.streaming.selection import Selection
from marketflow.health import Health
from marketflow.model import FeedState, Mode, Series, Tick

PAIRS = [("exchange1", "BTCUSDT"), ("exchange1", "ETHUSDT")]
ALL = Selection(["exchange1"], ["BTCUSDT", "ETHUSDT"], frozenset(PAIRS))


def health(mode: Mode, redis: str = "ok") -> Health:
    return Health(
        status="ok", mode=mode, uptime_seconds=1.0, postgres="ok", redis="ok" if redis == "ok" else "down",
        exchanges={"exchange1": FeedState.GENERATED},
    )  # fmt: skip


@pytest.fixture
def known() -> Known:
    known = Known(frozenset(PAIRS), Mode.TEST, lambda: None)
    known.put_health(health(Mode.TEST))
    known.finish()
    put(known, 1.0)
    return known


def put(known: Known, price: float, mode: Mode = Mode.TEST) -> None:
    known.put([(Series(mode, *pair), Tick(price, int(price * 1000), 0)) for pair in PAIRS])


def told(known: Known, seen: Position) -> tuple[list[Message], Position]:
    batch, position = known.step(ALL, seen)
    return list(batch.messages if batch else ()), position


def changes(known: Known, seen: Position) -> None:
    """Everything at once: prices, health, another mode."""
    put(known, 2.0)
    known.put_health(health(Mode.TEST, "down"))


def switched(known: Known, seen: Position) -> None:
    put(known, 2.0)
    known.switch(Mode.LIVE, health(Mode.LIVE))
    known.finish()
    put(known, 3.0, Mode.LIVE)


@pytest.mark.parametrize("change", [changes, switched])
@pytest.mark.parametrize("beats", [0, 1])
def test_client_cut_off_within_a_batch_gets_the_rest(known: Known, change: object, beats: int) -> None:
    first, seen = told(known, NOTHING)
    assert [each.event for each in first] == ["snapshot"]
    assert callable(change)
    change(known, seen)
    for _ in range(beats):
        known.beat(5)
    batch, _ = told(known, seen)
    assert len(batch) >= 2
    for taken, (last, _) in enumerate(pairwise(batch), start=1):
        again, _ = told(known, known.position(ALL, last.id))
        lacking = [each.event for each in batch[taken:] if each.event != "heartbeat"]
        events = [each.event for each in again]
        assert all(event in events for event in lacking), (last.event, events)


def test_client_that_has_seen_a_whole_batch_gets_only_what_is_new(known: Known) -> None:
    _, seen = told(known, NOTHING)
    changes(known, seen)
    batch, _ = told(known, seen)
    again, _ = told(known, known.position(ALL, batch[-1].id))
    assert [each.event for each in again if each.event != "heartbeat"] == []
    put(known, 4.0)
    again, _ = told(known, known.position(ALL, batch[-1].id))
    assert "prices" in [each.event for each in again]


def test_prices_go_on_after_the_clock_was_set_back(known: Known) -> None:
    now_ms = 3_600_000
    known = Known(frozenset(PAIRS), Mode.TEST, lambda: None, lambda: now_ms + 60_000)
    known.put_health(health(Mode.TEST))
    known.finish()
    known.put([(Series(Mode.TEST, *PAIRS[0]), Tick(1.0, now_ms, 9))])
    _, seen = told(known, NOTHING)
    now_ms -= 3_500_000  # by nearly an hour
    known.put([(Series(Mode.TEST, *PAIRS[0]), Tick(2.0, now_ms, 5))])
    batch, _ = told(known, seen)
    assert b'"price":2.0' in batch[0].data
