"""What every feed must do, whatever it reads. A new venue is added to FEEDS."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from reactivex import abc
from reactivex.observer import AutoDetachObserver

from marketflow.clock import system_clock
from marketflow.feeds import tcp as tcp_module
from marketflow.feeds.decoder import Decoder
from marketflow.feeds.feed import Feed
from marketflow.feeds.generator import GeneratorFeed, Market
from marketflow.feeds.tcp import ConnectionLost, ConnectionSilent, TcpFeed
from marketflow.model import Candles, FeedState, Mode, Series
from marketflow.pipeline.schedulers import TimingLoop
from tests.support.application import ScriptedExchange, now_ms
from tests.support.proxy import Proxy
from tests.support.servers import free_port, wait_until

SYMBOLS = ("BTCUSDT", "ETHUSDT")


def make_decoder(mode: Mode) -> Decoder:
    return Decoder(mode, "exchange1", SYMBOLS, system_clock, 5000, lambda *_: None)


class Received:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.batches: list[Candles] = []
        self.errors: list[Exception] = []
        self.completed = threading.Event()

    @property
    def ticks(self) -> int:
        return sum(candle.ticks for batch in self.batches for candle in batch.values())

    def came(self) -> bool:
        return bool(self.batches)

    def subscribe(self, feed: Feed) -> abc.DisposableBase:
        return feed.batches().subscribe(self.batches.append, self.errors.append, self.completed.set)


@contextmanager
def tcp() -> Iterator[Feed]:
    exchange = ScriptedExchange()
    sending = True

    def send() -> None:
        while sending:
            for client in list(exchange.clients):
                try:
                    client.sendall(b'{"symbol":"BTCUSDT","price":1.5}\n{"symbol":"ETHUSDT","price":2.5}\n')
                except OSError:
                    exchange.clients.remove(client)
                    client.close()
            pause.wait(0.005)

    pause = threading.Event()
    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    try:
        yield TcpFeed("exchange1", "127.0.0.1", exchange.port, make_decoder(Mode.LIVE), 15.0)
    finally:
        sending = False
        sender.join(5)
        exchange.close()


@contextmanager
def generator() -> Iterator[Feed]:
    loop = TimingLoop("generator-test")
    try:
        yield GeneratorFeed("exchange1", SYMBOLS, 200, 7, make_decoder(Mode.TEST), system_clock, loop)
    finally:
        loop.dispose()


FEEDS: list[Callable[[], "contextmanager[Feed]"]] = [tcp, generator]  # type: ignore[valid-type]


@pytest.fixture(params=FEEDS, ids=["tcp", "generator"])
def feed(request: pytest.FixtureRequest) -> Iterator[Feed]:
    with request.param() as made:
        yield made


def feed_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("feed-")]


def test_batches_are_candles_of_configured_series_and_never_empty(feed: Feed) -> None:
    received = Received()
    with received.subscribe(feed):
        wait_until(lambda: len(received.batches) >= 5)
    for batch in received.batches:
        assert batch
        for slot, candle in batch.items():
            assert slot.series.exchange == feed.exchange == "exchange1"
            assert slot.series.symbol in SYMBOLS
            assert slot.start <= candle.first_at <= candle.last_at < slot.start + 100
    assert feed.decoder.ticks >= received.ticks


def test_nothing_happens_before_somebody_subscribes(feed: Feed) -> None:
    feed.batches()
    assert feed.decoder.ticks == 0
    assert not feed_threads()


def test_a_disposed_feed_sends_no_more_and_leaves_no_thread(feed: Feed) -> None:
    received = Received()
    subscription = received.subscribe(feed)
    wait_until(lambda: received.batches)
    subscription.dispose()
    wait_until(lambda: not feed_threads(), message="the thread of the feed lives on")
    count = len(received.batches)
    ticks = feed.decoder.ticks
    threading.Event().wait(0.1)  # long enough for several more
    assert len(received.batches) == count
    assert feed.decoder.ticks == ticks
    assert not received.errors
    assert not received.completed.is_set()


def test_a_feed_can_be_subscribed_to_again(feed: Feed) -> None:
    for _ in range(3):
        received = Received()
        with received.subscribe(feed):
            wait_until(received.came)
    wait_until(lambda: not feed_threads())


def test_stopped_feed_completes_after_all_that_was_received(feed: Feed) -> None:
    received = Received()
    with received.subscribe(feed):
        wait_until(lambda: received.batches)
        feed.stop()
        assert received.completed.wait(5)
        assert received.ticks == feed.decoder.ticks
    assert not received.errors
    wait_until(lambda: not feed_threads())


def test_a_feed_reports_its_state(feed: Feed) -> None:
    received = Received()
    with received.subscribe(feed):
        wait_until(lambda: received.batches)
        assert feed.state in (FeedState.CONNECTED, FeedState.GENERATED)


# TCP alone


@pytest.fixture
def exchange() -> Iterator[ScriptedExchange]:
    with ScriptedExchange() as made:
        yield made


def tcp_feed(port: int, stale_after_seconds: float = 15.0) -> TcpFeed:
    return TcpFeed("exchange1", "127.0.0.1", port, make_decoder(Mode.LIVE), stale_after_seconds)


def test_ticks_come_in_the_order_they_were_sent(exchange: ScriptedExchange) -> None:
    received = Received()
    with received.subscribe(tcp_feed(exchange.port)):
        for price in range(1, 51):
            exchange.send(float(price))
        wait_until(lambda: received.ticks == 50)
    closes = [candle.close for batch in received.batches for candle in batch.values()]
    assert closes == sorted(closes)
    assert closes[-1] == 50.0


def test_stopped_feed_emits_what_the_kernel_has_received(exchange: ScriptedExchange) -> None:
    feed = tcp_feed(exchange.port)
    received = Received()
    held, release = threading.Event(), threading.Event()

    def hold(batch: Candles) -> None:
        held.set()
        release.wait(10)
        received.batches.append(batch)

    with feed.batches().subscribe(hold, received.errors.append, received.completed.set):
        exchange.send(1.0)
        assert held.wait(5)
        exchange.send(*[2.0] * 1000)
        wait_until(lambda: not exchange.unread())
        feed.stop()
        release.set()
        assert received.completed.wait(5)
    assert received.ticks == 1001
    assert not received.errors


def test_a_stopped_feed_does_not_wait_for_a_host_that_does_not_answer() -> None:
    with Proxy(free_port()) as proxy:
        proxy.vanish()
        feed = tcp_feed(proxy.port)
        received = Received()
        with received.subscribe(feed):
            wait_until(feed_threads)
            feed.stop()
            assert received.completed.wait(1)
        assert not received.errors
        wait_until(lambda: not feed_threads(), timeout=1)


def test_a_disposed_feed_does_not_wait_for_a_host_that_does_not_answer() -> None:
    with Proxy(free_port()) as proxy:
        proxy.vanish()
        received = Received()
        with received.subscribe(tcp_feed(proxy.port)):
            wait_until(feed_threads)
        wait_until(lambda: not feed_threads(), timeout=1, message="the thread of the feed lives on")


def test_lookups_that_hang_do_not_gather_threads(exchange: ScriptedExchange, monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()
    look_up = socket.getaddrinfo

    def hang(*arguments: Any, **keywords: Any) -> Any:
        answered.wait(10)
        return look_up(*arguments, **keywords)

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    monkeypatch.setattr(tcp_module, "LOOKUP_WAIT_SECONDS", 0.01)
    feed = tcp_feed(exchange.port)
    for _ in range(20):
        received = Received()
        with received.subscribe(feed):
            assert feed.state == FeedState.CONNECTING
    wait_until(lambda: len(feed_threads()) == 1)
    answered.set()
    wait_until(lambda: not feed_threads())
    again = Received()
    with again.subscribe(feed):
        exchange.send(1.0)
        wait_until(again.came)


def test_a_refused_connection_is_an_error_and_connecting(exchange: ScriptedExchange) -> None:
    feed = tcp_feed(free_port())
    received = Received()
    with received.subscribe(feed):
        wait_until(lambda: received.errors)
        assert isinstance(received.errors[0], OSError)
        assert feed.state == FeedState.CONNECTING


def test_closed_connection_is_an_error_and_loses_no_tick(exchange: ScriptedExchange) -> None:
    feed = tcp_feed(exchange.port)
    received = Received()
    with received.subscribe(feed):
        exchange.send(1.0, 2.0)
        exchange.client().close()
        wait_until(lambda: received.errors)
    assert isinstance(received.errors[0], ConnectionLost)
    assert received.ticks == 2
    assert feed.state == FeedState.CONNECTING


@pytest.mark.parametrize("end", [ScriptedExchange.cut, ScriptedExchange.reset])
@pytest.mark.parametrize(("last", "ticks"), [(b'{"symbol":"BTCUSDT","price":2}', 2), (b'{"symbol":"BTCUSDT","pri', 1)])
def test_last_line_without_newline_is_a_tick_or_rejected(
    exchange: ScriptedExchange, end: Callable[[ScriptedExchange], None], last: bytes, ticks: int
) -> None:
    feed = tcp_feed(exchange.port)
    received = Received()
    with received.subscribe(feed):
        exchange.send_raw(LINE + last)
        wait_until(lambda: received.ticks == 1 and not exchange.unread())
        end(exchange)
        wait_until(lambda: received.errors)
    assert received.ticks == feed.decoder.ticks == ticks
    assert feed.decoder.rejected.total() == 2 - ticks


def test_last_line_before_silence_is_a_tick(exchange: ScriptedExchange) -> None:
    feed = tcp_feed(exchange.port, stale_after_seconds=0.2)
    received = Received()
    with received.subscribe(feed):
        exchange.send_raw(LINE + LINE[:-1])
        wait_until(lambda: received.errors)
    assert received.ticks == 2


LINE = b'{"symbol":"BTCUSDT","price":1.5}\n'


@pytest.mark.parametrize("lines_a_receive", [1, 7])
def test_lagging_feed_emits_its_batch_once_it_has_caught_up(
    exchange: ScriptedExchange, monkeypatch: pytest.MonkeyPatch, lines_a_receive: int
) -> None:
    monkeypatch.setattr(tcp_module, "BATCH_SECONDS", 3600.0)
    monkeypatch.setattr(tcp_module, "RECEIVE_BYTES", lines_a_receive * len(LINE))
    received = Received()
    with received.subscribe(tcp_feed(exchange.port)):
        for sent in (700, 1400, 1401):
            exchange.send_raw(LINE * (sent - received.ticks))
            wait_until(lambda sent=sent: received.ticks == sent)  # type: ignore[misc]
    assert len(received.batches) < 700 / lines_a_receive


@pytest.mark.parametrize("end", [ScriptedExchange.cut, ScriptedExchange.reset])
def test_lagging_feed_emits_its_batch_before_the_connection_ends(
    exchange: ScriptedExchange, monkeypatch: pytest.MonkeyPatch, end: Callable[[ScriptedExchange], None]
) -> None:
    monkeypatch.setattr(tcp_module, "BATCH_SECONDS", 3600.0)
    monkeypatch.setattr(tcp_module, "RECEIVE_BYTES", len(LINE))
    received = Received()
    feed = tcp_feed(exchange.port)
    decode = feed.decoder.decode

    def decode_and_end(chunk: bytes, waited_ms: int = 0) -> Candles:
        if feed.decoder.ticks == 1:
            end(exchange)
        return decode(chunk, waited_ms)

    monkeypatch.setattr(feed.decoder, "decode", decode_and_end)
    with received.subscribe(feed):
        exchange.send_raw(LINE * 3)
        wait_until(lambda: received.errors)
    assert received.ticks == feed.decoder.ticks >= 2


def test_a_feed_that_stays_behind_hands_on_all_the_same(
    exchange: ScriptedExchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp_module, "BATCH_SECONDS", 0.01)
    monkeypatch.setattr(tcp_module, "RECEIVE_BYTES", len(LINE))
    received = Received()
    ended = threading.Event()

    def flood() -> None:
        while not ended.is_set():
            exchange.send_raw(LINE * 1000)

    sender = threading.Thread(target=flood, daemon=True)
    with received.subscribe(tcp_feed(exchange.port)):
        exchange.client()
        sender.start()
        wait_until(lambda: len(received.batches) >= 10)
        ended.set()
        sender.join(5)


def test_silent_connection_is_closed_and_stale_until_a_tick(exchange: ScriptedExchange) -> None:
    feed = tcp_feed(exchange.port, stale_after_seconds=0.2)
    received = Received()
    with received.subscribe(feed):
        exchange.send(1.0)
        wait_until(lambda: received.errors)
    assert isinstance(received.errors[0], ConnectionSilent)
    assert feed.state == FeedState.STALE
    again = Received()
    clients = len(exchange.clients)
    with again.subscribe(feed):
        wait_until(lambda: len(exchange.clients) > clients)
        assert feed.state == FeedState.STALE
        exchange.send(2.0)
        wait_until(lambda: feed.state == FeedState.CONNECTED)
        assert again.ticks == 1


def test_old_tick_after_a_pause_of_the_exchange_is_stale(
    exchange: ScriptedExchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the exchange sends nothing its socket is empty, so that it has not waited there."""
    monkeypatch.setattr(tcp_module, "EMPTY_CHECK_SECONDS", 0.02)
    clock = [0.0]
    looks = threading.Semaphore(0)

    def look() -> float:
        looks.release()
        return clock[0]

    feed = TcpFeed("exchange1", "127.0.0.1", exchange.port, make_decoder(Mode.LIVE), 600.0, look)
    with Received().subscribe(feed):
        exchange.send(1.0)
        wait_until(lambda: feed.decoder.ticks == 1)
        clock[0] = 60.0
        while looks.acquire(blocking=False):
            pass
        for _ in range(3):
            assert looks.acquire(timeout=10)
        exchange.send_raw(b'{"symbol":"BTCUSDT","price":2,"timestamp":%d}\n' % (now_ms() - 30_000))
        wait_until(lambda: feed.decoder.ticks == 2 or feed.decoder.rejected)
    assert feed.decoder.rejected == {"stale": 1}


