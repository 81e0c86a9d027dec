"""Health check of a venue: its clock, instruments and minutes by REST, and the first messages over the WebSocket.

By the same client and protocol as the server uses. A refusal is shown in the words of `refusal_of`, with the venue's
own: 451 where a venue refuses a location.
"""

import asyncio
import math
import socket
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing

from marketflow.cli.check.check_result import Check, CheckResult, CheckState, seconds_text
from marketflow.feeds.backfill.rest_client import RestClient
from marketflow.feeds.backfill.venue_candles import candles_between
from marketflow.feeds.venues.instruments import Names, look_up
from marketflow.feeds.venues.limits import VenueRefusal
from marketflow.feeds.venues.registry import VENUES
from marketflow.feeds.venues.venue import Refused, Trade, Venue
from marketflow.feeds.venues.websocket.frame_stream import open_stream
from marketflow.model import MINUTE_MS, minute_start
from marketflow.settings import ExchangeSettings, FlowSettings
from marketflow.text import without_secrets

LISTEN_SECONDS = 3.0
"""How long to wait for a message and a trade, including the connection."""

SAMPLE_SECONDS = 0.5
"""How long to go on after the first trade."""

SAMPLE_MS = 5 * MINUTE_MS
"""Minutes that are asked for to see whether the venue gives any."""

MOST_NAMES = 20
"""Symbols that are listed at most."""

_REACH = "check network and proxy (HTTPS_PROXY), and the addresses in exchanges"
_ELSEWHERE = "go through a permitted location by a proxy (HTTPS_PROXY), or take another venue"


def venue_check(
    exchange: ExchangeSettings, symbols: Sequence[str], flow: FlowSettings, needed: bool, history_ms: int = 0
) -> Check:
    """Return the check of one venue.

    Args:
        exchange: which.
        symbols: what is taken from it.
        flow: has the allowed clock skew.
        needed: whether faults are more than hints, as in live mode.
        history_ms: how far back its minutes are fetched.
    """
    check = _VenueCheck(exchange, symbols, flow, needed, history_ms)
    return Check(f"venue {exchange.name}", check.url, check.run)


class _VenueCheck:
    """Checks one venue."""

    def __init__(
        self, exchange: ExchangeSettings, symbols: Sequence[str], flow: FlowSettings, needed: bool, history_ms: int
    ) -> None:
        self._venue = VENUES[exchange.venue]
        self._name = exchange.name
        self._symbols = list(exchange.symbols or symbols)
        self._native = {ours: theirs for ours, theirs in exchange.symbols.items() if theirs}
        self._url = exchange.url or self._venue.url
        self._rest_url = exchange.rest_url
        self._flow = flow
        self._needed = needed
        self._history_ms = history_ms
        self.url = without_secrets(self._url)

    def run(self) -> list[CheckResult]:
        """Return the results: REST, symbols, history, stream; what cannot be tried after a failure is left out."""
        with closing(RestClient(self._venue, self._rest_url)) as client:
            results = [self._clock(client)]
            if results[0].state in (CheckState.FAILED, CheckState.HINT):
                return [*results, self._stream([])]
            try:
                names = look_up(client, self._symbols, self._native)
            except OSError as error:
                return [*results, self._failed("symbols", client.place, error)]
            results.append(self._names(client.place, names))
            if names.rest and self._history_ms:
                results.append(self._history(client, names))
            return [*results, self._stream([*names.native.values()])] if names.native else results

    def _clock(self, client: RestClient) -> CheckResult:
        try:
            began_ms, began = client.now_ms, time.monotonic()
            server_ms = client.server_time_ms()
        except OSError as error:
            return self._failed("REST", client.place, error)
        seconds = time.monotonic() - began
        ahead_ms = server_ms - began_ms - 500 * seconds
        side = "ahead of" if ahead_ms > 0 else "behind"
        offset = f"{seconds_text(abs(ahead_ms) / 1000)} {side} this machine's"
        text = f"answers in {seconds_text(seconds)}; its clock is {offset}"
        if abs(ahead_ms) > self._flow.max_clock_skew_ms:
            limit = f"flow.max_clock_skew_seconds ({self._flow.max_clock_skew_seconds:g})"
            advice = "synchronize this machine's clock by NTP"
            return self._result("REST", client.place, CheckState.WARNING, f"{text}, more than {limit}", advice)
        return self._result("REST", client.place, CheckState.OK, text)

    def _names(self, place: str, names: Names) -> CheckResult:
        absent = [symbol for symbol in self._symbols if symbol in names.absent]
        found = [f"does not trade {_listed(absent)}"] if absent else []
        if names.native:
            found.insert(0, f"trades {_listed([f'{ours} as {native}' for ours, native in names.native.items()])}")
        if names.halted:
            found.append(f"has halted {_listed([f'{ours} ({halt})' for ours, halt in names.halted.items()])}")
        advice = "remove them from symbols, or name them as the venue does in exchanges[].symbols" if absent else ""
        state = CheckState.WARNING if absent or names.halted else CheckState.OK
        if not (names.native or names.halted):
            state = CheckState.FAILED
        return self._result("symbols", place, state, "; ".join(found), advice)

    def _history(self, client: RestClient, names: Names) -> CheckResult:
        """Ask for the last minutes of one symbol, and say how much there is to fetch at the first start."""
        until = minute_start(client.now_ms)
        try:
            candles_between(client, next(iter(names.rest.values())), until - SAMPLE_MS, until, client.now_ms)
        except OSError as error:
            return self._failed("history", client.place, error)
        rest, wanted_ms = self._venue.rest, self._history_ms
        given_ms = wanted_ms if rest.candles_kept_ms is None else min(wanted_ms, rest.candles_kept_ms)
        calls = len(names.rest) * math.ceil(given_ms / (rest.candles_a_call * MINUTE_MS))
        text = f"gives minutes; those of the last {_hours(given_ms)} are {calls} call{'s' if calls > 1 else ''}"
        if given_ms < wanted_ms:
            text += f"; of the {_hours(wanted_ms)} that history asks for it gives no more"
        return self._result("history", client.place, CheckState.OK, text)

    def _stream(self, native: Sequence[str]) -> CheckResult:
        """Connect, subscribe to these symbols of the venue, and wait for messages; without symbols only connect."""
        heard = _Heard(self._venue)
        try:
            asyncio.run(heard.listen(self._url, native))
        except TimeoutError:
            text = f"no connection within {LISTEN_SECONDS:g} s"
            return self._result("stream", self.url, CheckState.FAILED, text, _REACH)
        except OSError as error:
            return self._failed("stream", self.url, error)
        return self._result("stream", self.url, *heard.result(native))

    def _failed(self, part: str, place: str, error: OSError) -> CheckResult:
        text = error.strerror if isinstance(error, socket.gaierror) else None
        advice = _ELSEWHERE if isinstance(error, VenueRefusal) and error.status in (403, 451) else _REACH
        if isinstance(error, VenueRefusal) and error.status in (418, 429):
            advice = "wait; other programs at this address ask the venue as well"
        found = f"its name cannot be resolved: {text}" if text else str(error)
        return self._result(part, place, CheckState.FAILED, without_secrets(found), advice)

    def _result(self, part: str, place: str, state: CheckState, found: str, advice: str = "") -> CheckResult:
        if state is not CheckState.OK and not self._needed:
            state, advice = CheckState.HINT, f"nothing in test mode; for live mode, {advice}"
        return CheckResult(f"venue {self._name} {part}", without_secrets(place), state, found, advice)


