"""A venue asked by REST over real HTTP: in its budget, obeying its refusals, with an error in words for all else."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest

from marketflow.feeds.backfill import rest_client
from marketflow.feeds.backfill.rest_client import RestClient, RestFailed
from marketflow.feeds.venues.limits import AttemptBudget, VenueRefusal
from marketflow.feeds.venues.registry import VENUES
from marketflow.feeds.venues.venue import RestCall, RestReply
from tests.support.rest_server import Asked, Reply, RestServer
from tests.support.servers import wait_until
from tests.support.venue_pages import VenuePages

CALL = RestCall("/things", {"symbol": "BTCUSDT"})


class FakeTime:
    """Time in seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def body_of(reply: RestReply) -> bytes:
    return reply.body


@contextmanager
def asking(
    answer: Callable[[Asked], Reply], venue: str = "binance", budget: AttemptBudget | None = None
) -> Iterator[tuple[RestServer, RestClient, FakeTime]]:
    time = FakeTime()
    with RestServer(answer) as server:
        client = RestClient(VENUES[venue], server.url + "/", budget, monotonic=time)
        try:
            yield server, client, time
        finally:
            client.close()


def test_call_is_sent_below_the_address_with_a_user_agent() -> None:
    with asking(lambda asked: Reply(b"[1]"), "coinbase") as (server, client, _):
        assert client.ask(RestCall("/products/BTC-USD/trades", {"after": 7}), body_of) == b"[1]"
        (asked,) = server.asked
        assert (asked.path, asked.query) == ("/products/BTC-USD/trades", {"after": "7"})
        assert asked.headers["User-Agent"].startswith("MarketFlow/")


def test_symbol_in_other_letters_is_sent_as_utf_8() -> None:
    with asking(lambda asked: Reply(b"[]")) as (server, client, _):
        client.ask(RestCall("/klines", {"symbol": "币安人生USDT"}), body_of)
        assert server.asked[0].query == {"symbol": "币安人生USDT"}


def test_connection_is_kept_for_the_next_call() -> None:
    with asking(lambda asked: Reply(b"[]")) as (server, client, _):
        for _ in range(3):
            client.ask(CALL, body_of)
        assert server.connections == 1


def test_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with RestServer(lambda asked: Reply(b"[]")) as server:
        monkeypatch.setenv("HTTP_PROXY", server.url)
        monkeypatch.setenv("http_proxy", server.url)
        client = RestClient(VENUES["binance"], "http://venue.invalid")
        assert client.ask(CALL, body_of) == b"[]"
        assert server.asked[0].headers["Host"] == "venue.invalid"
        client.close()


# Refusals


@pytest.mark.parametrize(
    ("status", "text", "pause"),
    [
        (403, "refused by the venue for this address or location", 300),
        (418, "banned by the venue", 120),
        (429, "asked too often", 30),
        (451, "refused by the venue for this location", 300),
    ],
)
def test_refusal_is_named_and_obeyed_without_asking_again(status: int, text: str, pause: int) -> None:
    with asking(lambda asked: Reply(b"<html>no</html>", status)) as (server, client, time):
        with pytest.raises(VenueRefusal, match=text) as refused:
            client.ask(CALL, body_of)
        assert (refused.value.status, refused.value.pause_seconds) == (status, pause)
        time.now += pause - 1
        with pytest.raises(VenueRefusal, match=text) as again:
            client.ask(CALL, body_of)
        assert again.value.pause_seconds == 1
        with pytest.raises(VenueRefusal):
            client.instruments()
        assert len(server.asked) == 1
        server.answer = lambda asked: Reply(b"[]")
        time.now += 1
        assert client.ask(CALL, body_of) == b"[]"


def test_retry_after_is_obeyed_to_the_second() -> None:
    replies = [Reply(b"", 429, {"Retry-After": "7"})]
    with asking(lambda asked: replies.pop() if replies else Reply(b"[]")) as (server, client, time):
        with pytest.raises(VenueRefusal):
            client.ask(CALL, body_of)
        time.now += 6.9
        with pytest.raises(VenueRefusal):
            client.ask(CALL, body_of)
        assert len(server.asked) == 1
        time.now += 0.1
        client.ask(CALL, body_of)


@pytest.mark.parametrize(
    ("venue", "body"),
    [
        ("kraken", {"error": ["EGeneral:Too many requests"]}),
        ("kraken", {"error": ["EService: Throttled: 1762820300"]}),
        ("okx", {"code": "50011", "msg": "Too Many Requests", "data": []}),
        ("bybit", {"retCode": 10006, "retMsg": "Too many visits!", "result": {}}),
    ],
)
def test_refusal_in_a_body_of_status_200_is_obeyed(venue: str, body: object) -> None:
    with asking(lambda asked: Reply(body), venue) as (server, client, _):
        for _ in range(3):
            with pytest.raises(VenueRefusal, match=r"429: .*(oo many|Throttled|Too Many)"):
                client.server_time_ms()
        assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("venue", "body", "text"),
    [
        ("kraken", {"error": ["EQuery:Unknown asset pair"]}, "kraken answers with an error: EQuery:Unknown asset pair"),
        ("okx", {"code": "51001", "msg": "Instrument ID doesn't exist", "data": []}, "okx answers .*51001: Instrument"),
        ("bybit", {"retCode": 10001, "retMsg": "Not supported symbols"}, "bybit answers .*10001: Not supported"),
    ],
)
def test_error_in_a_body_of_status_200_is_named(venue: str, body: object, text: str) -> None:
    rest = VENUES[venue].rest
    call, parse = rest.candles_call("X", 0, 60_000, 60_000), rest.candles
    with asking(lambda asked: Reply(body), venue) as (_, client, _), pytest.raises(RestFailed, match=text):
        client.ask(call, parse)


