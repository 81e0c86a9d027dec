"""A venue's feed on a real WebSocket: it subscribes, counts each trade once, and ends for the right reasons."""

import gc
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from itertools import repeat

import pytest
from reactivex import abc
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection

from marketflow.clock import milliseconds, system_clock
from marketflow.feeds.backfill.rest_client import RestClient
from marketflow.feeds.decoder import Decoder
from marketflow.feeds.simulated.dialects import parsed
from marketflow.feeds.simulated.rest_side import RestAnswer
from marketflow.feeds.tcp import ConnectionLost, ConnectionSilent
from marketflow.feeds.venues import trade_ids
from marketflow.feeds.venues.limits import AttemptBudget, VenueRefusal, refusal_of
from marketflow.feeds.venues.registry import VENUES
from marketflow.feeds.venues.trade_ids import MissingIds
from marketflow.feeds.venues.venue import Trade
from marketflow.feeds.venues.websocket import subscriptions, venue_connection
from marketflow.feeds.venues.websocket_feed import VenueFeed
from marketflow.model import Candles, FeedState, Mode
from tests.support.servers import wait_until
from tests.support.venue_server import VenueServer

SYMBOLS = ("BTCUSDT", "ETHUSDT")


class Receiver:
    """One attempt of a feed, and what came of it."""

    def __init__(
        self,
        server: VenueServer,
        venue: str,
        stale_after: float = 15.0,
        budget: int = 100,
        symbols: Sequence[str] = SYMBOLS,
    ) -> None:
        self.decoder = Decoder(Mode.LIVE, venue, symbols, system_clock, 5_000, lambda *_: None)
        attempts = AttemptBudget(budget, 60.0, time.monotonic)
        rest = RestClient(VENUES[venue], server.rest_url)
        self.feed = VenueFeed(venue, VENUES[venue], symbols, {}, self.decoder, stale_after, attempts, server.url, rest)
        self.batches: list[Candles] = []
        self.errors: list[Exception] = []
        self.completed = threading.Event()

    @property
    def ticks(self) -> int:
        return sum(candle.ticks for batch in self.batches for candle in batch.values())

    def subscribe(self) -> abc.DisposableBase:
        return self.feed.batches().subscribe(self.batches.append, self.errors.append, self.completed.set)


@contextmanager
def receiving(server: VenueServer, venue: str, stale_after: float = 15.0) -> Iterator[Receiver]:
    receiver = Receiver(server, venue, stale_after)
    subscription = receiver.subscribe()
    try:
        wait_until(server.has_subscriber)
        yield receiver
    finally:
        subscription.dispose()


def trade(server: VenueServer, number: int, symbol: str = "BTCUSDT", price: float = 100.5) -> str:
    at = time.time_ns() // 1_000_000
    return server.dialect.trade(Trade(server.dialect.native(symbol), price, 0.25, at, number, "buy"))


@pytest.mark.parametrize("venue", VENUES)
def test_trades_arrive_once_under_our_names(venue: str) -> None:
    with VenueServer(venue, SYMBOLS) as server, receiving(server, venue) as receiver:
        server.send(*(trade(server, number) for number in (1, 2, 2, 3, 1)), trade(server, 1, "ETHUSDT", 7.5))
        wait_until(lambda: receiver.ticks == 4)
        assert {slot.series.symbol for batch in receiver.batches for slot in batch} == set(SYMBOLS)
        assert receiver.feed.doubles == 2
        assert receiver.feed.state is FeedState.CONNECTED
        receiver.feed.stop()
        assert receiver.completed.wait(5)
        assert not receiver.errors


