"""The REST side of a simulated venue, without a network: a request in, an answer out.

`VenueRest` routes and counts requests; each venue's module says what its paths answer. The simulated venue and the
scripted server of the tests serve the same answers.
"""

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from email.utils import formatdate
from http import HTTPStatus
from typing import ClassVar, NamedTuple
from urllib.parse import parse_qsl, urlsplit

import msgspec
from websockets.datastructures import Headers
from websockets.http11 import Response

from marketflow.clock import milliseconds, system_clock
from marketflow.feeds.simulated.listings import Listed
from marketflow.feeds.simulated.trade_book import SymbolBook, TradeBook


class RestAnswer(NamedTuple):
    """What a request comes to."""

    body: bytes
    status: int = 200
    headers: Mapping[str, str] = {}

    def as_response(self) -> Response:
        """The same for the WebSocket library, which serves one request a connection."""
        kind = "application/json" if self.body[:1] in (b"{", b"[") else "text/html"
        headers = Headers({"Content-Type": kind, "Content-Length": str(len(self.body)), "Connection": "close"})
        headers.update(self.headers)
        known = self.status in HTTPStatus._value2member_map_
        return Response(self.status, HTTPStatus(self.status).phrase if known else "Refused", headers, self.body)


def json_answer(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> RestAnswer:
    """An answer in JSON; decimals are strings."""
    return RestAnswer(msgspec.json.encode(value), status, headers or {})


class RestRefused(Exception):
    """A request that is answered with an error."""

    def __init__(self, answer: RestAnswer) -> None:
        super().__init__(answer.status)
        self.answer = answer


class RestRequest(NamedTuple):
    """A request, at a time of the venue's clock in Unix ms."""

    path: str
    query: Mapping[str, str]
    now: int

    def number(self, name: str, default: int) -> int:
        """A whole number of the query.

        Raises:
            ValueError: it is none.
        """
        return int(self.query.get(name) or default)


class Quota:
    """At most `amount` in any `seconds`.

    Args:
        amount, seconds: the limit.
        monotonic: the time in seconds.
    """

    def __init__(self, amount: int, seconds: float, monotonic: Callable[[], float]) -> None:
        self._amount, self._seconds, self._monotonic = amount, seconds, monotonic
        self._taken: deque[tuple[float, int]] = deque()
        self.used = 0
        """What was taken in the last `seconds`."""

    def take(self, amount: int = 1) -> float:
        """Take some; gives the seconds until there is that much again, and takes nothing then."""
        now = self._now()
        if self.used + amount > self._amount:
            return self._taken[0][0] + self._seconds - now if self._taken else self._seconds
        self._taken.append((now, amount))
        self.used += amount
        return 0.0

    def in_use(self) -> bool:
        """Whether anything was taken in the last `seconds`."""
        self._now()
        return self.used > 0

    def _now(self) -> float:
        now = self._monotonic()
        while self._taken and self._taken[0][0] <= now - self._seconds:
            self.used -= self._taken.popleft()[1]
        return now


Handler = Callable[[RestRequest], RestAnswer]


class VenueRest(ABC):
    """What a venue answers by REST.

    Args:
        listed: the instruments.
        book: their trades.
        clock: the venue's, Unix ns.
        monotonic: measures the limits, in seconds.
        limited: whether the venue's documented limits are kept; what breaks one is refused as the venue does it.
    """

    bad_query: ClassVar[tuple[int, object]]
    """Status and body for a query that cannot be read."""

    def __init__(
        self,
        listed: Sequence[Listed],
        book: TradeBook,
        clock: Callable[[], int] = system_clock,
        monotonic: Callable[[], float] = time.monotonic,
        limited: bool = True,
    ) -> None:
        self.listed = listed
        self.book = book
        self.limited = limited
        self.refusals = 0
        """Requests in a row that broke a limit."""
        self._clock = clock
        self._monotonic = monotonic
        self._quotas: dict[str, Quota] = {}

    def quota(self, name: str, amount: int, seconds: float) -> Quota:
        """The limit of this name, which begins unused."""
        if name not in self._quotas:
            self._quotas[name] = Quota(amount, seconds, self._monotonic)
        return self._quotas[name]

    def answer(self, target: str) -> RestAnswer:
        """The answer to a GET of path and query; 404 for a path that the venue does not have."""
        parts = urlsplit(target)
        request = RestRequest(parts.path, dict(parse_qsl(parts.query)), milliseconds(self._clock()))
        answer = self._answer_to(request)
        return answer._replace(headers={"Date": formatdate(request.now // 1000, usegmt=True), **answer.headers})

    def _answer_to(self, request: RestRequest) -> RestAnswer:
        try:
            if (handler := self.route(request.path)) is None:
                return self.not_found()
            if self.limited:
                self.charge(request)
            return handler(request)
        except RestRefused as refused:
            return refused.answer
        except ValueError:
            return json_answer(self.bad_query[1], self.bad_query[0])

    @abstractmethod
    def route(self, path: str) -> Handler | None:
        """What answers a path."""

    @abstractmethod
    def charge(self, request: RestRequest) -> None:
        """Count a request against the limits.

        Raises:
            RestRefused: it breaks one.
        """

    @abstractmethod
    def unknown_symbol(self) -> RestAnswer:
        """The answer to a symbol that is not listed."""

    def not_found(self) -> RestAnswer:
        """The answer to a path that there is not."""
        return RestAnswer(b"<html><body>404 Not Found</body></html>", 404)

    def trades_of(self, symbol: str | None) -> SymbolBook:
        """The trades of a symbol by the venue's name.

        Raises:
            RestRefused: it is not listed.
        """
        if symbol is None or (book := self.book.of(symbol)) is None:
            raise RestRefused(self.unknown_symbol())
        return book


def capped(asked: int, most: int) -> int:
    """A limit of rows, from 1 to the most that the venue gives."""
    return min(max(asked, 1), most)
