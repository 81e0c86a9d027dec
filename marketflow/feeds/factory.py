"""The feeds that the settings ask for, each with a decoder of its own."""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from reactivex import abc

from marketflow.clock import Clock
from marketflow.feeds.decoder import Decoder
from marketflow.feeds.feed import Feed
from marketflow.feeds.generator import GeneratorFeed, Market
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


def configured_feeds(
    settings: Settings, clock: Clock, generating: abc.SchedulerBase, recorder: "Recorder | None" = None
) -> dict[Mode, Sequence[Feed]]:
    """A feed for each exchange in each mode. Generators run on the scheduler, an exchange on a thread of its own.

    What exchanges send is handed to the recorder.
    """
    return {Mode.TEST: _generators(settings, clock, generating), Mode.LIVE: _exchanges(settings, clock, recorder)}


def configured_recorder(settings: Settings, clock: Clock) -> "Recorder | None":
    """The recorder of raw frames; None where the settings have no folder for them."""
    if not settings.record.dir:
        return None
    from marketflow.feeds.recording.recorder import Recorder  # lazily: most processes record nothing

    return Recorder(Path(settings.record.dir).expanduser(), settings.record.max_bytes, clock)


def _generators(settings: Settings, clock: Clock, scheduler: abc.SchedulerBase) -> list[Feed]:
    def feed(name: str) -> Feed:
        seed = settings.generator.seed
        market = partial(Market, settings.symbols, settings.generator.rate, None if seed is None else f"{seed}:{name}")
        return GeneratorFeed(
            name, market, _decoder(settings, Mode.TEST, name, settings.symbols, clock), clock, scheduler
        )

    return [feed(exchange.name) for exchange in settings.exchanges]


def _exchanges(settings: Settings, clock: Clock, recorder: "Recorder | None") -> list[Feed]:
    budgets: Budgets = {}

    def feed(exchange: ExchangeSettings) -> Feed:
        symbols = tuple(exchange.symbols) or settings.symbols
        decoder = _decoder(settings, Mode.LIVE, exchange.name, symbols, clock, is_venue=bool(exchange.venue))
        made = live_feed(exchange, symbols, decoder, settings.flow.stale_after_seconds, budgets)
        if recorder is not None:
            made.record = recorder.feed(exchange.name, exchange.venue, made.place)
        return made

    return [feed(exchange) for exchange in settings.exchanges]


def live_feed(
    exchange: ExchangeSettings, symbols: Sequence[str], decoder: Decoder, stale_after_seconds: float, budgets: Budgets
) -> "TcpFeed | VenueFeed":
    """The feed of an exchange: over TCP, or by the protocol of its venue.

    Args:
        exchange: which.
        symbols: what is taken from it.
        decoder: checks and folds its ticks.
        stale_after_seconds: silence after which the connection is made anew.
        budgets: by venue, shared by all feeds of the process.
    """
    if not exchange.venue:
        return TcpFeed(exchange.name, exchange.host, exchange.port, decoder, stale_after_seconds)
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