@pytest.mark.parametrize("venue", VENUES)
def test_hostile_frames_are_counted_and_the_connection_stays(venue: str) -> None:
    with VenueServer(venue, SYMBOLS) as server, receiving(server, venue) as receiver:
        hostile: list[str | bytes] = ["[]", "42", "{", "[" * 5000, '{"x":1}', b"\x00\xff\xfe", "x" * (2 * 2**20)]
        server.send(*hostile)
        other = server.dialect.trade(Trade(server.dialect.native("XRPUSDT"), 1.0, 1.0, 1, 1, "buy"))
        server.send(other, trade(server, 1))
        wait_until(lambda: receiver.ticks == 1)
        assert receiver.decoder.rejected["too_long"] == 1
        assert receiver.decoder.rejected["unknown_symbol"] == 1
        assert receiver.decoder.rejected.total() == len(hostile) + 1
        assert not receiver.errors
        assert server.handshakes == 1


def test_trades_that_were_held_up_are_reported_as_missing() -> None:
    with VenueServer("binance", SYMBOLS) as server, receiving(server, "binance") as receiver:
        now = milliseconds(system_clock())
        old = [server.make(number, at=now - 20_000 + number) for number in (2, 3)]
        another_unit = server.make(4, at=now // 1000)
        server.send(trade(server, 1), *map(server.dialect.trade, [*old, another_unit]), trade(server, 5))
        wait_until(lambda: receiver.ticks == 2)
        assert receiver.feed.ids.missing() == [MissingIds("BTCUSDT", 1, 4, now - 19_998, now - 19_997)]


def test_id_named_by_a_heartbeat_is_missing_unless_its_trade_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trade_ids, "GRACE_SECONDS", 0.2)
    with VenueServer("coinbase", SYMBOLS) as server, receiving(server, "coinbase") as receiver:
        ids, native = receiver.feed.ids, [server.dialect.native(symbol) for symbol in SYMBOLS]
        server.send(trade(server, 5), trade(server, 8, "ETHUSDT"))
        wait_until(lambda: receiver.ticks == 2)

        def beaten() -> list[MissingIds]:
            server.send(server.dialect.beat(native[0], 8), server.dialect.beat(native[1], 8))
            return ids.missing()

        (missing,) = wait_until(beaten)
        assert (missing.symbol, missing.after_id, missing.before_id) == ("BTCUSDT", 5, 9)
        assert not receiver.errors


def test_absent_symbol_is_named_and_the_others_flow() -> None:
    with VenueServer("kraken", ["ETHUSDT"]) as server, receiving(server, "kraken") as receiver:
        server.send(trade(server, 1, "ETHUSDT"))
        wait_until(lambda: receiver.ticks == 1)
        assert receiver.feed.absent == {"BTCUSDT"}
        assert receiver.feed.rest_names == {"ETHUSDT": "ETHUSDT"}


def test_halted_symbol_is_named_and_the_others_flow(log: list[str]) -> None:
    with VenueServer("binance", SYMBOLS) as server:
        server.statuses["BTCUSDT"] = "HALT"
        with receiving(server, "binance") as receiver:
            server.send(trade(server, 1, "ETHUSDT"))
            wait_until(lambda: receiver.ticks == 1)
            assert (receiver.feed.halted, receiver.feed.absent) == ({"BTCUSDT": "HALT"}, frozenset())
            assert receiver.feed.state is FeedState.CONNECTED
            assert not receiver.feed.is_connected("BTCUSDT")
            assert receiver.feed.is_connected("ETHUSDT")
            assert "btcusdt" not in "".join(server.received[0])
    assert any("has halted, looked at again every ten minutes: BTCUSDT (HALT)" in line for line in log)


def test_symbol_that_trades_again_is_subscribed_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(venue_connection, "LOOK_AGAIN_SECONDS", 0.1)
    with VenueServer("binance", SYMBOLS) as server:
        server.statuses["BTCUSDT"] = "BREAK"
        with receiving(server, "binance") as receiver:
            wait_until(lambda: len(server.rest_requests) >= 3)
            assert not receiver.errors  # nothing has changed, so the connection stays
            server.statuses.clear()
            wait_until(lambda: bool(receiver.errors))
            assert "for symbols that trade now: BTCUSDT" in str(receiver.errors[0])
            with_again = receiver.subscribe()
            wait_until(lambda: server.has_subscriber(2))
            assert "btcusdt@trade" in server.received[1][0]
            assert receiver.feed.halted == {}
            with_again.dispose()


