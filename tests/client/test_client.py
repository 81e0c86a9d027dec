"""The Python clients against a running application."""

import asyncio
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from marketflow.client import AsyncClient, Candle, CandleList, Client, LiveCandle, Price, RequestFailed
from marketflow.client.api_queries import failure, pause_before_retry
from marketflow.client.price_stream import CandleFollower
from tests.support.application import Application
from tests.support.servers import HOST, free_port, wait_until

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def application(server_root: Path) -> Iterator[Application]:
    folder = server_root / "client"
    folder.mkdir(mode=0o711)
    with Application(folder) as application:
        wait_until(lambda: application.find("/candles/exchange3/ETHUSDT"), timeout=20)
        yield application


@pytest.fixture
def market(application: Application) -> Iterator[Client]:
    with Client(url_of(application)) as client:
        yield client


def url_of(application: Application) -> str:
    return f"http://{HOST}:{application.port}"


def of_both(application: Application, call: Callable[[Any], Any]) -> list[Any]:
    """What a method returns of either client."""

    async def asynchronous() -> Any:
        async with AsyncClient(url_of(application)) as client:
            return await call(client)

    with Client(url_of(application)) as client:
        return [call(client), asyncio.run(asynchronous())]


@pytest.mark.parametrize(
    ("call", "path"),
    [
        (lambda client: client.latest("btcusdt"), "/prices/latest/BTCUSDT"),
        (lambda client: client.latest("BTCUSDT", "exchange2"), "/prices/latest/exchange2/BTCUSDT"),
        (lambda client: client.reference("BTCUSDT"), "/prices/reference/BTCUSDT"),
        (lambda client: client.highest("BTCUSDT", period="1m30s"), "/prices/highest/BTCUSDT?period=1m30s"),
        (lambda client: client.lowest("BTCUSDT", "exchange1"), "/prices/lowest/exchange1/BTCUSDT"),
        (lambda client: client.average("BTCUSDT", "exchange1", "10s"), "/prices/average/exchange1/BTCUSDT?period=10s"),
    ],
)
def test_both_clients_return_all_fields_of_answers(
    application: Application, call: Callable[[Any], Any], path: str
) -> None:
    names = application.get(path)
    for answer in of_both(application, call):
        renamed = {"since": "from", "until": "to"}
        assert {renamed.get(name, name) for name in answer.__struct_fields__} == names.keys()
        assert answer.price > 0
        assert answer.symbol == "BTCUSDT"


def test_candles_of_both_clients_have_aware_times(application: Application) -> None:
    since = datetime.now(UTC) - timedelta(hours=1)
    for candles in of_both(application, lambda client: client.candles("BTCUSDT", "reference", since=since, limit=3)):
        assert 1 <= len(candles) <= 3
        assert candles[0].time.tzinfo is not None
        assert candles[0].low <= candles[0].close <= candles[0].high


def test_refused_request_raises_its_code(application: Application) -> None:
    with Client(url_of(application)) as client:
        with pytest.raises(RequestFailed, match="404 unknown_symbol: No such symbol"):
            client.latest("NONE")
        with pytest.raises(RequestFailed, match="400 invalid_interval: "):
            client.candles("BTCUSDT", interval="7m")


def test_only_busy_or_unready_server_is_asked_again() -> None:
    body = b'{"status":503,"code":"unavailable","detail":"a store is unavailable"}'
    assert pause_before_retry(failure(503, body, {"retry-after": "3"})) == 3
    assert pause_before_retry(failure(429, b"", {})) == 1
    assert pause_before_retry(failure(404, b"<html>", {"retry-after": "3"})) is None
    assert failure(503, body, {}).code == "unavailable"


def test_unreachable_server_raises_transport_error() -> None:
    with Client(f"http://{HOST}:{free_port()}") as client, pytest.raises(httpx.TransportError):
        client.latest("BTCUSDT")


def test_prices_begin_with_newest_of_each_series(market: Client) -> None:
    first = list(islice(market.prices(["BTCUSDT", "ETHUSDT"], ["exchange1"]), 20))
    assert {(price.exchange, price.symbol) for price in first[:2]} == {
        ("exchange1", "BTCUSDT"),
        ("exchange1", "ETHUSDT"),
    }
    assert all(isinstance(price, Price) and price.timestamp.tzinfo for price in first)


def test_prices_of_async_client_follow_the_stream(application: Application) -> None:
    async def some() -> list[Price]:
        async with AsyncClient(url_of(application)) as client:
            found: list[Price] = []
            async for price in client.prices(["BTCUSDT"]):
                found.append(price)
                if len(found) == 10:
                    break
            return found

    assert {price.symbol for price in asyncio.run(some())} == {"BTCUSDT"}


def test_stream_of_unknown_symbol_raises_its_code(market: Client) -> None:
    with pytest.raises(RequestFailed) as failed:
        next(iter(market.prices(["NONE"])))
    assert failed.value.code == "unknown_symbol"