def test_error_of_a_bad_symbol_is_given_in_the_words_of_the_venue() -> None:
    reply = Reply({"code": -1121, "msg": "Invalid symbol."}, 400)
    with (
        asking(lambda asked: reply) as (_, client, _),
        pytest.raises(VenueRefusal, match="400: refused by the venue: -1121 Invalid symbol"),
    ):
        client.ask(CALL, body_of)


def test_server_error_of_a_venue_asks_for_no_pause_of_its_own() -> None:
    with asking(lambda asked: Reply(b"<html>Bad Gateway</html>", 502)) as (server, client, _):
        for _ in range(2):
            with pytest.raises(OSError, match="502: the venue cannot answer"):
                client.ask(CALL, body_of)
        assert len(server.asked) == 2


def test_most_of_the_weight_used_by_others_pauses_the_calls() -> None:
    used = Reply(b"[]", 200, {"X-MBX-USED-WEIGHT-1M": "5400"})
    with asking(lambda asked: used) as (server, client, time):
        client.ask(CALL, body_of)
        with pytest.raises(VenueRefusal, match="counts 5400 of 6000"):
            client.ask(CALL, body_of)
        client.ask(CALL, body_of, is_urgent=True)
        time.now += 60
        client.ask(CALL, body_of)
        assert len(server.asked) == 3


def test_used_weight_of_thousands_of_digits_is_ignored() -> None:
    used = Reply(b"[]", 200, {"X-MBX-USED-WEIGHT-1M": "9" * 5000})
    with asking(lambda asked: used) as (server, client, _):
        for _ in range(2):
            client.ask(CALL, body_of)
        assert len(server.asked) == 2


def test_pause_until_a_date_is_kept_by_later_calls() -> None:
    headers = {"Date": "Sun, 06 Nov 1994 08:49:37 GMT", "Retry-After": "Sun, 06 Nov 1994 08:51:07 GMT"}
    with asking(lambda asked: Reply(b"", 429, headers), "coinbase") as (server, client, time):
        for later, pause in ((0, 90), (80, 10)):
            time.now += later
            with pytest.raises(VenueRefusal) as refused:
                client.ask(CALL, body_of)
            assert refused.value.pause_seconds == pytest.approx(pause)
        assert len(server.asked) == 1


# Answers that are none

GARBAGE = [
    b"",
    b"<html>maintenance</html>",
    b"{",
    b"[",
    b"42",
    b"null",
    b"\xff\xfe\x00",
    b"[" * 5000,
    b'{"a":1}',
    b"[[]]",
]


@pytest.mark.parametrize("body", GARBAGE, ids=lambda body: repr(body[:8]))
@pytest.mark.parametrize("venue", VENUES)
def test_garbage_for_an_answer_is_an_error_in_words(venue: str, body: bytes) -> None:
    rest = VENUES[venue].rest
    with asking(lambda asked: Reply(body), venue, AttemptBudget(1000, 60.0, FakeTime())) as (_, client, _):
        calls: list[Callable[[], object]] = [client.server_time_ms, client.instruments]
        calls.append(lambda: client.ask(rest.candles_call("X", 0, 60_000, 60_000), rest.candles))
        calls.append(lambda: client.ask(rest.trades_call("X", 0, None, None), partial(rest.trades, "X")))
        for call in calls:
            with pytest.raises(RestFailed, match=f"the answer of {venue} cannot be read|{venue} answers with an error"):
                call()


def test_unreachable_venue_is_an_error_in_words() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    client = RestClient(VENUES["okx"], f"http://127.0.0.1:{port}")
    with pytest.raises(RestFailed, match=f"^request to http://127.0.0.1:{port}/things failed: Connection refused$"):
        client.ask(CALL._replace(path="/things?key=secret"), body_of)


def test_credentials_of_the_address_stay_out_of_errors() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    client = RestClient(VENUES["okx"], f"http://me:secret@127.0.0.1:{port}/")
    with pytest.raises(RestFailed) as error:
        client.ask(CALL, body_of)
    assert client.place == f"http://127.0.0.1:{port}"
    assert "secret" not in str(error.value)


def test_answer_cut_in_the_middle_is_an_error_in_words() -> None:
    with (
        asking(lambda asked: Reply(b'{"a":', cut=True)) as (_, client, _),
        pytest.raises(RestFailed, match=r"^request to .* failed: "),
    ):
        client.ask(CALL, body_of)