def test_symbol_halted_in_between_keeps_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(venue_connection, "LOOK_AGAIN_SECONDS", 0.1)
    with VenueServer("binance", SYMBOLS) as server, receiving(server, "binance") as receiver:
        server.send(trade(server, 1), trade(server, 1, "ETHUSDT"))
        wait_until(lambda: receiver.ticks == 2)
        server.statuses["BTCUSDT"] = "CANCEL_ONLY"
        wait_until(lambda: receiver.feed.halted == {"BTCUSDT": "CANCEL_ONLY"})
        server.send(trade(server, 2))  # it trades again, before the list says so
        wait_until(lambda: receiver.ticks == 3)
        assert receiver.feed.halted == {}
        assert not receiver.errors
        assert server.handshakes == 1


def test_feed_whose_symbols_are_all_halted_waits_for_the_venue(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence of the only symbol ends the connection once; the list of instruments then says why it is silent."""
    monkeypatch.setattr(venue_connection, "LOOK_AGAIN_SECONDS", 0.2)
    with VenueServer("binance", SYMBOLS) as server:
        receiver = Receiver(server, "binance", stale_after=0.3)
        subscription = receiver.subscribe()
        wait_until(server.has_subscriber)
        server.statuses.update({"BTCUSDT": "HALT", "ETHUSDT": "HALT"})
        wait_until(lambda: bool(receiver.errors))
        subscription.dispose()
        subscription = receiver.subscribe()
        wait_until(lambda: receiver.feed.state is FeedState.HALTED)
        assert receiver.feed.halted == {"BTCUSDT": "HALT", "ETHUSDT": "HALT"}
        asked = len(server.rest_requests)
        wait_until(lambda: len(server.rest_requests) >= asked + 3)
        assert (len(receiver.errors), server.handshakes) == (1, 1)
        server.statuses.clear()
        wait_until(lambda: server.has_subscriber(2))
        server.send(trade(server, 1))
        wait_until(lambda: receiver.ticks == 1)
        assert receiver.feed.state is FeedState.CONNECTED
        subscription.dispose()


def test_venue_in_maintenance_is_halted_and_not_connected_again() -> None:
    status = '{"channel":"status","type":"update","data":[{"system":"%s"}]}'
    with VenueServer("kraken", SYMBOLS) as server, receiving(server, "kraken", stale_after=0.5) as receiver:
        server.send(trade(server, 1), status % "maintenance")
        wait_until(lambda: receiver.feed.state is FeedState.HALTED)
        assert receiver.feed.halted == dict.fromkeys(SYMBOLS, "maintenance")
        began = time.monotonic()
        wait_until(lambda: time.monotonic() - began > 1.2)
        assert not receiver.errors
        server.send(status % "online", trade(server, 2))
        wait_until(lambda: receiver.feed.state is FeedState.CONNECTED)
        assert receiver.feed.halted == {}
        wait_until(lambda: bool(receiver.errors))  # silence counts again
        assert isinstance(receiver.errors[0], ConnectionSilent)


def test_connection_is_ended_as_the_protocol_says() -> None:
    """By close code 1000, and with the code of the venue where it ends it; one without a code gets a valid one, too."""
    with VenueServer("okx", SYMBOLS) as server:
        with receiving(server, "okx"):
            pass
        wait_until(lambda: server.connections[0].close_code is not None)  # the library knows it once all is closed
        assert server.connections[0].close_code == 1000
        for number, code in ((2, 1012), (3, None)):
            receiver = Receiver(server, "okx")
            with receiver.subscribe():
                wait_until(lambda number=number: server.has_subscriber(number))  # type: ignore[misc]
                connection = server.connections[-1]
                with connection.protocol_mutex:
                    connection.protocol.send_close(code)
                    connection.socket.sendall(b"".join(connection.protocol.data_to_send()))
                wait_until(lambda connection=connection: connection.protocol.close_rcvd is not None)  # type: ignore[misc]
                assert connection.protocol.close_rcvd is not None
                assert connection.protocol.close_rcvd.code == (code or 1000)
                assert connection.protocol.parser_exc is None


def test_closed_connection_is_an_error_and_the_next_subscribes_again() -> None:
    with VenueServer("okx", SYMBOLS) as server, receiving(server, "okx") as receiver:
        server.connections[0].close(1012)
        wait_until(lambda: bool(receiver.errors))
        assert isinstance(receiver.errors[0], ConnectionLost)
        assert receiver.feed.state is FeedState.CONNECTING
        with_again = receiver.subscribe()
        wait_until(lambda: server.has_subscriber(2))
        assert server.received[1] == server.received[0]
        server.send(trade(server, 1))
        wait_until(lambda: receiver.ticks == 1)
        with_again.dispose()


def test_another_connection_takes_over_before_the_old_one_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(venue_connection, "OVERLAP_SECONDS", 0.3)
    with VenueServer("okx", SYMBOLS) as server, receiving(server, "okx") as receiver:
        old = server.connections[0]

        def on_connect(new: ServerConnection) -> None:
            for number in range(6, 10):
                old.send(trade(server, number))

        server.on_connect = on_connect
        server.send(*(trade(server, number) for number in range(1, 6)))
        server.send('{"event":"notice","code":"64008","msg":"The connection will soon be closed."}')
        wait_until(lambda: server.has_subscriber(2))
        server.send(*(trade(server, number) for number in range(8, 13)))
        wait_until(lambda: receiver.ticks == 12)
        assert receiver.feed.doubles == 2
        assert not receiver.errors
        assert receiver.feed.state is FeedState.CONNECTED
        assert server.handshakes == 2


def test_failed_hand_over_leaves_the_old_connection_in_use() -> None:
    with VenueServer("okx", SYMBOLS, refusals=[]) as server, receiving(server, "okx") as receiver:
        server.refuse(503)
        server.send('{"event":"notice","code":"64008","msg":"The connection will soon be closed."}')
        wait_until(lambda: server.handshakes == 2)
        server.send(trade(server, 1))
        wait_until(lambda: receiver.ticks == 1)
        assert not receiver.errors


def test_silence_of_trades_ends_a_connection_that_still_beats() -> None:
    with VenueServer("kraken", SYMBOLS) as server, receiving(server, "kraken", stale_after=0.5) as receiver:
        beating = True

        def beat() -> None:
            with suppress(ConnectionClosed):  # by the feed
                while beating:
                    server.send('{"channel":"heartbeat"}')
                    pause.wait(0.05)

        pause = threading.Event()
        thread = threading.Thread(target=beat)
        thread.start()
        wait_until(lambda: bool(receiver.errors))
        beating = False
        thread.join()
        assert isinstance(receiver.errors[0], ConnectionSilent)
        assert receiver.feed.state is FeedState.STALE
        again = receiver.subscribe()
        wait_until(lambda: server.has_subscriber(2))
        assert receiver.feed.state is FeedState.STALE
        server.send(trade(server, 1))
        wait_until(lambda: receiver.feed.state is FeedState.CONNECTED)
        again.dispose()


@pytest.mark.long
def test_heartbeat_with_the_newest_id_proves_a_quiet_market() -> None:
    with VenueServer("coinbase", SYMBOLS) as server, receiving(server, "coinbase", stale_after=0.5) as receiver:
        server.send(trade(server, 5))
        wait_until(lambda: receiver.ticks == 1)
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            server.send(server.dialect.beat("BTC-USDT", 5))
            threading.Event().wait(0.1)
        assert not receiver.errors
        server.send(server.dialect.beat("BTC-USDT", 8))
        wait_until(lambda: bool(receiver.errors))
        assert isinstance(receiver.errors[0], ConnectionSilent)


def test_quiet_client_pings_as_the_venue_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(VENUES["okx"]), "ping", (0.2, "ping"))
    with VenueServer("okx", SYMBOLS) as server, receiving(server, "okx") as receiver:
        wait_until(lambda: server.received[0].count("ping") >= 2)
        assert not receiver.errors


@pytest.mark.parametrize(("status", "words"), [(451, "this location"), (403, "address or location"), (418, "banned")])
def test_refused_handshake_says_why(status: int, words: str) -> None:
    with VenueServer("bybit", SYMBOLS, refusals=[(status, {})]) as server:
        receiver = Receiver(server, "bybit")
        receiver.subscribe()
        wait_until(lambda: bool(receiver.errors))
        assert isinstance(receiver.errors[0], VenueRefusal)
        assert words in str(receiver.errors[0])
        assert str(status) in str(receiver.errors[0])


def test_next_attempt_waits_as_long_as_the_venue_asks() -> None:
    with VenueServer("bybit", SYMBOLS, refusals=[(429, {"Retry-After": "1"})]) as server:
        receiver = Receiver(server, "bybit")
        receiver.subscribe()
        wait_until(lambda: bool(receiver.errors))
        began = time.monotonic()
        subscription = receiver.subscribe()
        wait_until(server.has_subscriber)
        assert time.monotonic() - began >= 0.9
        subscription.dispose()


def test_pauses_of_refusals() -> None:
    assert refusal_of(429, {}).pause_seconds == 30
    assert refusal_of(429, {"Retry-After": "7"}).pause_seconds == 7
    assert refusal_of(418, {"Retry-After": "7"}).pause_seconds == 120
    assert refusal_of(429, {"Retry-After": "999999"}).pause_seconds == 3600
    assert refusal_of(429, {"Retry-After": "9" * 5000}).pause_seconds == 3600
    assert refusal_of(429, {"Retry-After": "soon"}).pause_seconds == 30
    assert refusal_of(502, {}).pause_seconds == 0


@pytest.mark.parametrize(
    "text", ["Sun, 06 Nov 1994 08:49:37 GMT", "Sunday, 06-Nov-94 08:49:37 GMT", "Sun Nov  6 08:49:37 1994"]
)
def test_pause_may_be_a_date_in_each_form_of_http(text: str) -> None:
    """By the clock of the answer where that says it, and else by this machine's."""
    at = datetime(1994, 11, 6, 8, 49, 37, tzinfo=UTC).timestamp()
    assert refusal_of(429, {"Retry-After": text}, now=lambda: at - 90.0).pause_seconds == 90
    dated = {"Retry-After": text, "Date": "Sun, 06 Nov 1994 08:48:57 GMT"}
    assert refusal_of(503, dated, now=lambda: at - 9000.0).pause_seconds == 40
    assert refusal_of(418, dated, now=lambda: at).pause_seconds == 120
    assert refusal_of(429, {"Retry-After": text}, now=lambda: at - 90_000.0).pause_seconds == 3600
    assert refusal_of(429, {"Retry-After": text}, now=lambda: at + 90.0).pause_seconds == 0


@pytest.mark.parametrize(
    "text", ["Sun, 99 Nov 1994 08:49:37 GMT", "Sun, 06 Nov 99999 08:49:37 GMT", "-1", "1.5", "7 s", "\u0661"]
)
def test_pause_that_cannot_be_read_is_the_usual_one(text: str) -> None:
    assert refusal_of(429, {"Retry-After": text}).pause_seconds == 30


def test_attempts_stay_within_the_budget_of_the_venue() -> None:
    now = 0.0
    budget = AttemptBudget(3, 10.0, lambda: now)
    assert [budget.take() for _ in range(7)] == [0, 0, 0, 10, 10, 10, 20]
    now = 31.0
    assert budget.take() == 0


def test_stop_ends_an_attempt_that_waits_for_its_turn() -> None:
    with VenueServer("okx", SYMBOLS) as server:
        receiver = Receiver(server, "okx", budget=1)
        first = receiver.subscribe()
        wait_until(server.has_subscriber)
        first.dispose()
        receiver.subscribe()
        receiver.feed.stop()
        assert receiver.completed.wait(5)
        assert server.handshakes == 1


# What it reports


@pytest.mark.parametrize("offset_ms", [-40_000, 0, 2_500])
@pytest.mark.parametrize("venue", VENUES)
def test_clock_of_a_venue_is_measured_by_rest(venue: str, offset_ms: int) -> None:
    with VenueServer(venue, SYMBOLS, clock=lambda: system_clock() + offset_ms * 1_000_000) as server:
        feed = Receiver(server, venue).feed
        assert feed.report().clock_offset_ms is None
        feed.measure_clock()
        cut = 500 if venue == "kraken" else 0
        assert abs((feed.report().clock_offset_ms or 0) - offset_ms) <= 500 + cut
        used, limit = feed.report().rest_weight or (0, 0)
        assert 0 < used < limit


def test_clock_that_cannot_be_asked_stays_unknown() -> None:
    with VenueServer("okx", SYMBOLS) as server:
        server.rest_answers.append(RestAnswer(b"<html>", 502))
        feed = Receiver(server, "okx").feed
        feed.measure_clock()
        assert feed.report().clock_offset_ms is None


def test_refusal_is_reported_with_its_pause() -> None:
    with VenueServer("binance", SYMBOLS, refusals=[(451, {})]) as server:
        receiver = Receiver(server, "binance")
        with receiver.subscribe():
            wait_until(lambda: receiver.errors)
        assert receiver.feed.pause_seconds == pytest.approx(300, abs=5)


def test_doubles_are_counted_by_our_symbol() -> None:
    with VenueServer("kraken", SYMBOLS) as server, receiving(server, "kraken") as receiver:
        server.send(*(trade(server, number) for number in (1, 2, 2, 1)), trade(server, 1, "ETHUSDT", 7.5))
        wait_until(lambda: receiver.ticks == 3)
        assert receiver.feed.doubles_by_symbol() == {"BTCUSDT": 2}


@pytest.mark.parametrize(("venue", "words"), [("okx", "60018"), ("kraken", "not supported"), ("bybit", "ETHUSDT")])
def test_refused_symbol_is_reported_and_the_others_flow(venue: str, words: str) -> None:
    with VenueServer(venue, SYMBOLS) as server:
        server.known = {server.dialect.native("BTCUSDT")}
        with receiving(server, venue) as receiver:
            server.send(trade(server, 1))
            wait_until(lambda: receiver.feed.refusals)
            assert [*receiver.feed.refusals] == ["ETHUSDT"]
            assert words in receiver.feed.refusals["ETHUSDT"]
            wait_until(lambda: receiver.ticks == 1)
            server.known = {server.dialect.native(symbol) for symbol in SYMBOLS}
        wait_until(lambda: not [each for each in threading.enumerate() if each.name == f"feed-{venue}"])
        with receiver.subscribe():
            wait_until(lambda: not receiver.feed.refusals)


def subscribed(server: VenueServer, connection: int = 0) -> list[list[str]]:
    """The symbols of each subscription that a connection has sent."""
    requests = (server.dialect.requested(parsed(text)) for text in server.received[connection])
    return [symbols for symbols in requests if symbols]


def test_subscription_without_an_answer_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscriptions, "ACK_SECONDS", 0.2)
    monkeypatch.setattr(subscriptions, "TURN_SECONDS", 0.05)
    with VenueServer("kraken", SYMBOLS, acknowledging=False) as server, receiving(server, "kraken") as receiver:
        server.send(trade(server, 1))
        wait_until(lambda: len(subscribed(server)) >= 3)
        assert subscribed(server)[0] == ["BTC/USDT", "ETH/USDT"]
        assert subscribed(server)[2] == ["ETH/USDT"]  # trades are an answer
        server.acknowledging = True
        server.acknowledge()
        wait_until(lambda: not open_requests(receiver))
        assert server.handshakes == 1


