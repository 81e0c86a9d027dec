"""Asks one venue by REST: within a budget of calls, obeying its refusals, and with an error in words for all else.

Blocking, for threads that may wait. One call at a time, so that a venue in trouble gets no more than one; a call that
cannot wait (the names of the symbols, before live trades can flow) goes at once, and counts. Another thread can close
the client at any time: whatever waits or reads ends at once.
"""

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from marketflow import __version__
from marketflow.clock import Clock, milliseconds, system_clock
from marketflow.feeds.decoder import UNDECODABLE
from marketflow.feeds.venues.limits import AttemptBudget, VenueRefusal, refusal_of
from marketflow.feeds.venues.proxies import ProxyUnusable, proxy_for, proxy_place
from marketflow.feeds.venues.venue import Instrument, RestCall, RestReply, Venue, VenueError
from marketflow.text import failure_text, one_line, without_secrets

if TYPE_CHECKING:
    import httpx

CONNECT_TIMEOUT_SECONDS = 3.0
READ_TIMEOUT_SECONDS = 5.0
"""Silence of the venue within an answer."""

CALL_SECONDS = 20.0
"""The longest that an answer may take as a whole."""

USED_SHARE = 0.9
"""Of what a venue allows, by its own count: from there on it is not asked until its window is over."""

MAX_BODY_BYTES = 32 * 2**20

_T = TypeVar("_T")


class RestFailed(OSError):
    """The venue cannot be asked by REST, or its answer is none; another attempt may do."""


class RestClosed(RestFailed):
    """The client is closed, by this process."""

    def __init__(self, venue: Venue) -> None:
        super().__init__(f"the REST client of {venue.name} is closed")


