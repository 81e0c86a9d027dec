"""What a person sees of the feeds, in one process and with roles of their own: /health, /feeds and /holes."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from marketflow.feeds.simulated.rest_side import RestAnswer
from marketflow.model import Hole, Mode, Series
from marketflow.stores.postgres.holes import PostgresHoles
from marketflow.stores.postgres.rows import connection_keywords
from tests.feeds.venues.test_websocket_feed import trade
from tests.support.application import Application, ScriptedExchange, exchanges_setting, now_ms
from tests.support.exposition import Samples, samples_of
from tests.support.servers import free_port, wait_until
from tests.support.simulated_venues import venues_setting
from tests.support.venue_server import VenueServer

Start = Callable[[str], Application]
"""Starts MarketFlow in live mode on these exchanges, and returns the process that answers."""


@pytest.fixture(params=["one process", "roles"])
def start(request: pytest.FixtureRequest, server_folder: Path, servers: dict[str, object]) -> Iterator[Start]:
    with ExitStack() as stack:

        def started(exchanges: str) -> Application:
            settings = servers | {"MODE": "live", "SYMBOLS": "BTCUSDT ETHUSDT", "EXCHANGES": exchanges}
            settings |= {"FLOW__STALE_AFTER_SECONDS": 600}  # few trades come, and a start may take long
            if request.param == "one process":
                return stack.enter_context(Application(server_folder, settings))
            folders = [server_folder / role for role in ("ingest", "api")]
            for folder in folders:
                folder.mkdir(mode=0o711)
            ingest = Application(folders[0], settings, ("--role", "ingest")).start(wait=False)
            stack.callback(ingest.kill)
            return stack.enter_context(Application(folders[1], settings, ("--role", "api")))

        yield started


def moment(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def problem(application: Application, exchange: str, **wanted: Any) -> dict[str, Any]:
    """Wait until /health reports a feed with these values."""

    def found() -> dict[str, Any]:
        reported: dict[str, Any] = application.get("/health").get("feeds", {}).get(exchange, {})
        return reported if wanted.items() <= reported.items() else {}

    return wait_until(found, 20.0, f"/health does not report {wanted}")


def test_health_says_why_a_venue_refuses(start: Start) -> None:
    with VenueServer("binance", ["BTCUSDT", "ETHUSDT"], refusals=[(451, {})] * 9) as server:
        url = f"ws://127.0.0.1:{server.port}"
        application = start(venues_setting({"binance": server.port}).replace(url, f"{url}/?key=swordfish"))
        found = problem(application, "binance", error="451: refused by the venue for this location")
        assert found["state"] == "connecting"
        assert found["address"] == f"{server.url}/"
        assert moment(found["error_at"]) == pytest.approx(now_ms() / 1000, abs=30)
        assert moment(found["next_try_at"]) - moment(found["error_at"]) == pytest.approx(300, abs=2)
        assert "swordfish" not in application.log + str(application.get("/health"))


def test_health_says_why_an_exchange_cannot_be_reached(start: Start) -> None:
    port = free_port()
    with ScriptedExchange() as exchange:
        application = start(exchanges_setting(exchange)[:-1] + f',{{name="b",address="127.0.0.1:{port}"}}]')
        found = problem(application, "b", state="connecting", address=f"127.0.0.1:{port}", absent=[])

        def refused() -> dict[str, Any]:
            reported = problem(application, "b")  # without a time while a try is made
            return reported if reported["error"] == "Connection refused" and reported["next_try_at"] else {}

        found = wait_until(refused)
        assert 0 < moment(found["next_try_at"]) - moment(found["error_at"]) <= 31
        exchange.send(5.0)
        wait_until(lambda: application.get("/health")["exchanges"]["exchange1"] == "connected")
        assert "exchange1" not in application.get("/health")["feeds"]


def test_health_names_symbols_that_a_venue_lacks(start: Start) -> None:
    with VenueServer("kraken", ["BTCUSDT"]) as server:
        application = start(venues_setting({"kraken": server.port}))
        found = problem(application, "kraken", absent=["ETHUSDT"])
        wait_until(server.has_subscriber, 20.0)
        server.send(trade(server, 1))
        found = problem(application, "kraken", state="connected")
        assert (found["error"], found["error_at"]) == ("the venue does not trade ETHUSDT", None)
        assert found["address"] == server.url
        assert application.get("/health")["exchanges"] == {"kraken": found["state"]}


def test_halted_symbols_are_named_and_no_fault(start: Start) -> None:
    with VenueServer("binance", ["BTCUSDT", "ETHUSDT"]) as server:
        server.statuses["ETHUSDT"] = "HALT"
        application = start(venues_setting({"binance": server.port}))
        wait_until(server.has_subscriber, 20.0)
        server.send(trade(server, 1))
        found = problem(application, "binance", state="connected", absent=[], halted=["ETHUSDT"])
        assert found["error"] == "the venue has halted ETHUSDT (HALT)"
        rows = application.get("/feeds")["series"]
        assert {row["symbol"]: row["state"] for row in rows} == {"BTCUSDT": "connected", "ETHUSDT": "halted"}
        server.statuses["BTCUSDT"] = "HALT"
        server.close(1012)
        wait_until(lambda: application.get("/health")["exchanges"] == {"binance": "halted"})
        assert application.get("/health")["status"] == "ok"
        samples = samples_of(application.http.get("/metrics").text)
        assert samples.of("feed_connected", exchange="binance") == 1


def test_health_names_symbols_that_a_venue_refuses(start: Start) -> None:
    with VenueServer("okx", ["BTCUSDT", "ETHUSDT"]) as server:
        server.known = {"BTC-USDT"}
        application = start(venues_setting({"okx": server.port}))
        wait_until(server.has_subscriber, 20.0)
        server.send(trade(server, 1))
        found = problem(application, "okx", state="connected", absent=["ETHUSDT"])
        assert "the venue refuses ETHUSDT: 60018" in found["error"]


def test_health_stays_ok_while_calls_by_rest_fail(start: Start) -> None:
    with VenueServer("binance", ["BTCUSDT", "ETHUSDT"]) as server:
        # After the list of symbols every call fails: set later, the calls of the start might be over.
        server.rest_answers.extend([None, *[RestAnswer(b"", 503)] * 1000])
        application = start(venues_setting({"binance": server.port}))
        wait_until(server.has_subscriber, 20.0)
        server.send(trade(server, 1))
        found = problem(application, "binance", state="connected")
        assert found["error"] == "what comes by REST is late: 503: the venue cannot answer"
        assert application.get("/health")["status"] == "ok"


def test_health_is_silent_about_feeds_that_are_fine(start: Start) -> None:
    with ScriptedExchange() as exchange:
        application = start(exchanges_setting(exchange))
        exchange.send(5.0)
        wait_until(lambda: "feeds" not in application.get("/health"))


# /feeds


def test_feeds_report_ticks_of_an_exchange(start: Start) -> None:
    with ScriptedExchange() as exchange, ScriptedExchange("exchange2") as other:
        application = start(exchanges_setting(exchange, other))
        at = [exchange.send(price, at=now_ms() - 300) for price in (5.0, 6.0, 7.5)][-1]
        other.send_raw(b'{"symbol":"ETHUSDT","price":1}\n')
        wait_until(lambda: {"connected"} == {*application.get("/health")["exchanges"].values()})
        wait_until(lambda: application.get("/feeds", symbol="BTCUSDT")["series"][0]["delay_ms"])
        report = application.get("/feeds")
        assert report["next_offset"] is None
        first = report["exchanges"][0]
        assert first["address"] == exchange.address
        assert (first["doubles"], first["holes"], first["rest_weight"]) == (None, None, None)
        series = {(each["exchange"], each["symbol"]): each for each in report["series"]}
        assert list(series) == [
            (name, symbol) for name in ("exchange1", "exchange2") for symbol in ("BTCUSDT", "ETHUSDT")
        ]
        bitcoin = series["exchange1", "BTCUSDT"]
        assert (bitcoin["price"], bitcoin["state"]) == (7.5, "connected")
        assert moment(bitcoin["timestamp"]) == pytest.approx(at / 1000, abs=0.001)
        assert 250 <= bitcoin["delay_ms"]["p50"] <= bitcoin["delay_ms"]["p99"] < 10_000
        assert 0 < bitcoin["ticks_per_second"] <= 3.0
        silent = series["exchange1", "ETHUSDT"]
        assert (silent["price"], silent["timestamp"], silent["delay_ms"], silent["ticks_per_second"]) == (
            *[None] * 3,
            0,
        )
        dated_by_receipt = series["exchange2", "ETHUSDT"]
        assert (dated_by_receipt["price"], dated_by_receipt["delay_ms"]) == (1.0, None)


def used_weight(application: Application) -> int:
    used: int = application.get("/feeds")["exchanges"][0]["rest_weight"]["used"]
    return used


def test_feeds_report_doubles_absent_symbols_and_the_last_error(start: Start) -> None:
    with VenueServer("okx", ["BTCUSDT"]) as server:
        server.refuse(502)
        application = start(venues_setting({"okx": server.port}))
        wait_until(server.has_subscriber, 20.0)
        server.send(*(trade(server, number) for number in (1, 2, 2, 1, 3)))
        wait_until(lambda: application.get("/feeds")["exchanges"][0]["doubles"] == 2)
        report = application.get("/feeds")
        (venue,), (bitcoin, ether) = report["exchanges"], report["series"]
        assert (venue["error"], venue["reconnects"]) == ("502: the venue cannot answer", 1)
        assert venue["next_try_at"] is None
        assert venue["absent"] == ["ETHUSDT"]
        assert (bitcoin["state"], bitcoin["doubles"], bitcoin["holes"]) == ("connected", 2, {})
        assert (ether["state"], ether["doubles"]) == ("absent", 0)
        # Used by the calls of the last seconds, of which there are some in each minute.
        wait_until(lambda: used_weight(application) > 0, 75.0)
        assert used_weight(application) < venue["rest_weight"]["limit"]
        wait_until(lambda: application.get("/feeds")["exchanges"][0]["clock_offset_ms"] is not None)
        assert abs(application.get("/feeds")["exchanges"][0]["clock_offset_ms"]) < 1000


def test_feeds_are_filtered_and_paged(start: Start) -> None:
    with ScriptedExchange() as exchange, ScriptedExchange("exchange2") as other:
        application = start(exchanges_setting(exchange, other))
        wait_until(lambda: application.find("/feeds"))
        everything = application.get("/feeds")
        pages = [application.get("/feeds", limit="3", offset=str(offset)) for offset in (0, 3)]
        assert [page["next_offset"] for page in pages] == [3, None]
        assert [each["symbol"] for page in pages for each in page["series"]] == [
            each["symbol"] for each in everything["series"]
        ]
        one = application.get("/feeds", exchange="EXCHANGE2", symbol="ethusdt")
        assert [each["exchange"] for each in one["exchanges"]] == ["exchange2"]
        assert [(each["exchange"], each["symbol"]) for each in one["series"]] == [("exchange2", "ETHUSDT")]


def test_feeds_of_the_generator_are_known(start: Start) -> None:
    with ScriptedExchange() as exchange:
        application = start(exchanges_setting(exchange))
        wait_until(lambda: application.find("/feeds"))
        application.switch("test")
        wait_until(lambda: application.get("/feeds")["series"][0]["delay_ms"])
        report = application.get("/feeds")
        assert report["mode"] == "test"
        assert report["exchanges"][0]["state"] == "generated"
        assert report["exchanges"][0]["ticks_per_second"] > 1
        assert report["exchanges"][0]["clock_offset_ms"] == 0


# /holes and metrics


def test_holes_on_record_are_answered(start: Start, postgres_db: dict[str, Any]) -> None:
    with ScriptedExchange() as exchange:
        application = start(exchanges_setting(exchange))
        wait_until(lambda: application.get("/health")["postgres"] == "ok")
        wait_until(lambda: application.find("/holes"))
        assert application.get("/holes") == {"mode": "live", "holes": []}
        hole = Hole(Series(Mode.LIVE, "exchange1", "BTCUSDT"), 5, 9, now_ms(), now_ms() + 1, now_ms(), now_ms())
        with closing(PostgresHoles(connection_keywords(**postgres_db))) as holes:
            holes.write([hole])
        (found,) = application.get("/holes", exchange="exchange1", state="open")["holes"]
        assert (found["after_id"], found["before_id"], found["state"]) == ("5", "9", "open")


def test_metrics_have_doubles_and_delays_of_feeds(start: Start) -> None:
    with VenueServer("okx", ["BTCUSDT", "ETHUSDT"]) as server:
        application = start(venues_setting({"okx": server.port}))
        wait_until(server.has_subscriber, 20.0)
        server.send(*(trade(server, number) for number in (1, 2, 2)))

        def samples() -> Samples:
            return samples_of(application.http.get("/metrics").text)

        wait_until(lambda: samples().of("feed_doubles_total", exchange="okx") == 1)
        wait_until(lambda: samples().of("feed_trade_delay_seconds_count", exchange="okx"))
        assert 0 <= (samples().of("feed_trade_delay_seconds_sum", exchange="okx") or 0) < 10