def open_requests(receiver: Receiver) -> bool:
    link = receiver.feed.connections[0].link
    assert link is not None
    return link.subscriptions.has_open


def test_bad_symbol_of_a_request_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscriptions, "TURN_SECONDS", 0.05)
    with VenueServer("bybit", SYMBOLS) as server:
        server.known = {"ETHUSDT"}
        with receiving(server, "bybit") as receiver:
            wait_until(lambda: subscribed(server) == [["BTCUSDT", "ETHUSDT"], ["ETHUSDT"]])
            assert [*receiver.feed.refusals] == ["BTCUSDT"]
            server.send(trade(server, 1, "ETHUSDT"))
            wait_until(lambda: receiver.ticks == 1)


def test_heartbeat_that_names_missing_trades_subscribes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trade_ids, "GRACE_SECONDS", 0.1)
    with VenueServer("coinbase", SYMBOLS) as server, receiving(server, "coinbase") as receiver:
        wait_until(lambda: not open_requests(receiver))
        server.send(trade(server, 5))
        wait_until(lambda: receiver.ticks == 1)
        server.send(server.dialect.beat("BTC-USDT", 5))
        server.send(server.dialect.beat("BTC-USDT", 8))
        threading.Event().wait(0.2)
        assert len(subscribed(server)) == 1
        server.send(server.dialect.beat("BTC-USDT", 8))
        wait_until(lambda: subscribed(server)[1:] == [["BTC-USDT"]])


