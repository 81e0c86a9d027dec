"""Query parameters: unknown ones are rejected with a suggestion on every path, and no text causes a 500."""

import pytest

from tests.api.world import World

UNKNOWN = [
    ("/prices/latest/BTCUSDT?period=1m", "this path takes none"),
    ("/prices/highest/BTCUSDT?Period=1m", "did you mean `period`?"),
    ("/prices/average/exchange1/BTCUSDT?window=1m", "did you mean `period`?"),
    ("/prices/average/BTCUSDT?preiod=1m", "did you mean `period`?"),
    ("/candles/BTCUSDT?startTime=1763690400000", "did you mean `from`?"),
    ("/candles/BTCUSDT?from=-1h&endTime=1763690400000", "did you mean `to`?"),
    ("/candles/exchange1/BTCUSDT?resolution=1m", "did you mean `interval`?"),
    ("/candles/BTCUSDT?count=3", "did you mean `limit`?"),
    ("/candles/BTCUSDT?%D9%A1=3", "There is no parameter `\\u0661`"),
    ("/stream/prices?symbol=BTCUSDT", "did you mean `symbols`?"),
    ("/mode?x=1", "this path takes none"),
    ("/health?x=1", "this path takes none"),
    ("/metrics?name=x", "this path takes none"),
    ("/openapi.json?v=1", "this path takes none"),
]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(("path", "detail"), UNKNOWN)
def test_unknown_parameter_is_400_with_suggestion(path: str, detail: str, method: str) -> None:
    answer = World().ask(path, method)
    assert answer.status_code == 400
    if method == "GET":
        assert answer.json()["code"] == "unknown_parameter"
        assert detail in answer.json()["detail"]


@pytest.mark.parametrize("path", ["/?utm_source=mail", "/docs?x=1", "/candles/BTCUSDT?", "/candles/BTCUSDT?&&"])
def test_pages_and_empty_queries_are_accepted(path: str) -> None:
    assert World().ask(path).status_code == 200


@pytest.mark.parametrize(
    "query", ["symbols=BTCUSDT,ethusdt", "symbols=BTCUSDT%20ethusdt", "symbols=BTCUSDT&symbols=ethusdt,"]
)
@pytest.mark.parametrize("exchanges", ["exchange1,EXCHANGE2", "exchange1+EXCHANGE2"])
def test_lists_of_a_query_have_commas_or_spaces(query: str, exchanges: str) -> None:
    assert World().ask(f"/stream/prices?{query}&exchanges={exchanges}", "HEAD").status_code == 200
    assert World().ask(f"/stream/prices?{query}&exchanges={exchanges},nyse", "HEAD").status_code == 404


@pytest.mark.parametrize("path", ["/mode/test", "/mode/live"])
def test_mode_switch_with_unknown_parameter_is_rejected(path: str) -> None:
    world = World()
    before = world.mode.current
    assert world.ask(f"{path}?force=1", "POST").status_code == 400
    assert world.mode.current is before


LONG = ("0" * 4400 + "1", "9" * 5000, "-" + "9" * 5000, "\u0661" * 5000, "1s" * 2000, "-" + "1s" * 2000, "1e999", "NaN")


@pytest.mark.parametrize("text", LONG, ids=range(len(LONG)))
@pytest.mark.parametrize("name", ["limit", "from", "to", "interval", "format"])
def test_overlong_candle_parameters_never_cause_500(name: str, text: str) -> None:
    # A limit may have leading zeros.
    assert World().ask(f"/candles/BTCUSDT?{name}={text}").status_code == (
        200 if name == "limit" and text == LONG[0] else 400
    )


@pytest.mark.parametrize("text", LONG, ids=range(len(LONG)))
def test_overlong_headers_and_periods_never_cause_500(text: str) -> None:
    world = World()
    world.trade(1.0, 500)
    assert world.ask(f"/prices/average/BTCUSDT?period={text}").status_code in (200, 400)
    plain = text.encode("ascii", "replace").decode()
    for header in ("Last-Event-ID", "If-None-Match", "Content-Length", "Range", "Accept", "Host"):
        answer = world.ask("/candles/BTCUSDT", headers={header: plain})
        assert answer.status_code in (200, 304, 400, 413), header


def test_unix_seconds_are_rejected_with_milliseconds() -> None:
    answer = World().ask("/candles/BTCUSDT?from=1763690400")
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_range")
    assert "1763690400000 is meant" in answer.json()["detail"]


def test_large_responses_are_compressed_on_request() -> None:
    world = World()
    for minute in range(300):
        world.trade(100.0 + minute, minute * 60_000)
    path = "/candles/BTCUSDT?limit=300"
    plain = world.ask(path, headers={"Accept-Encoding": "identity"})
    packed = world.ask(path, headers={"Accept-Encoding": "gzip"})
    assert packed.json() == plain.json()
    assert packed.headers["content-encoding"] == "gzip"
    assert "content-encoding" not in plain.headers
    assert packed.headers["vary"] == plain.headers["vary"] == "Accept-Encoding"
    assert int(packed.headers["content-length"]) < int(plain.headers["content-length"]) / 4
    small = world.ask("/candles/BTCUSDT?limit=1", headers={"Accept-Encoding": "gzip"})
    assert "content-encoding" not in small.headers


@pytest.mark.parametrize(
    ("accepted", "packed"),
    [("gzip;q=0", False), ("br, GZIP ; q=0.000", False), ("gzip;q=0.1", True), ("deflate, GZip", True), ("br", False)],
)
def test_gzip_needs_accept_encoding(accepted: str, packed: bool) -> None:
    answer = World().ask("/openapi.json", headers={"Accept-Encoding": accepted})
    assert ("content-encoding" in answer.headers) is packed
    assert answer.headers["vary"] == "Accept-Encoding"
    assert answer.json()["openapi"]
