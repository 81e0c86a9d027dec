"""Health check of a TCP exchange: connects and decodes as the server would, for a few seconds."""

import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence

from reactivex import Observable

from marketflow.cli.check.check_result import Check, CheckResult, CheckState, seconds_text
from marketflow.clock import milliseconds, system_clock
from marketflow.feeds.decoder import Decoder
from marketflow.feeds.factory import live_feed
from marketflow.feeds.tcp import ConnectionLost
from marketflow.model import Candles, FeedState, Mode
from marketflow.settings import ExchangeSettings, FlowSettings

LISTEN_SECONDS = 4.0
"""Time in which each symbol must have a tick, including the connection."""

SAMPLE_SECONDS = 1.0
"""Time to listen when all symbols have a tick at once."""

_UNITS = {"seconds": 1e3, "microseconds": 1e-3, "nanoseconds": 1e-6}
"""Units in which timestamps may be sent by mistake, and their length in milliseconds."""


def exchange_check(exchange: ExchangeSettings, symbols: Sequence[str], flow: FlowSettings, needed: bool) -> Check:
    """Return the check of one exchange. Faults are hints unless it is `needed`, which it is in live mode."""
    what = f"exchange {exchange.name}"

    def run() -> list[CheckResult]:
        state, found, advice = _Listener(exchange, symbols).listen(flow)
        if state is not CheckState.OK and not needed:
            state, advice = CheckState.HINT, f"nothing in test mode; for live mode, {advice}"
        return [CheckResult(what, place, state, found, advice)]

    place = exchange.address
    return Check(what, place, run)


class _Listener:
    """Listens on one connection and counts ticks per symbol."""

    def __init__(self, exchange: ExchangeSettings, symbols: Sequence[str]) -> None:
        self._symbols = list(symbols)
        self._received: Counter[str] = Counter()
        self._ahead_ms: list[int] = []
        self._examples: dict[str, object] = {}
        self._error: Exception | None = None
        self._ended = threading.Event()
        self._all_received = threading.Event()
        # No timestamp is rejected for its skew, which is what is measured here.
        any_skew_ms = 2**63
        self._decoder = Decoder(Mode.LIVE, exchange.name, self._symbols, system_clock, any_skew_ms, self._reject)
        self._feed = live_feed(exchange, self._symbols, self._decoder, LISTEN_SECONDS, {})

    def listen(self, flow: FlowSettings) -> tuple[CheckState, str, str]:
        """Return state, text and advice."""
        batches: Observable[Candles] = self._feed.batches()
        began = time.monotonic()
        connection = batches.subscribe(self._take, self._end, self._end)
        if not self._ended.wait(SAMPLE_SECONDS):
            self._all_received.wait(LISTEN_SECONDS - SAMPLE_SECONDS)
        state, seconds = self._feed.state, time.monotonic() - began
        connection.dispose()
        if not self._received:
            return self._without_ticks(state)
        return self._with_ticks(flow, seconds)

    def _take(self, candles: Candles) -> None:
        now_ms = milliseconds(system_clock())
        for slot, candle in candles.items():
            self._received[slot.series.symbol] += candle.ticks
        self._ahead_ms.append(max(candle.last_at for candle in candles.values()) - now_ms)
        if len(self._received) == len(self._symbols):
            self._all_received.set()

    def _end(self, error: Exception | None = None) -> None:
        self._error = error
        self._ended.set()
        self._all_received.set()

    def _reject(self, reason: str, _: int, example: object) -> None:
        self._examples.setdefault(reason, example)

    def _without_ticks(self, state: FeedState) -> tuple[CheckState, str, str]:
        """Return the result of a connection without ticks."""
        start = "start it, or correct its address in exchanges"
        match self._error:
            case socket.gaierror():
                return CheckState.FAILED, f"its name cannot be resolved: {self._error.strerror}", "correct its address"
            case ConnectionRefusedError():
                return CheckState.FAILED, "connection refused", start
            case TimeoutError():
                return CheckState.FAILED, "no answer to the connection attempt", start
            case _ if self._decoder.rejected:
                return CheckState.FAILED, f"connected, but no line is a tick: {self._rejected()}", _FORMAT
            case ConnectionLost():
                return CheckState.FAILED, "it closes the connection before the first tick", "see its log"
            case OSError() as error:
                return CheckState.FAILED, error.strerror or str(error), start
            case None if state is FeedState.CONNECTING:
                return CheckState.FAILED, f"no connection within {LISTEN_SECONDS:g} s", start
        return CheckState.FAILED, f"connected, but received nothing within {LISTEN_SECONDS:g} s", "see its log"

    def _with_ticks(self, flow: FlowSettings, seconds: float) -> tuple[CheckState, str, str]:
        """Return the result of a connection with ticks."""
        ahead_ms = max(self._ahead_ms)  # of the tick with the shortest transit time
        skew = "ahead of" if ahead_ms > 0 else "behind"
        received = [symbol for symbol in self._symbols if self._received[symbol]]
        found = [
            f"{self._received.total()} ticks in {seconds:.1f} s, of {', '.join(received)}",
            f"timestamps {seconds_text(abs(ahead_ms) / 1000)} {skew} this machine's clock",
        ]
        advice = []
        if abs(ahead_ms) > flow.max_clock_skew_ms:
            limit = f"flow.max_clock_skew_seconds ({flow.max_clock_skew_seconds:g})"
            found.append(f"more than {limit}: such ticks are dropped, or dated by receipt if all have the same offset")
            advice.append(_clock_advice(ahead_ms))
        if self._decoder.timestamps_replaced:
            found.append(f"{self._decoder.timestamps_replaced} ticks without a timestamp")
            advice.append("make it send timestamps in Unix milliseconds; the time of receipt is used instead")
        if silent := [symbol for symbol in self._symbols if symbol not in received]:
            found.append(f"no tick within {LISTEN_SECONDS:g} s of {', '.join(silent)}")
            advice.append("check whether it trades all of symbols")
        if self._decoder.rejected:
            found.append(f"lines rejected: {self._rejected()}")
            if {*self._decoder.rejected} != {"unknown_symbol"}:
                advice.append(_FORMAT)
            else:
                advice.append("add them to symbols if they are needed; otherwise they are dropped")
        if isinstance(self._error, ConnectionLost | OSError):
            found.append("then it closed the connection")
            advice.append("see its log")
        return CheckState.WARNING if advice else CheckState.OK, "; ".join(found), "; ".join(advice)

    def _rejected(self) -> str:
        return ", ".join(
            f"{count} {reason} (such as {ascii(self._examples[reason])[:60]})"
            for reason, count in self._decoder.rejected.items()
        )


_FORMAT = 'make it send lines such as {"symbol":"BTCUSDT","price":67123.45,"timestamp":1763690000123}'


def _clock_advice(ahead_ms: int) -> str:
    """Return what to do about a large skew: first test whether the timestamps have a wrong unit."""
    now_ms = milliseconds(system_clock())
    for unit, factor in _UNITS.items():
        if abs((now_ms + ahead_ms) * factor - now_ms) < 24 * 3600_000:
            return f"its timestamps look like {unit}: make it send Unix milliseconds"
    return "synchronize the clocks by NTP: its own or this machine's (this one's if all exchanges are off)"
