"""The feeds that the settings ask for, each with a decoder of its own; and those that changed settings ask for."""

import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from reactivex import abc

from marketflow.clock import Clock
from marketflow.feeds.cpu.pacing import Pacing
from marketflow.feeds.decoder import Decoder
from marketflow.feeds.feed import Feed
from marketflow.feeds.generator import GeneratorFeed
from marketflow.feeds.tcp import TcpFeed
from marketflow.feeds.venues.trade_ids import TradeIds
from marketflow.logs import RateLimit
from marketflow.model import Mode
from marketflow.settings import ExchangeSettings, Settings

if TYPE_CHECKING:
    from marketflow.feeds.recording.recorder import Recorder
    from marketflow.feeds.venues.limits import AttemptBudget
    from marketflow.feeds.venues.venue import Venue
    from marketflow.feeds.venues.websocket_feed import VenueFeed


class VenueBudgets(NamedTuple):
    """How many connections this process may begin at a venue, and what weight of REST calls."""

    connections: "AttemptBudget"
    rest: "AttemptBudget"


Budgets: TypeAlias = dict[str, VenueBudgets]
"""By the name of a venue."""


class FeedFactory:
    """Makes a feed for each exchange in each mode.

    Args:
        clock: this machine's time.
        generating: runs the generators; an exchange has a thread of its own.
        recorder: takes what exchanges send.
        pacing: rests of the feeds that lag behind.
    """

    def __init__(
        self,
        clock: Clock,
        generating: abc.SchedulerBase,
        recorder: "Recorder | None" = None,
        pacing: Pacing | None = None,
    ) -> None:
        self._clock, self._generating, self._recorder, self._pacing = clock, generating, recorder, pacing
        self._budgets: Budgets = {}

    def feeds(self, settings: Settings) -> dict[Mode, Sequence[Feed]]:
        """The feeds of all exchanges."""
        return self.changed({mode: [] for mode in Mode}, settings, settings)

    def changed(
        self,
        feeds: Mapping[Mode, Sequence[Feed]],
        before: Settings,
        after: Settings,
        shards: Mapping[Mode, Collection[str]] | None = None,
    ) -> dict[Mode, Sequence[Feed]]:
        """The feeds after a change of exchanges, symbols or shards: those that were there, as far as they can stay.

        A feed stays if at most its symbols have changed, which it then takes. An exchange has one feed, with the
        symbols of all its shards.

        Args:
            feeds: those of before.
            before: the settings that they were made of.
            after: the settings of now.
            shards: which shards to have in each mode; None is all.
        """
        earlier = {exchange.name: exchange for exchange in before.exchanges}
        found: dict[Mode, Sequence[Feed]] = {}
        for mode in Mode:
            known = {feed.exchange: feed for feed in feeds[mode]}
            made: list[Feed] = []
            for exchange in after.exchanges:
                symbols = _symbols(after, exchange, mode, None if shards is None else shards[mode])
                if symbols:
                    old = earlier.get(exchange.name), known.get(exchange.name)
                    made.append(self._changed(mode, old, after, exchange, symbols))
            found[mode] = made
        return found

    def _changed(
        self,
        mode: Mode,
        old: tuple[ExchangeSettings | None, Feed | None],
        settings: Settings,
        exchange: ExchangeSettings,
        symbols: Mapping[str, str],
    ) -> Feed:
        """The feed of an exchange: the old one, if it can stay."""
        before, feed = old
        if mode is Mode.TEST:
            rate = settings.generator.rate * (len(symbols) / len(settings.symbols))  # of an exchange, by its shards
            if not isinstance(feed, GeneratorFeed) or feed.rate != rate:
                return self._generator(settings, exchange.name, tuple(symbols), rate)
        if before is None or feed is None:
            return self._exchange(settings, exchange, symbols)
        if mode is Mode.LIVE and before.connection != exchange.connection:
            # At another address it is the same exchange, and what came before may come again.
            decoder = None if before.venue or exchange.venue else feed.decoder
            return self._exchange(settings, exchange, symbols, decoder)
        if {series.symbol for series in feed.decoder.series} != symbols.keys() or before.symbols != exchange.symbols:
            feed.take_symbols(symbols)
            _expect_others(feed, settings, exchange)
        return feed

    def _generator(self, settings: Settings, name: str, symbols: Sequence[str], rate: float) -> Feed:
        seed = None if settings.generator.seed is None else f"{settings.generator.seed}:{name}"
        decoder = _decoder(settings, Mode.TEST, name, symbols, self._clock)
        return GeneratorFeed(name, symbols, rate, seed, decoder, self._clock, self._generating)

    def _exchange(
        self,
        settings: Settings,
        exchange: ExchangeSettings,
        named: Mapping[str, str],
        decoder: Decoder | None = None,
    ) -> Feed:
        symbols = tuple(named)
        if decoder is None:
            decoder = _decoder(settings, Mode.LIVE, exchange.name, symbols, self._clock, is_venue=bool(exchange.venue))
        decoder.take_symbols(symbols)
        made = live_feed(exchange, symbols, decoder, settings.flow.stale_after_seconds, self._budgets, self._pacing)
        if self._recorder is not None:
            made.record = self._recorder.feed(exchange.name, exchange.venue, made.place)
        _expect_others(made, settings, exchange)
        return made


