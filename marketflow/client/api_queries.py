"""Queries of the API: what is asked, and how the answer is decoded. Both clients send them."""

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, Generic, NamedTuple, TypeVar
from urllib.parse import quote

import httpx
import msgspec

from marketflow.client.market_data import AveragePrice, Candle, ExtremePrice, Price, ReferencePrice

_Answer = TypeVar("_Answer")

RETRY_STATUS = frozenset({429, 503})
"""Statuses after which the same request may succeed later."""


MOST_CANDLES = 1000
"""Candles that one query answers at most."""


class RequestFailed(Exception):
    """The server refused a request, or could not answer it.

    A server that cannot be reached raises `httpx.TransportError`.

    Args:
        status: HTTP status.
        code: `code` of the problem, such as `unknown_symbol`, `no_data` or `unavailable`; empty where there is none.
        detail: what is wrong, in a sentence.
        retry_after: seconds after which to ask again, if the server says so.
    """

    def __init__(self, status: int, code: str, detail: str, retry_after: float | None = None) -> None:
        super().__init__(f"{status} {code}: {detail}")
        self.status, self.code, self.detail, self.retry_after = status, code, detail, retry_after


class Query(NamedTuple, Generic[_Answer]):
    """A GET request and the type of its answer."""

    path: str
    parameters: dict[str, str]
    answer: type[_Answer]


class Candles(msgspec.Struct, frozen=True):
    """The answer to a candle query."""

    candles: list[Candle]


class _Problem(msgspec.Struct):
    code: str = ""
    detail: str = ""


def latest(symbol: str, exchange: str | None) -> Query[Price]:
    """Return the query of the newest price."""
    return Query(_path("prices/latest", symbol, exchange), {}, Price)


def reference(symbol: str) -> Query[ReferencePrice]:
    """Return the query of the reference price."""
    return Query(_path("prices/reference", symbol, None), {}, ReferencePrice)


def extreme(kind: str, symbol: str, exchange: str | None, period: str | None) -> Query[ExtremePrice]:
    """Return the query of the highest or lowest price; `kind` is which of them."""
    return Query(_path(f"prices/{kind}", symbol, exchange), _given(period=period), ExtremePrice)


def average(symbol: str, exchange: str | None, period: str | None) -> Query[AveragePrice]:
    """Return the query of the average price."""
    return Query(_path("prices/average", symbol, exchange), _given(period=period), AveragePrice)


def candles(
    symbol: str,
    exchange: str | None,
    interval: str,
    since: datetime | str | None,
    until: datetime | str | None,
    limit: int | None,
) -> Query[Candles]:
    """Return a query of candles."""
    parameters = _given(interval=interval, since=since, until=until, limit=limit)
    return Query(_path("candles", symbol, exchange), parameters, Candles)


def stream_url(base_url: str, symbols: Iterable[str], exchanges: Iterable[str], intervals: Iterable[str] = ()) -> str:
    """Return the address of the stream of these symbols and exchanges: of prices, or of candles of these intervals."""
    lists = (("symbols", symbols), ("exchanges", exchanges), ("intervals", intervals))
    given = {name: text for name, names in lists if (text := ",".join(names))}
    url = httpx.URL(f"{base_url.rstrip('/')}/ws")
    return str(url.copy_with(scheme={"http": "ws", "https": "wss"}[url.scheme], params=given or None))


def decode(query: Query[_Answer], response: httpx.Response) -> _Answer:
    """Return the answer in a response.

    Raises:
        RequestFailed: it is a problem, or no answer of MarketFlow.
    """
    if response.status_code != httpx.codes.OK:
        raise failure(response.status_code, response.content, response.headers)
    try:
        return msgspec.json.decode(response.content, type=query.answer)
    except msgspec.MsgspecError as error:
        raise RequestFailed(response.status_code, "", f"{response.url} is no answer of MarketFlow: {error}") from None


def failure(status: int, body: bytes, headers: Mapping[str, str]) -> RequestFailed:
    """Return the error that a response describes."""
    try:
        problem = msgspec.json.decode(body, type=_Problem)
    except msgspec.MsgspecError:
        problem = _Problem("", "the response is none of MarketFlow's")
    seconds = headers.get("retry-after", "")
    return RequestFailed(status, problem.code, problem.detail, float(seconds) if seconds.isdecimal() else None)


def pause_before_retry(error: RequestFailed) -> float | None:
    """Return the seconds after which to send a request again; None if its failure is final."""
    return (error.retry_after or 1.0) if error.status in RETRY_STATUS else None


def _path(begin: str, symbol: str, exchange: str | None) -> str:
    names = (symbol,) if exchange is None else (exchange, symbol)
    return "/".join(["", begin, *(quote(name, safe="") for name in names)])


def _given(**values: Any) -> dict[str, str]:
    names = {"since": "from", "until": "to"}
    return {
        names.get(name, name): value.isoformat() if isinstance(value, datetime) else str(value)
        for name, value in values.items()
        if value is not None
    }
