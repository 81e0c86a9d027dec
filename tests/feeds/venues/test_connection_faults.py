"""What connections to venues have met elsewhere: silence, refusals, cuts and repetitions."""

import threading
import time
from contextlib import suppress
from typing import Any

import pytest
from reactivex import abc, typing
from websockets.exceptions import ConnectionClosed
from websockets.protocol import State
from websockets.sync.server import ServerConnection

from marketflow.clock import system_clock
from marketflow.feeds.backfill.minute_trades import trades_of_minute
from marketflow.feeds.backfill.rest_client import RestClient
from marketflow.feeds.decoder import Decoder
from marketflow.feeds.tcp import ConnectionSilent
from marketflow.feeds.venues.limits import AttemptBudget, VenueRefusal
from marketflow.feeds.venues.registry import VENUES
from marketflow.feeds.venues.websocket import venue_connection
from marketflow.feeds.venues.websocket_feed import VenueFeed
from marketflow.model import MINUTE_MS, Candles, FeedState, Mode, minute_start
from marketflow.pipeline.fan_in import FeedSet, ModeSwitch, fan_in
from marketflow.pipeline.instrumentation import PipelineCounters
from marketflow.tasks import Backoff
from tests.feeds.venues.test_websocket_feed import SYMBOLS, Receiver, receiving, trade
from tests.pipeline.virtual_time import VirtualTime
from tests.support.servers import wait_until
from tests.support.venue_server import VenueServer


class Pauses(VirtualTime):
    """Time that counts how many pauses have begun."""

    pauses = 0

    def schedule_relative(
        self, duetime: typing.RelativeTime, action: typing.ScheduledAction[Any], state: Any = None
    ) -> abc.DisposableBase:
        found = super().schedule_relative(duetime, action, state)
        self.pauses += 1
        return found


class Reconnecting:
    """A feed that reconnects as in the pipeline, on a real server; its pauses pass when the test says so."""

    def __init__(self, server: VenueServer, venue: str) -> None:
        self.seconds = 1_000.0
        self._time = Pauses()
        self._counters = PipelineCounters()
        self.received: list[Candles] = []
        protocol = VENUES[venue]
        decoder = Decoder(Mode.LIVE, venue, SYMBOLS, system_clock, 5_000, lambda *_: None, milliseconds_only=True)
        budget = AttemptBudget(*protocol.attempts, lambda: self.seconds)
        rest = RestClient(protocol, server.rest_url)
        self.feed = VenueFeed(
            venue, protocol, SYMBOLS, {}, decoder, 15.0, budget, server.url, rest, lambda: self.seconds
        )
        self.modes = ModeSwitch(Mode.LIVE)
        feeds = FeedSet({Mode.LIVE: [self.feed]})
        backoff = Backoff(jitter=0.0)
        clock = lambda: int(self.seconds * 1e9)  # noqa: E731
        flow = fan_in(self.modes.changes, feeds, backoff, self._time, self._counters, clock)
        self._subscription = flow.subscribe(self.received.append)
        self._ended = 0

    def next_pause(self) -> float:
        """The seconds from the end of this attempt to the next one, which begins."""
        self._ended += 1
        wait_until(lambda: self._time.pauses == self._ended)
        failure = self._counters.failures[self.feed.connections[0]]
        pause = (failure.next_try_at - failure.at) / 1000
        self.seconds += pause
        self._time.advance_to(self._time.now_us + round(pause * 1e6))
        return pause

    def close(self) -> None:
        self._subscription.dispose()
        self.feed.stop()


# Silence


def test_pings_alone_make_the_connection_anew_once() -> None:
    with VenueServer("binance", SYMBOLS) as server, receiving(server, "binance", stale_after=0.5) as receiver:
        ended = threading.Event()

        def ping() -> None:
            while not ended.wait(0.05):
                with suppress(ConnectionClosed, RuntimeError):
                    server.connections[-1].ping()

        server.send(trade(server, 1))
        wait_until(lambda: receiver.feed.state is FeedState.CONNECTED)
        thread = threading.Thread(target=ping)
        thread.start()
        wait_until(lambda: bool(receiver.errors))
        with receiver.subscribe():
            wait_until(lambda: server.has_subscriber(2))
            ended.wait(0.7)  # the limit of the first connection, and more
            assert [str(error) for error in receiver.errors] == ["no trade for 0.5 s"]
            assert receiver.feed.state is FeedState.STALE
        ended.set()
        thread.join()