def _symbols(
    settings: Settings, exchange: ExchangeSettings, mode: Mode, shards: Collection[str] | None
) -> Mapping[str, str]:
    """The symbols of an exchange that are in some shards, with the venue's name of each."""
    named = settings.symbols_of(exchange) if mode is Mode.LIVE else dict.fromkeys(settings.symbols, "")
    if shards is None:
        return named
    return {symbol: named[symbol] for symbol in settings.shards.symbols(exchange.name, shards, named)}


def _expect_others(feed: Feed, settings: Settings, exchange: ExchangeSettings) -> None:
    """Have an exchange that sends the symbols of all shards count none of them as unknown."""
    if exchange.shards > 1 and not exchange.venue:
        named = settings.symbols_of(exchange).keys()
        feed.decoder.expected_unknown = frozenset(named) - {series.symbol for series in feed.decoder.series}


def configured_recorder(settings: Settings, clock: Clock) -> "Recorder | None":
    """The recorder of raw frames; None where the settings have no folder for them."""
    if not settings.record.dir:
        return None
    from marketflow.feeds.recording.recorder import Recorder  # lazily: most processes record nothing

    return Recorder(Path(settings.record.dir).expanduser(), settings.record.max_bytes, clock)


def live_feed(
    exchange: ExchangeSettings,
    symbols: Sequence[str],
    decoder: Decoder,
    stale_after_seconds: float,
    budgets: Budgets,
    pacing: Pacing | None = None,
) -> "TcpFeed | VenueFeed":
    """The feed of an exchange: over TCP, or by the protocol of its venue.

    Args:
        exchange: which.
        symbols: what is taken from it.
        decoder: checks and folds its ticks.
        stale_after_seconds: silence after which the connection is made anew.
        budgets: by venue, shared by all feeds of the process.
        pacing: rests of a feed over TCP while it lags behind.
    """
    if not exchange.venue:
        return TcpFeed(exchange.name, exchange.host, exchange.port, decoder, stale_after_seconds, pacing=pacing)
    # Lazily: a start without venues needs no WebSocket client.
    from marketflow.feeds.backfill.rest_client import RestClient
    from marketflow.feeds.venues.registry import VENUES
    from marketflow.feeds.venues.websocket_feed import VenueFeed

    venue = VENUES[exchange.venue]
    budget = budgets.setdefault(exchange.venue, _budgets(venue))
    native = {ours: theirs for ours, theirs in exchange.symbols.items() if theirs}
    return VenueFeed(
        exchange.name,
        venue,
        symbols,
        native,
        decoder,
        stale_after_seconds,
        budget.connections,
        exchange.url,
        RestClient(venue, exchange.rest_url, budget.rest),
    )


def _budgets(venue: "Venue") -> VenueBudgets:
    from marketflow.feeds.venues.limits import AttemptBudget

    connections = AttemptBudget(*venue.attempts, time.monotonic)
    return VenueBudgets(connections, AttemptBudget(*venue.rest.weight_limit, time.monotonic))


def _decoder(
    settings: Settings,
    mode: Mode,
    exchange: str,
    symbols: Sequence[str],
    clock: Clock,
    is_venue: bool = False,
) -> Decoder:
    limit, rare = RateLimit(10.0), RateLimit(60.0)

    def on_clock(text: str) -> None:
        rare.log(text, "WARNING", text, exchange=exchange)

    def on_reject(reason: str, count: int, example: object) -> None:
        limit.log(
            reason,
            "WARNING",
            f"dropped as {reason}: {count} in this chunk, such as {example!r:.100}",
            exchange=exchange,
        )

    skew_ms = settings.flow.max_clock_skew_ms
    ids = None if is_venue else TradeIds(reports_missing=False, epoch_trades=1)
    return Decoder(mode, exchange, symbols, clock, skew_ms, on_reject, on_clock, is_venue, ids)
