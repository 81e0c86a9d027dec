"""Feeds that become stale, and processes that were suspended or whose clock was set."""

import pytest

from marketflow.alerts.stale_feeds import GAP_MS, SETTLE_MS, StaleFeeds
from marketflow.model import FeedState, Mode

NOW = 1_763_690_000_000
AFTER_MS = 15_000
STEP_MS = 500
HOUR_MS = 3_600_000


def looks(feeds: StaleFeeds, state: FeedState, since: int, until: int) -> list[int]:
    """The times at which a feed in a state becomes stale, looked at every half second."""
    return [now for now in range(since, until, STEP_MS) if feeds.take(Mode.LIVE, {"exchange1": state}, now)]


def test_feed_is_stale_after_silence_or_so_long_without_connection() -> None:
    assert looks(StaleFeeds(AFTER_MS), FeedState.STALE, NOW, NOW + 60_000) == [NOW]
    assert looks(StaleFeeds(AFTER_MS), FeedState.CONNECTING, NOW, NOW + 60_000) == [NOW + AFTER_MS]


def test_suspended_process_does_not_call_feeds_stale() -> None:
    """On waking up each feed looks silent, until what it sent meanwhile has been read."""
    feeds, resumed = StaleFeeds(AFTER_MS), NOW + 90_000
    assert not looks(feeds, FeedState.CONNECTED, NOW, NOW + 1000)
    assert not looks(feeds, FeedState.STALE, resumed, resumed + SETTLE_MS // 2)
    assert not looks(feeds, FeedState.CONNECTED, resumed + SETTLE_MS // 2, resumed + 60_000)


def test_feed_that_is_silent_after_a_suspension_is_stale() -> None:
    feeds, resumed = StaleFeeds(AFTER_MS), NOW + 90_000
    assert not looks(feeds, FeedState.CONNECTED, NOW, NOW + 1000)
    assert looks(feeds, FeedState.STALE, resumed, resumed + 60_000) == [resumed + SETTLE_MS]


@pytest.mark.parametrize("step", [HOUR_MS, -HOUR_MS, GAP_MS + 2 * STEP_MS])
def test_clock_step_restarts_the_time_without_connection(step: int) -> None:
    """Neither stale at once, nor an hour later."""
    feeds, then = StaleFeeds(AFTER_MS), NOW + 10_000 + step
    assert not looks(feeds, FeedState.CONNECTING, NOW, NOW + 10_000)
    assert looks(feeds, FeedState.CONNECTING, then, then + 60_000) == [then + SETTLE_MS + AFTER_MS]


def test_feed_that_stays_stale_over_a_suspension_is_no_event_again() -> None:
    feeds = StaleFeeds(AFTER_MS)
    assert looks(feeds, FeedState.STALE, NOW, NOW + 1000) == [NOW]
    assert not looks(feeds, FeedState.STALE, NOW + 90_000, NOW + 150_000)