BEATS = {
    "binance": [],
    "coinbase": ['{"type":"heartbeat","last_trade_id":0,"product_id":"BTC-USDT","sequence":9}'],
    "kraken": ['{"channel":"heartbeat"}'],
    "okx": ["pong"],
    "bybit": ['{"success":true,"ret_msg":"pong","op":"ping"}'],
}
"""By venue: what it sends while nothing is traded, with which a lack of trades may hide."""


@pytest.mark.parametrize("venue", VENUES)
def test_silent_symbol_among_others_is_subscribed_to_again(venue: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three symbols flow, and signs of life come, so that nothing ends the connection."""
    monkeypatch.setattr(trade_ids, "GRACE_SECONDS", 0.1)
    symbols = (*SYMBOLS, "SOLUSDT")
    with VenueServer(venue, symbols) as server:
        receiver = Receiver(server, venue, stale_after=1.5, symbols=symbols)
        with receiver.subscribe():
            wait_until(server.has_subscriber)
            wait_until(lambda: not open_requests(receiver))
            server.send(trade(server, 1))
            asked = len(subscribed(server))
            for number in range(1, 18):  # for longer than the limit of silence
                server.send(trade(server, number, "ETHUSDT"), trade(server, number, "SOLUSDT"))
                server.send(*BEATS[venue])
                threading.Event().wait(0.1)
            receiver.feed.ask_again("BTCUSDT")  # the venue's candles have trades of it
            native = server.dialect.native("BTCUSDT")
            wait_until(lambda: len(subscribed(server)) > asked)
            assert [name.upper() for name in subscribed(server)[-1]] == [native.upper()]
            server.send(trade(server, 4))
            wait_until(lambda: receiver.ticks == 36)
            if venue != "bybit":
                missing = wait_until(receiver.feed.ids.missing)
                assert [(gap.symbol, gap.after_id, gap.before_id) for gap in missing] == [("BTCUSDT", 1, 4)]
            assert not receiver.errors
            assert server.handshakes == 1


def test_more_symbols_than_a_connection_takes_make_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(VENUES["okx"]), "symbols_a_connection", 1)
    with VenueServer("okx", SYMBOLS) as server:
        receiver = Receiver(server, "okx")
        first, second = receiver.feed.connections
        batches = receiver.batches.append
        with first.batches().subscribe(batches, receiver.errors.append):
            wait_until(server.has_subscriber)
            assert receiver.feed.state == "connecting"  # the worst of both
            with second.batches().subscribe(batches, receiver.errors.append):
                wait_until(lambda: server.has_subscriber(2))
                assert [subscribed(server, number) for number in (0, 1)] == [[["BTC-USDT"]], [["ETH-USDT"]]]
                server.connections[0].send(trade(server, 1))
                server.connections[1].send(trade(server, 1, "ETHUSDT"))
                wait_until(lambda: receiver.ticks == 2)
                assert receiver.feed.state == "connected"
                server.connections[0].close(1012)
                wait_until(lambda: receiver.errors)
                server.connections[1].send(trade(server, 2, "ETHUSDT"))
                wait_until(lambda: receiver.ticks == 3)
                assert len(receiver.errors) == 1
                assert receiver.feed.state == "connecting"


def test_first_trade_of_a_subscription_is_no_double_and_never_now() -> None:
    with VenueServer("okx", SYMBOLS) as server, receiving(server, "okx") as receiver:
        now = time.time_ns() // 1_000_000
        native = server.dialect.native("BTCUSDT")
        for number, at in ((7, now - 3 * 3_600_000), (8, now - 2_000), (8, now - 2_000), (9, now)):
            server.send(server.dialect.trade(Trade(native, 100.0, 1.0, at, number, "buy")))
        wait_until(lambda: receiver.ticks == 2)
        times = {slot.start for batch in receiver.batches for slot in batch}
        assert len(times) == 2
        assert min(times) <= now - 1_900
        assert receiver.decoder.rejected == {"stale": 1}
        assert receiver.feed.doubles == 1


def test_cancelled_handshake_closes_its_socket() -> None:
    with VenueServer("okx", SYMBOLS) as server:
        server.hang()
        receiver = Receiver(server, "okx")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ResourceWarning)
            with receiver.subscribe():
                wait_until(lambda: server.handshakes == 1)
            wait_until(lambda: not [each for each in threading.enumerate() if each.name == "feed-okx"])
            gc.collect()
        assert [str(each.message) for each in caught if "unclosed" in str(each.message)] == []


def test_eleven_hundred_binance_streams_are_two_connections() -> None:
    with VenueServer("binance", SYMBOLS) as server:
        symbols = [f"S{number}USDT" for number in range(1_100)]
        decoder = Decoder(Mode.LIVE, "binance", symbols, system_clock, 5_000, lambda *_: None)
        budget = AttemptBudget(100, 60.0, time.monotonic)
        native = {symbol: symbol for symbol in symbols}
        feed = VenueFeed("binance", VENUES["binance"], symbols, native, decoder, 15.0, budget, server.url)
        assert len(feed.connections) == 2
        with feed.batches().subscribe(lambda _: None):
            wait_until(
                lambda: sum(map(len, map(all_symbols, range(len(server.received)), repeat(server)))) == 1_100, 20.0
            )
        assert sorted(len(all_symbols(number, server)) for number in (0, 1)) == [100, 1_000]


def all_symbols(connection: int, server: VenueServer) -> list[str]:
    return [symbol for symbols in subscribed(server, connection) for symbol in symbols]


def test_snapshot_replayed_on_reconnecting_counts_once() -> None:
    with VenueServer("kraken", SYMBOLS) as server, receiving(server, "kraken") as receiver:
        frames = [trade(server, number) for number in range(1, 53)]
        server.send(*frames[:50])
        wait_until(lambda: receiver.ticks == 50)
        server.connections[0].close(1012)
        wait_until(lambda: receiver.errors)
        with receiver.subscribe():
            wait_until(lambda: server.has_subscriber(2))
            server.send(*frames[30:])
            wait_until(lambda: receiver.ticks == 52)
            assert receiver.feed.doubles == 20
