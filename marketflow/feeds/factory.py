"""The feeds that the settings ask for, each with a decoder of its own."""

from collections.abc import Sequence
from functools import partial

from reactivex import abc

from marketflow.clock import Clock
from marketflow.feeds.decoder import Decoder
from marketflow.feeds.feed import Feed
from marketflow.feeds.generator import GeneratorFeed, Market
from marketflow.feeds.tcp import TcpFeed
from marketflow.logs import RateLimit
from marketflow.model import Mode
from marketflow.settings import Settings


def configured_feeds(settings: Settings, clock: Clock, generating: abc.SchedulerBase) -> dict[Mode, Sequence[Feed]]:
    """A feed for each exchange in each mode. Generators run on the scheduler, an exchange on a thread of its own."""
    return {Mode.TEST: _generators(settings, clock, generating), Mode.LIVE: _exchanges(settings, clock)}


def _generators(settings: Settings, clock: Clock, scheduler: abc.SchedulerBase) -> list[Feed]:
    def feed(name: str) -> Feed:
        seed = settings.generator.seed
        market = partial(Market, settings.symbols, settings.generator.rate, None if seed is None else f"{seed}:{name}")
        return GeneratorFeed(name, market, _decoder(settings, Mode.TEST, name, clock), clock, scheduler)

    return [feed(exchange.name) for exchange in settings.exchanges]


def _exchanges(settings: Settings, clock: Clock) -> list[Feed]:
    return [
        TcpFeed(
            exchange.name,
            exchange.host,
            exchange.port,
            _decoder(settings, Mode.LIVE, exchange.name, clock),
            settings.flow.stale_after_seconds,
        )
        for exchange in settings.exchanges
    ]


def _decoder(settings: Settings, mode: Mode, exchange: str, clock: Clock) -> Decoder:
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

    return Decoder(mode, exchange, settings.symbols, clock, settings.flow.max_clock_skew_ms, on_reject, on_clock)