def test_prices_go_on_after_a_restart_without_repetition(server_folder: Path, servers: dict[str, object]) -> None:
    with Application(server_folder, servers) as application, Client(url_of(application)) as client:
        prices = iter(client.prices(["BTCUSDT"]))
        before = list(islice(prices, 20))
        application.kill()
        application.start()
        after = list(islice(prices, 20))
    series = [(price.exchange, price.timestamp, price.price) for price in before + after]
    assert len(series) == len(set(series))


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_candles_become_a_frame_with_fixed_types(library: str) -> None:
    pytest.importorskip(library)
    at = datetime(2026, 11, 21, tzinfo=UTC)
    unknown: dict[str, Any] = dict.fromkeys(Candle.__struct_fields__)
    first = Candle(
        **unknown | {"time": at, "open": 1, "high": 2, "low": 1, "close": 2, "source": "ticks", "version": 1}
    )
    frame: Any = getattr(CandleList([first]), f"to_{library}")()
    empty: Any = getattr(CandleList(), f"to_{library}")()
    assert [*map(str, frame.dtypes)] == [*map(str, empty.dtypes)]
    if library == "pandas":
        assert frame.index[0] == at
        assert frame["close"].iloc[0] == 2.0
        assert math.isnan(frame["volume"].iloc[0])
    else:
        assert frame["time"][0] == at
        assert frame["close"][0] == 2.0
        assert frame["volume"][0] is None


# Streams of candles


def test_both_clients_stream_running_and_closed_candles(application: Application) -> None:
    def sync() -> list[LiveCandle]:
        with Client(url_of(application)) as client:
            return [*islice(client.stream_candles(["BTCUSDT"], ["reference", "exchange1"], ["1m", "1h"]), 12)]

    async def asynchronous() -> list[LiveCandle]:
        found: list[LiveCandle] = []
        async with AsyncClient(url_of(application)) as client:
            async for candle in client.stream_candles(["BTCUSDT"], ["reference", "exchange1"], ["1m", "1h"]):
                found.append(candle)
                if len(found) == 12:
                    return found
        raise AssertionError("the stream has no end")

    for candles in (sync(), asyncio.run(asynchronous())):
        assert {candle.series for candle in candles} == {
            ("BTCUSDT", exchange, interval) for exchange in ("reference", "exchange1") for interval in ("1m", "1h")
        }
        assert all(candle.low <= candle.close <= candle.high for candle in candles)
        assert (
            len({(candle.series, candle.time, candle.ticks, candle.close, candle.closed) for candle in candles}) == 12
        )


def message(event: str, *candles: LiveCandle) -> bytes:
    return msgspec.json.encode({"event": event, "data": {"candles": candles}})


def live(minute: int, closed: bool, version: int = 1, ticks: int = 3, close: float = 1.0) -> LiveCandle:
    at = datetime(2026, 11, 28, 5, minute, tzinfo=UTC)
    values = (1.0, 1.0, 1.0, close, 1.0, ticks, None, None, None, None, None)
    return LiveCandle(at, *values, closed, version, "ticks", None, None, "BTCUSDT", None, "1m")


def test_closed_candle_is_yielded_once_a_version() -> None:
    follower = CandleFollower()

    def fresh(*candles: LiveCandle) -> list[LiveCandle]:
        _, found = follower.take(message("candles", *candles))
        return [*follower.fresh(found)]

    assert fresh(live(1, False)) == [live(1, False)]
    assert fresh(live(1, False)) == []
    assert fresh(live(1, True), live(2, False)) == [live(1, True), live(2, False)]
    verified = msgspec.structs.replace(live(1, True), verified=True)
    assert fresh(verified, live(2, False, close=2.0)) == [live(2, False, close=2.0)]
    assert fresh(live(1, True, version=2)) == [live(1, True, version=2)]


def test_candles_closed_without_a_connection_are_a_gap() -> None:
    follower = CandleFollower()
    gaps, candles = follower.take(message("snapshot", live(1, True), live(2, False)))
    assert (gaps, len([*follower.fresh(candles)])) == ([], 2)
    gaps, candles = follower.take(message("snapshot", live(5, True), live(6, False)))
    [gap] = gaps
    assert (gap.symbol, gap.exchange, gap.interval) == ("BTCUSDT", None, "1m")
    assert gap.since == datetime(2026, 11, 28, 5, 1, 0, 1000, tzinfo=UTC)
    assert gap.until == datetime(2026, 11, 28, 5, 5, tzinfo=UTC)
    plain = [Candle(*msgspec.structs.astuple(live(minute, True))[:17]) for minute in (2, 3, 4)]
    assert [*follower.filled(gap, plain)] == [live(2, True), live(3, True), live(4, True)]
    assert [*follower.fresh(candles)] == [live(5, True), live(6, False)]
    assert follower.take(message("snapshot", live(5, True), live(6, False)))[0] == []


def test_other_mode_leaves_no_gap() -> None:
    follower = CandleFollower()
    _, candles = follower.take(message("snapshot", live(1, True)))
    assert [*follower.fresh(candles)]
    follower.take(message("mode"))
    assert follower.take(message("snapshot", live(5, True)))[0] == []


def test_client_loads_nothing_of_the_server() -> None:
    code = (
        "import sys, marketflow.client\n"
        "server = {'loguru', 'redis', 'reactivex', 'starlette', 'uvicorn', 'dynaconf'} & set(sys.modules)\n"
        "sys.exit(str(server) if server else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