def test_the_end_of_an_old_connection_does_not_hide_the_new_one(exchange: ScriptedExchange) -> None:
    feed = tcp_feed(exchange.port)
    held, release = threading.Event(), threading.Event()

    def hold(_: Candles) -> None:
        held.set()
        release.wait(10)

    old = feed.batches().subscribe(hold)
    exchange.send(1.0)
    assert held.wait(5)
    old.dispose()
    with feed.batches().subscribe(lambda _: None):
        wait_until(lambda: len(exchange.clients) == 2)
        wait_until(lambda: feed.state == FeedState.CONNECTED)
        release.set()
        wait_until(lambda: len(feed_threads()) == 1)
        assert feed.state == FeedState.CONNECTED


def test_an_exchange_that_only_sends_rubbish_is_stale(exchange: ScriptedExchange) -> None:
    feed = tcp_feed(exchange.port, stale_after_seconds=0.3)
    received = Received()
    with received.subscribe(feed):
        wait_until(lambda: feed.state == FeedState.CONNECTED)
        client = exchange.client()

        def rubbish_then_state() -> bool:
            client.sendall(b"rubbish\n")
            return feed.state == FeedState.STALE

        wait_until(rubbish_then_state)
        assert not received.errors


def test_an_observer_that_raises_ends_the_connection_with_an_error(exchange: ScriptedExchange) -> None:
    errors: list[Exception] = []

    def poisoned(_: Candles) -> None:
        raise ValueError("poison")

    feed = tcp_feed(exchange.port)
    with feed.batches().subscribe(AutoDetachObserver(poisoned, errors.append)):
        exchange.send(1.0)
        wait_until(lambda: not feed_threads(), message="the thread of the feed lives on")