def test_silent_venue_is_given_up_after_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest_client, "READ_TIMEOUT_SECONDS", 0.2)
    released = threading.Event()

    def hang(asked: Asked) -> Reply:
        released.wait(10)
        return Reply(b"[]")

    with asking(hang) as (_, client, _):
        with pytest.raises(RestFailed, match=r"^request to .* failed: .*timed out"):
            client.ask(CALL, body_of)
        released.set()
        assert client.ask(CALL, body_of) == b"[]"


def test_endless_answers_are_cut_by_size_and_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with asking(lambda asked: Reply(b" " * 100_000)) as (_, client, _):
        monkeypatch.setattr(rest_client, "MAX_BODY_BYTES", 50_000)
        with pytest.raises(RestFailed, match="over 50000 bytes"):
            client.ask(CALL, body_of)
        monkeypatch.setattr(rest_client, "MAX_BODY_BYTES", 500_000)
        monkeypatch.setattr(rest_client, "CALL_SECONDS", -1.0)
        with pytest.raises(RestFailed, match="takes over"):
            client.ask(CALL, body_of)


# Budget


def test_calls_wait_for_the_budget_and_urgent_ones_do_not() -> None:
    time = FakeTime()
    budget = AttemptBudget(10, 60.0, time)
    with asking(lambda asked: Reply(b"[]"), budget=budget) as (server, client, _):
        for _ in range(2):
            client.ask(CALL._replace(weight=4), body_of)
        assert (client.used, client.limit) == (8, 10)
        errors: list[Exception] = []
        waiting = threading.Thread(target=lambda: collect(errors, lambda: client.ask(CALL._replace(weight=4), body_of)))
        waiting.start()
        wait_until(lambda: budget.take(0) > 0)  # it has taken its share of the next window
        assert client.ask(CALL, body_of, is_urgent=True) == b"[]"
        assert len(server.asked) == 3
        client.close()
        waiting.join(5)
        assert not waiting.is_alive()
        assert [str(error) for error in errors] == ["the REST client of binance is closed"]
        assert len(server.asked) == 3


def test_budget_is_shared_by_the_clients_of_a_venue() -> None:
    budget = AttemptBudget(10, 60.0, FakeTime())
    with asking(lambda asked: Reply(b"[]"), budget=budget) as (server, client, _):
        other = RestClient(VENUES["binance"], server.url, budget)
        other.ask(CALL._replace(weight=3), body_of)
        client.ask(CALL._replace(weight=2), body_of)
        assert (client.used, other.used) == (5, 5)
        other.close()


@pytest.mark.parametrize(
    ("weights", "waits"),
    [
        ([1] * 12, [0] * 10 + [60, 60]),
        ([4, 4, 4, 4, 4], [0, 0, 60, 60, 120]),
        ([4, 4, 2, 1], [0, 0, 0, 60]),
        ([25, 1], [0, 60]),
    ],
)
def test_weights_never_exceed_the_limit_of_a_window(weights: list[int], waits: list[float]) -> None:
    budget = AttemptBudget(10, 60.0, FakeTime())
    assert [budget.take(weight) for weight in weights] == waits


def test_one_call_at_a_time_reaches_the_venue() -> None:
    inside, most = [0], [0]
    lock = threading.Lock()

    def answer(asked: Asked) -> Reply:
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        threading.Event().wait(0.02)
        with lock:
            inside[0] -= 1
        return Reply(b"[]")

    with asking(answer) as (server, client, _):
        threads = [threading.Thread(target=client.ask, args=(CALL, body_of)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert (len(server.asked), most[0]) == (6, 1)


# Closing


def collect(errors: list[Exception], call: Callable[[], object]) -> None:
    try:
        call()
    except OSError as error:
        errors.append(error)


def test_close_ends_a_call_that_waits_for_its_answer() -> None:
    released = threading.Event()

    def hang(asked: Asked) -> Reply:
        released.wait(30)
        return Reply(b"[]")

    with asking(hang) as (server, client, _):
        errors: list[Exception] = []
        thread = threading.Thread(target=collect, args=(errors, lambda: client.ask(CALL, body_of)))
        thread.start()
        wait_until(lambda: len(server.asked) == 1)
        client.close()
        thread.join(2)  # the timeout of a read is 5 s
        assert not thread.is_alive()
        assert [str(error) for error in errors] == ["the REST client of binance is closed"]
        with pytest.raises(RestFailed, match="is closed"):
            client.ask(CALL, body_of)
        released.set()


# Venues


@pytest.mark.parametrize("venue", VENUES)
def test_clock_of_the_venue_is_read(venue: str) -> None:
    pages = VenuePages(venue)
    pages.now = 1_790_667_453_786
    with asking(pages, venue) as (_, client, _):
        expected = 1_790_667_453_500 if venue == "kraken" else pages.now
        assert client.server_time_ms() == expected


@pytest.mark.parametrize("venue", VENUES)
def test_budget_stays_below_what_the_venue_allows(venue: str) -> None:
    allowed = {"binance": 100.0, "coinbase": 10.0, "kraken": 1.0, "okx": 10.0, "bybit": 120.0}
    weight, seconds = VENUES[venue].rest.weight_limit
    assert weight / seconds < allowed[venue]
