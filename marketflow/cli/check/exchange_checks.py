"""Looks at an exchange: connects as MarketFlow would, listens for a moment and judges by the decoder's rules."""

import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence

from reactivex import Observable

from marketflow.cli.check.findings import Check, Finding, State, seconds_text
from marketflow.clock import milliseconds, system_clock
from marketflow.feeds.decoder import Decoder
from marketflow.feeds.tcp import ConnectionLost, TcpFeed
from marketflow.model import Candles, FeedState, Mode
from marketflow.settings import ExchangeSettings, FlowSettings

LISTEN_SECONDS = 4.0
"""How long a symbol is waited for, the connection included."""

SAMPLE_SECONDS = 1.0
"""How long is listened if all symbols come at once."""

_UNITS = {"seconds": 1e3, "microseconds": 1e-3, "nanoseconds": 1e-6}
"""What timestamps may be in by mistake, and how many milliseconds that is."""


def exchange_check(exchange: ExchangeSettings, symbols: Sequence[str], flow: FlowSettings, needed: bool) -> Check:
    """A check of one exchange; unless it is `needed`, in live mode, whatever is wrong is but a hint."""
    what = f"exchange {exchange.name}"

    def look() -> list[Finding]:
        state, found, advice = _Listener(exchange, symbols).listen(flow)
        if state is not State.OK and not needed:
            state, advice = State.HINT, f"nothing in test mode; for live mode, {advice}"
        return [Finding(what, exchange.address, state, found, advice)]

    return Check(what, exchange.address, look)


class _Listener:
    """Hears one connection and keeps count."""

    def __init__(self, exchange: ExchangeSettings, symbols: Sequence[str]) -> None:
        self._symbols = list(symbols)
        self._heard: Counter[str] = Counter()
        self._ahead_ms: list[int] = []
        self._examples: dict[str, object] = {}
        self._error: Exception | None = None
        self._over = threading.Event()
        self._heard_all = threading.Event()
        # Timestamps are believed here, however far off they are: that is what is to be found out.
        any_skew_ms = 2**63
        self._decoder = Decoder(Mode.LIVE, exchange.name, symbols, system_clock, any_skew_ms, self._reject)
        self._feed = TcpFeed(exchange.name, exchange.host, exchange.port, self._decoder, LISTEN_SECONDS)

    def listen(self, flow: FlowSettings) -> tuple[State, str, str]:
        """State, finding and advice."""
        batches: Observable[Candles] = self._feed.batches()
        began = time.monotonic()
        connection = batches.subscribe(self._take, self._end, self._end)
        if not self._over.wait(SAMPLE_SECONDS):
            self._heard_all.wait(LISTEN_SECONDS - SAMPLE_SECONDS)
        state, seconds = self._feed.state, time.monotonic() - began
        connection.dispose()
        if not self._heard:
            return self._nothing(state)
        return self._judged(flow, seconds)

    def _take(self, candles: Candles) -> None:
        now_ms = milliseconds(system_clock())
        for slot, candle in candles.items():
            self._heard[slot.series.symbol] += candle.ticks
        self._ahead_ms.append(max(candle.last_at for candle in candles.values()) - now_ms)
        if len(self._heard) == len(self._symbols):
            self._heard_all.set()

    def _end(self, error: Exception | None = None) -> None:
        self._error = error
        self._over.set()
        self._heard_all.set()

    def _reject(self, reason: str, _: int, example: object) -> None:
        self._examples.setdefault(reason, example)

    # Verdicts

    def _nothing(self, state: FeedState) -> tuple[State, str, str]:
        """Why no tick came."""
        start = "start it, or correct its address in exchanges"
        match self._error:
            case socket.gaierror():
                return State.FAILED, f"its name cannot be looked up: {self._error.strerror}", "correct its address"
            case ConnectionRefusedError():
                return State.FAILED, "connection refused", start
            case TimeoutError():
                return State.FAILED, "no answer to a connection", start
            case _ if self._decoder.rejected:
                return State.FAILED, f"connected, but no line is a tick: {self._rejected()}", _FORMAT
            case ConnectionLost():
                return State.FAILED, "it closes the connection before it has sent a tick", "see its log"
            case OSError() as error:
                return State.FAILED, error.strerror or str(error), start
            case None if state is FeedState.CONNECTING:
                return State.FAILED, f"no connection within {LISTEN_SECONDS:g} s", start
        return State.FAILED, f"connected, but nothing came within {LISTEN_SECONDS:g} s", "see its log"

    def _judged(self, flow: FlowSettings, seconds: float) -> tuple[State, str, str]:
        """What is to be said of the ticks that came."""
        ahead_ms = max(self._ahead_ms)  # the tick that was under way for the shortest time
        skew = "ahead of" if ahead_ms > 0 else "behind"
        heard = [symbol for symbol in self._symbols if self._heard[symbol]]
        found = [
            f"{self._heard.total()} ticks in {seconds:.1f} s, of {', '.join(heard)}",
            f"timestamps {seconds_text(abs(ahead_ms) / 1000)} {skew} this machine's clock",
        ]
        advice = []
        if abs(ahead_ms) > flow.max_clock_skew_ms:
            limit = f"flow.max_clock_skew_seconds ({flow.max_clock_skew_seconds:g})"
            found.append(
                f"that is more than {limit}: such ticks are dropped, or dated by receipt where all are off alike"
            )
            advice.append(_clock_advice(ahead_ms))
        if self._decoder.timestamps_replaced:
            found.append(f"{self._decoder.timestamps_replaced} ticks without a timestamp")
            advice.append("let it send timestamps in Unix milliseconds; the time of receipt is taken instead")
        if silent := [symbol for symbol in self._symbols if symbol not in heard]:
            found.append(f"nothing within {LISTEN_SECONDS:g} s of {', '.join(silent)}")
            advice.append("see whether it trades all of symbols")
        if self._decoder.rejected:
            found.append(f"lines rejected: {self._rejected()}")
            if {*self._decoder.rejected} != {"unknown_symbol"}:
                advice.append(_FORMAT)
            else:
                advice.append("add to symbols what is wanted; the rest is dropped")
        if isinstance(self._error, ConnectionLost | OSError):
            found.append("then it closed the connection")
            advice.append("see its log")
        return State.WARNING if advice else State.OK, "; ".join(found), "; ".join(advice)

    def _rejected(self) -> str:
        return ", ".join(
            f"{count} {reason} (such as {ascii(self._examples[reason])[:60]})"
            for reason, count in self._decoder.rejected.items()
        )


_FORMAT = 'let it send lines such as {"symbol":"BTCUSDT","price":67123.45,"timestamp":1763690000123}'


def _clock_advice(ahead_ms: int) -> str:
    """What to do about timestamps that are far off: a wrong unit is likelier than a clock set so badly."""
    now_ms = milliseconds(system_clock())
    for unit, factor in _UNITS.items():
        if abs((now_ms + ahead_ms) * factor - now_ms) < 24 * 3600_000:
            return f"its timestamps look like {unit}: let it send Unix milliseconds"
    return "set the clocks by NTP, its own or this machine's (if all exchanges are off, it is this one's)"