# The generator alone


class Seconds:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_same_seed_gives_the_same_prices() -> None:
    def walk(seed: int | None) -> list[float]:
        seconds = Seconds()
        market = Market(SYMBOLS, 100, seed, seconds)
        seconds.now = 1.0
        return [line.price for line in market.due(0)]

    assert walk(7) == walk(7)
    assert walk(7) != walk(8)
    assert walk(None) != walk(None)


def test_the_rate_is_kept_whatever_the_pauses() -> None:
    seconds = Seconds()
    market = Market(SYMBOLS, 100, 7, seconds)
    count = 0
    for pause in [0.01, 0.5, 0.003, 0.2, 0.9, 0.001] * 10:
        seconds.now += pause
        count += len(market.due(0))
    assert abs(count - seconds.now * 100) <= 1


def test_generator_makes_up_for_one_second_after_a_pause() -> None:
    seconds = Seconds()
    market = Market(SYMBOLS, 100, 7, seconds)
    seconds.now = 3600.0
    assert len(market.due(0)) == 100
    seconds.now += 1
    assert len(market.due(0)) == 100


def test_event_times_end_now_and_never_go_back() -> None:
    seconds = Seconds()
    market = Market(SYMBOLS, 1000, 7, seconds)
    times: list[int | None] = []
    for _ in range(20):
        seconds.now += 0.05
        times += [line.timestamp for line in market.due(1_000_000 + round(seconds.now * 1000))]
    assert times == sorted(times, key=lambda at: at or 0)
    assert max(at or 0 for at in times) <= 1_001_000


def test_prices_stay_near_their_base_for_ever() -> None:
    seconds = Seconds()
    market = Market(("BTCUSDT",), 1000, 7, seconds)
    prices = []
    for _ in range(100):
        seconds.now += 1
        prices += [line.price for line in market.due(0)]
    assert 66_000 < min(prices) < max(prices) < 68_000
    assert len(set(prices)) > 10_000


def test_series_of_the_generator_are_of_test_mode() -> None:
    with generator() as feed:
        received = Received()
        with received.subscribe(feed):
            wait_until(lambda: received.batches)
        assert {slot.series for batch in received.batches for slot in batch} <= {
            Series(Mode.TEST, "exchange1", symbol) for symbol in SYMBOLS
        }