def test_frozen_peer_is_noticed_though_pings_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(venue_connection, "FRAME_SILENCE_SECONDS", 0.5)
    monkeypatch.setattr(type(VENUES["okx"]), "ping", (0.05, "ping"))
    with VenueServer("okx", SYMBOLS) as server, receiving(server, "okx") as receiver:
        server.send(trade(server, 1))
        wait_until(lambda: receiver.ticks == 1)
        server.freeze()
        began = time.monotonic()
        wait_until(lambda: bool(receiver.errors))
        server.thaw()
        assert time.monotonic() - began < 3
        assert isinstance(receiver.errors[0], ConnectionSilent)
        assert str(receiver.errors[0]) == "no frame for 0.5 s"
        assert receiver.feed.state is FeedState.STALE


@pytest.mark.parametrize("venue", VENUES)
def test_acknowledged_feed_without_any_trade_becomes_stale(venue: str) -> None:
    with VenueServer(venue, SYMBOLS) as server, receiving(server, venue, stale_after=0.5) as receiver:
        wait_until(lambda: bool(receiver.errors))
        assert str(receiver.errors[0]) == "no trade for 0.5 s"
        assert receiver.feed.state is FeedState.STALE


def test_slow_reader_that_is_cut_counts_all_and_finds_the_hole() -> None:
    count = 50_000
    with VenueServer("binance", SYMBOLS) as server, receiving(server, "binance") as receiver:
        server.send_together(*(trade(server, number) for number in range(1, count + 1)))
        server.close(1008, "buffer is full")
        wait_until(lambda: bool(receiver.errors))
        assert str(receiver.errors[0]) == "the venue closed the connection: 1008 buffer is full"
        assert receiver.ticks == count
        with receiver.subscribe():
            wait_until(lambda: server.has_subscriber(2))
            server.send(trade(server, count + 11))
            (hole,) = wait_until(receiver.feed.ids.missing)
        assert (hole.after_id, hole.before_id) == (count, count + 11)


# Reconnecting


def test_pauses_follow_the_venue_and_grow_until_a_trade() -> None:
    refusals = [(429, {"Retry-After": "30"})] * 3 + [(418, {})]
    with VenueServer("bybit", SYMBOLS, refusals=refusals) as server:

        def on_connect(connection: ServerConnection) -> None:
            connection.recv()
            if len(server.connections) == 6:
                connection.send(trade(server, 1))
            connection.close(1001)

        server.on_connect = on_connect
        reconnecting = Reconnecting(server, "bybit")
        pauses = [reconnecting.next_pause() for _ in range(11)]
        reconnecting.close()
    assert pauses == [30, 30, 30, 120, 16, 30, 30, 30, 30, 1, 2]


def test_heartbeats_alone_leave_the_pauses_growing() -> None:
    with VenueServer("kraken", SYMBOLS) as server:

        def beat_then_close(connection: ServerConnection) -> None:
            connection.recv()
            for _ in range(30):
                connection.send('{"channel":"heartbeat"}')
            connection.close(1001)

        server.on_connect = beat_then_close
        reconnecting = Reconnecting(server, "kraken")
        assert [reconnecting.next_pause() for _ in range(5)] == [1, 2, 4, 8, 16]
        reconnecting.close()


def test_double_on_each_connection_leaves_the_pauses_growing() -> None:
    """OKX pushes the last trade again on subscribing: it is no new one."""
    with VenueServer("okx", SYMBOLS) as server:
        last = trade(server, 1)

        def send_last_then_close(connection: ServerConnection) -> None:
            connection.recv()
            connection.send(last)
            connection.close(1001)

        server.on_connect = send_last_then_close
        reconnecting = Reconnecting(server, "okx")
        assert [reconnecting.next_pause() for _ in range(5)] == [1, 2, 4, 8, 16]
        reconnecting.close()