class _Heard:
    """What came over one WebSocket."""

    def __init__(self, venue: Venue) -> None:
        self._venue = venue
        self._messages = 0
        self._trades: Counter[str] = Counter()
        self._ids: set[tuple[str, int | None]] = set()
        self._refusals: list[str] = []
        self._closed: str | None = None
        self._seconds = 0.0
        self._traded = asyncio.Event()

    async def listen(self, url: str, native: Sequence[str]) -> None:
        """Listen until a moment after the first trade, or for LISTEN_SECONDS.

        Raises:
            OSError: no connection; a TimeoutError if there was none in time.
        """
        began = time.monotonic()
        async with asyncio.timeout(LISTEN_SECONDS):
            stream = await open_stream(url, self._take)
        for frame in self._venue.subscribe(native) if native else ():
            stream.send(frame)
        traded = asyncio.ensure_future(self._traded.wait())
        rest = LISTEN_SECONDS - (time.monotonic() - began) if native else SAMPLE_SECONDS
        await asyncio.wait((traded, stream.closed), timeout=max(0.1, rest), return_when=asyncio.FIRST_COMPLETED)
        if traded.done() and not stream.closed.done():
            await asyncio.wait((stream.closed,), timeout=SAMPLE_SECONDS)
        traded.cancel()
        self._closed = stream.closed.result() if stream.closed.done() else None
        self._seconds = time.monotonic() - began
        await stream.close()

    def result(self, native: Sequence[str]) -> tuple[CheckState, str, str]:
        """Return state, text and advice."""
        listened = f"{LISTEN_SECONDS:g} s"
        if self._closed is not None and not self._trades:
            return CheckState.FAILED, f"connected, but the venue closed the connection: {self._closed}", _REACH
        if not native:
            return CheckState.OK, "connected; not subscribed, because REST does not answer", ""
        if not self._messages:
            return (
                CheckState.FAILED,
                f"connected, but no message came within {listened}",
                "try again; see its status page",
            )
        found = f"subscribed; no trade within {listened}, which may be a quiet market"
        if self._trades:
            found = f"subscribed; {self._trades.total()} trades in {self._seconds:.1f} s, of {_listed([*self._trades])}"
        if self._refusals:
            found += f"; the venue refuses a subscription: {_listed(self._refusals)}"
            return CheckState.WARNING, found, "remove the symbol from symbols"
        return CheckState.OK, found, ""

    def _take(self, messages: list[bytes]) -> None:
        self._messages += len(messages)
        for message in messages:
            for event in self._venue.decode(message):
                if isinstance(event, Trade):
                    self._traded.set()
                    if (event.symbol, event.id) not in self._ids:  # on subscribing some repeat the last one
                        self._ids.add((event.symbol, event.id))
                        self._trades[event.symbol] += event.count
                elif isinstance(event, Refused):
                    self._refusals.append(event.text)


def _hours(ms: int) -> str:
    """A time in hours, or in days from two of them on."""
    return f"{ms / 86_400_000:g} days" if ms >= 2 * 86_400_000 else f"{ms / 3_600_000:g} h"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more