class RestClient:
    """The REST side of one venue; safe between threads.

    Args:
        venue: which.
        rest_url: where it is, the venue's own by default.
        budget: of weight, shared by all clients of the venue in this process; one of its own by default.
        clock: this machine's time.
        monotonic: measures pauses, in seconds.
    """

    def __init__(
        self,
        venue: Venue,
        rest_url: str = "",
        budget: AttemptBudget | None = None,
        clock: Clock = system_clock,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.venue = venue
        self._url = (rest_url or venue.rest_url).rstrip("/")
        self.place = without_secrets(self._url)
        self.budget = budget or AttemptBudget(*venue.rest.weight_limit, monotonic)
        self._clock = clock
        self._monotonic = monotonic
        self.error: str | None = None
        """Why the last call failed; None if it did not."""
        self._closed = threading.Event()
        self._turn = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._http: httpx.Client | None = None
        self._through = ""  # which proxy, in words
        self._calls = 0
        self._making = threading.Lock()
        self._refused: tuple[VenueRefusal | None, float] = None, 0.0
        self._nearly_used: tuple[VenueRefusal | None, float] = None, 0.0

    @property
    def used(self) -> int:
        """The weight used in the window of the budget."""
        return self.budget.used

    @property
    def limit(self) -> int:
        """The weight that may be used in the window of the budget."""
        return self.budget.limit

    @property
    def now_ms(self) -> int:
        """This machine's time in Unix ms."""
        return milliseconds(self._clock())

    def close(self) -> None:
        """End all waits and calls; later ones fail at once."""
        self._closed.set()
        self._end_reads()
        self._close_unused()

    def _end_reads(self) -> None:
        with self._making:
            for each in self._sockets:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def _close_unused(self) -> None:
        """Close the connections of a closed client, by the last call that used them."""
        with self._making:
            if self._http is not None and self._calls == 0 and self._closed.is_set():
                self._http.close()
                self._http = None

    def ask(self, call: RestCall, parse: Callable[[RestReply], _T], is_urgent: bool = False) -> _T:
        """The parsed answer to a call, which waits for its turn and for the budget.

        Args:
            call: what is asked.
            parse: makes something of the answer.
            is_urgent: whether to go at once; it counts all the same.

        Raises:
            VenueRefusal: the venue refuses to answer, or has lately asked for a pause that is not over.
            RestFailed: it cannot be asked, or its answer is none.
        """
        turn: AbstractContextManager[Any] = nullcontext() if is_urgent else self._turn
        with turn:
            self._check_refusal(is_urgent)
            wait = self.budget.take(call.weight)
            if self._closed.wait(0.0 if is_urgent else wait):
                raise RestClosed(self.venue)
            self._check_refusal(is_urgent)
            try:
                answer = self._parsed(self._get(call), parse)
            except VenueRefusal as refusal:
                self._note(refusal)
                self.error = str(refusal)
                raise
            except RestFailed as error:
                self.error = None if self._closed.is_set() else str(error)
                raise
            self.error = None
            return answer

    def instruments(self) -> list[Instrument]:
        """The venue's list of instruments, at once.

        Raises:
            OSError: as of `ask`.
        """
        path, _, query = self.venue.instruments_path.partition("?")
        call = RestCall(f"{path}?{query}" if query else path, {}, self.venue.rest.instruments_weight)
        return self.ask(call, self._instruments, is_urgent=True)

    def _instruments(self, reply: RestReply) -> list[Instrument]:
        if listed := self.venue.instruments(reply.body):
            return listed
        raise VenueError("the list of instruments is empty")

    def server_time_ms(self) -> int:
        """The venue's clock in Unix ms, at once.

        Raises:
            OSError: as of `ask`.
        """
        return self.ask(self.venue.rest.time_call, self.venue.rest.time, is_urgent=True)

    def _check_refusal(self, is_urgent: bool) -> None:
        for refusal, until in (self._refused, self._nearly_used):
            pause = until - self._monotonic()
            if refusal is not None and pause > 0:
                raise VenueRefusal(refusal.status, refusal.text, pause)
            if is_urgent:
                return  # the venue has not refused yet, so what cannot wait is asked

    def _note(self, refusal: VenueRefusal) -> None:
        until = self._monotonic() + refusal.pause_seconds
        if refusal.pause_seconds > 0 and until > self._refused[1]:
            self._refused = refusal, until

    def _note_used(self, headers: Mapping[str, str]) -> None:
        """Pause where the venue says that this address has used most of what it allows, by this process or others."""
        if (counted := self.venue.rest.used_weight) is None:
            return
        used = headers.get(counted[0], "")
        if used.isascii() and used.isdigit() and len(used) < 10 and int(used) >= USED_SHARE * counted[1]:
            text = f"{self.venue.name} counts {used} of {counted[1]} as used by this address"
            self._nearly_used = VenueRefusal(429, text, 0.0), self._monotonic() + self.budget.seconds

    def _parsed(self, reply: RestReply, parse: Callable[[RestReply], _T]) -> _T:
        try:
            return parse(reply)
        except VenueError as error:
            raise RestFailed(f"{self.venue.name} answers with an error: {error}") from None
        except (*UNDECODABLE, ValueError, OverflowError, KeyError) as error:
            example = one_line(reply.body[:80].decode(errors="replace"))
            raise RestFailed(
                f"the answer of {self.venue.name} cannot be read: {error}; it begins {example!r}"
            ) from None

    def _get(self, call: RestCall) -> RestReply:
        import httpx  # lazily: most processes ask no venue
        from socksio import SOCKSError

        deadline = self._monotonic() + CALL_SECONDS
        try:
            with (
                self._client() as client,
                client.stream(
                    "GET", self._url + call.path, params=dict(call.query) or None, extensions={"trace": self._trace}
                ) as answer,
            ):
                body = self._read(answer, deadline)
                if self._through and answer.status_code == httpx.codes.PROXY_AUTHENTICATION_REQUIRED:
                    raise httpx.ProxyError(f"{answer.status_code} {answer.reason_phrase}")
                if answer.status_code != httpx.codes.OK:
                    raise refusal_of(answer.status_code, answer.headers, _words(body))
                self._note_used(answer.headers)
                return RestReply(body, answer.headers)
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, SOCKSError, ProxyUnusable, RuntimeError) as error:
            if self._closed.is_set():
                raise RestClosed(self.venue) from None
            place = f"{without_secrets(self.place + call.path)}{self._through}"
            raise RestFailed(f"request to {place} failed: {failure_text(error)}") from None

    def _read(self, answer: "httpx.Response", deadline: float) -> bytes:
        body = bytearray()
        for chunk in answer.iter_bytes():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise RestFailed(f"the answer of {self.venue.name} is over {MAX_BODY_BYTES} bytes")
            if self._monotonic() > deadline:
                raise RestFailed(f"the answer of {self.venue.name} takes over {CALL_SECONDS:g} s")
        return bytes(body)

    @contextmanager
    def _client(self) -> "Iterator[httpx.Client]":
        import httpx

        with self._making:
            if self._closed.is_set():
                raise RestClosed(self.venue)
            if self._http is None:
                timeout = httpx.Timeout(READ_TIMEOUT_SECONDS, connect=CONNECT_TIMEOUT_SECONDS)
                headers = {"User-Agent": f"MarketFlow/{__version__}"}
                proxy = proxy_for(self._url)
                self._through = "" if proxy is None else f" through the proxy {proxy_place(proxy)}"
                # The environment is left to `proxy_for`: the WebSocket must go the same way.
                self._http = httpx.Client(timeout=timeout, headers=headers, verify=_tls(), proxy=proxy, trust_env=False)
            self._calls += 1
        try:
            yield self._http
        finally:
            with self._making:
                self._calls -= 1
            self._close_unused()

    def _trace(self, event: str, info: dict[str, Any]) -> None:
        """Keep the sockets, by which a read in another thread can be ended."""
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            opened = info["return_value"].get_extra_info("socket")
            with self._making:
                self._sockets = {each for each in self._sockets if each.fileno() >= 0} | {opened}
            if self._closed.is_set():
                self._end_reads()


@cache
def _tls() -> ssl.SSLContext:
    """What verifies certificates, once for all clients: making it takes 0.1 s."""
    import httpx

    return httpx.create_ssl_context()


def _words(body: bytes) -> str:
    """What an answer says is wrong, of its fields of the usual names."""
    try:
        fields = msgspec.json.decode(body, type=dict[str, Any])
    except UNDECODABLE:
        return ""
    names = ("code", "retCode", "msg", "message", "retMsg", "error")
    return one_line(" ".join(str(each) for each in map(fields.get, names) if each))[:200]