@pytest.mark.parametrize("venue", VENUES)
def test_cuts_at_once_make_few_handshakes_one_at_a_time(venue: str) -> None:
    with VenueServer(venue, SYMBOLS) as server:
        most_open = 0

        def on_connect(connection: ServerConnection) -> None:
            nonlocal most_open
            most_open = max(most_open, sum(each.state is State.OPEN for each in server.connections))
            connection.close(1001)

        server.on_connect = on_connect
        reconnecting = Reconnecting(server, venue)
        until = reconnecting.seconds + 600
        while reconnecting.seconds < until:
            reconnecting.next_pause()
        reconnecting.close()
        assert 20 <= server.handshakes < 40
        assert most_open == 1


ALLOWED = {"binance": (300, 300), "coinbase": (8, 1), "kraken": (150, 600), "okx": (3, 1), "bybit": (500, 300)}
"""By the venues' documents: connections, and in how many seconds."""


@pytest.mark.parametrize("venue", VENUES)
def test_all_feeds_of_a_process_begin_fewer_than_allowed(venue: str) -> None:
    now = 0.0
    budget = AttemptBudget(*VENUES[venue].attempts, lambda: now)
    begun = []
    for _ in range(1_000):
        now += budget.take()
        begun.append(now)
    most, seconds = ALLOWED[venue]
    assert max(sum(at <= each < at + seconds for each in begun) for at in {*begun}) < most


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (403, b"<html><title>Access denied</title></html>", "403: refused by the venue for this address or location"),
        (451, b"<html>Unavailable For Legal Reasons</html>", "451: refused by the venue for this location"),
        (429, b"error code: 1015", "429: the venue is asked too often from this address"),
    ],
)
def test_refusal_with_a_page_says_whether_place_or_address(status: int, body: bytes, words: str) -> None:
    with VenueServer("binance", SYMBOLS) as server:
        server.refuse(status, {"Content-Type": "text/html"}, body)
        receiver = Receiver(server, "binance")
        with receiver.subscribe():
            wait_until(lambda: bool(receiver.errors))
        (error,) = receiver.errors
        assert isinstance(error, VenueRefusal)
        assert str(error) == words
        assert error.pause_seconds >= 30


@pytest.mark.parametrize("wrapped", [False, True])
def test_shutdown_notice_of_binance_leaves_no_gap(monkeypatch: pytest.MonkeyPatch, wrapped: bool) -> None:
    monkeypatch.setattr(venue_connection, "OVERLAP_SECONDS", 0.3)
    notice = f'{{"e":"serverShutdown","E":{time.time_ns() // 1_000_000}}}'
    with VenueServer("binance", SYMBOLS) as server, receiving(server, "binance") as receiver:
        old = server.connections[0]

        def on_connect(new: ServerConnection) -> None:
            for number in range(6, 10):
                old.send(trade(server, number))

        server.on_connect = on_connect
        server.send(*(trade(server, number) for number in range(1, 6)))
        server.send(f'{{"stream":"!serverShutdown","data":{notice}}}' if wrapped else notice)
        wait_until(lambda: server.has_subscriber(2))
        server.send(*(trade(server, number) for number in range(8, 13)))
        wait_until(lambda: receiver.ticks == 12)
        wait_until(lambda: old.state is State.CLOSED)
        newest = receiver.feed.ids.newest("BTCUSDT")
        assert newest is not None
        assert newest == (12, receiver.feed.ids.complete_until("BTCUSDT"))  # nothing is missing before it
        assert receiver.feed.doubles == 2
        assert not receiver.errors


# Filling


def test_live_trades_flow_while_rest_hangs() -> None:
    with VenueServer("binance", SYMBOLS) as server, receiving(server, "binance") as receiver:
        minute = minute_start(time.time_ns() // 1_000_000) - MINUTE_MS
        for number in range(1, 9):
            server.book.add(server.make(number, at=minute + number))
        server.send(trade(server, 9))
        wait_until(lambda: receiver.ticks == 1)
        found: list[int | None] = []

        def fetch() -> None:
            found.extend(each.id for each in trades_of_minute(receiver.feed.rest, "BTCUSDT", minute, 9))

        server.rest_hangs.set()
        asked = len(server.rest_requests)
        thread = threading.Thread(target=fetch)
        thread.start()
        wait_until(lambda: len(server.rest_requests) > asked)
        for number in range(10, 60):
            server.trade(server.make(number))
        wait_until(lambda: receiver.ticks == 51, 2.0)
        assert not found
        server.rest_hangs.clear()
        thread.join(10)
        assert found == [*range(1, 9)]
