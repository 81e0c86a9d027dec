"""Event ids and versions: a client that resumes with an id receives everything after that event."""

from itertools import pairwise

import pytest

from marketflow.api.streaming.encoding import Message
from marketflow.api.streaming.subscription import Subscription
from marketflow.api.streaming.versioned_state import START, Position, VersionedState
from marketflow.health import Health
from marketflow.model import FeedState, Mode, Series, Tick

PAIRS = [("exchange1", "BTCUSDT"), ("exchange1", "ETHUSDT")]
ALL = Subscription(["exchange1"], ["BTCUSDT", "ETHUSDT"], frozenset(PAIRS))


def health(mode: Mode, redis: str = "ok") -> Health:
    return Health(
        status="ok", mode=mode, uptime_seconds=1.0, postgres="ok", redis="ok" if redis == "ok" else "down",
        exchanges={"exchange1": FeedState.GENERATED},
    )  # fmt: skip


@pytest.fixture
def state() -> VersionedState:
    state = VersionedState(frozenset(PAIRS), Mode.TEST, lambda: None)
    state.put_health(health(Mode.TEST))
    state.mark_complete()
    put(state, 1.0)
    return state


def put(state: VersionedState, price: float, mode: Mode = Mode.TEST) -> None:
    state.put([(Series(mode, *pair), Tick(price, int(price * 1000), 0)) for pair in PAIRS])


def delta(state: VersionedState, seen: Position) -> tuple[list[Message], Position]:
    batch, position = state.delta(ALL, seen)
    return list(batch.messages if batch else ()), position


def changes(state: VersionedState, seen: Position) -> None:
    """Change prices and health at once."""
    put(state, 2.0)
    state.put_health(health(Mode.TEST, "down"))


def switched(state: VersionedState, seen: Position) -> None:
    put(state, 2.0)
    state.switch(Mode.LIVE, health(Mode.LIVE))
    state.mark_complete()
    put(state, 3.0, Mode.LIVE)


@pytest.mark.parametrize("change", [changes, switched])
@pytest.mark.parametrize("beats", [0, 1])
def test_client_cut_off_within_a_batch_receives_the_rest(state: VersionedState, change: object, beats: int) -> None:
    first, seen = delta(state, START)
    assert [each.event for each in first] == ["snapshot"]
    assert callable(change)
    change(state, seen)
    for _ in range(beats):
        state.beat(5)
    batch, _ = delta(state, seen)
    assert len(batch) >= 2
    for taken, (last, _) in enumerate(pairwise(batch), start=1):
        again, _ = delta(state, state.position(ALL, last.id))
        lacking = [each.event for each in batch[taken:] if each.event != "heartbeat"]
        events = [each.event for each in again]
        assert all(event in events for event in lacking), (last.event, events)


def test_client_with_a_whole_batch_receives_only_new_events(state: VersionedState) -> None:
    _, seen = delta(state, START)
    changes(state, seen)
    batch, _ = delta(state, seen)
    again, _ = delta(state, state.position(ALL, batch[-1].id))
    assert [each.event for each in again if each.event != "heartbeat"] == []
    put(state, 4.0)
    again, _ = delta(state, state.position(ALL, batch[-1].id))
    assert "prices" in [each.event for each in again]


def test_newer_prices_pass_after_the_clock_was_set_back(state: VersionedState) -> None:
    now_ms = 3_600_000
    state = VersionedState(frozenset(PAIRS), Mode.TEST, lambda: None, lambda: now_ms + 60_000)
    state.put_health(health(Mode.TEST))
    state.mark_complete()
    state.put([(Series(Mode.TEST, *PAIRS[0]), Tick(1.0, now_ms, 9))])
    _, seen = delta(state, START)
    now_ms -= 3_500_000  # by nearly an hour
    state.put([(Series(Mode.TEST, *PAIRS[0]), Tick(2.0, now_ms, 5))])
    batch, _ = delta(state, seen)
    assert b'"price":2.0' in batch[0].data


def test_client_that_resumes_waits_until_the_cache_is_read(state: VersionedState) -> None:
    """Else its first event would have some of the changes, or none, depending on which announcement comes first."""
    _, seen = delta(state, START)
    state.complete = False
    put(state, 2.0)
    assert delta(state, seen) == ([], seen)
    state.mark_complete()
    assert [each.event for each in delta(state, seen)[0]] == ["prices"]
