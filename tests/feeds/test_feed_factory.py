"""Feeds by the settings: what changes with shards and symbols, and what stays."""

from collections.abc import Mapping, Sequence

import pytest
from reactivex.scheduler import ImmediateScheduler

from marketflow.clock import system_clock
from marketflow.feeds.factory import FeedFactory
from marketflow.feeds.feed import Feed
from marketflow.feeds.generator import GeneratorFeed
from marketflow.model import Mode
from marketflow.settings import ExchangeSettings, GeneratorSettings, Settings

pytestmark = pytest.mark.unit

SYMBOLS = ("ADAUSDT", "BTCUSDT", "DOGEUSDT", "ETHUSDT", "SOLUSDT", "TONUSDT", "XRPUSDT")


def settings_with(symbols: Sequence[str] = SYMBOLS, shards: int = 1) -> Settings:
    exchange = ExchangeSettings(name="exchange1", address="127.0.0.1:40101", shards=shards)
    return Settings(symbols=tuple(symbols), exchanges=(exchange,), generator=GeneratorSettings(rate=0.7))


def generator(feeds: Mapping[Mode, Sequence[Feed]]) -> GeneratorFeed:
    (feed,) = feeds[Mode.TEST]
    assert isinstance(feed, GeneratorFeed)
    return feed


def test_shards_of_an_exchange_share_its_generated_rate() -> None:
    settings = settings_with(shards=3)
    factory = FeedFactory(system_clock, ImmediateScheduler())
    nothing: dict[Mode, Sequence[Feed]] = {mode: [] for mode in Mode}
    rates = []
    for name in settings.shards.names:
        feeds = factory.changed(nothing, settings, settings, dict.fromkeys(Mode, (name,)))
        feed = generator(feeds)
        assert feed.rate == pytest.approx(0.1 * len(feed.decoder.series))
        rates.append(feed.rate)
        whole = factory.changed(feeds, settings, settings, dict.fromkeys(Mode, settings.shards.names))
        assert generator(whole).rate == 0.7  # also after a takeover of the others
    assert len(rates) == 3
    assert sum(rates) == pytest.approx(0.7)


def test_generator_stays_where_the_symbols_change() -> None:
    before, after = settings_with(SYMBOLS[:3]), settings_with(SYMBOLS)
    factory = FeedFactory(system_clock, ImmediateScheduler())
    feeds = factory.feeds(before)
    changed = factory.changed(feeds, before, after)
    assert generator(changed) is generator(feeds)
    assert generator(changed).rate == 0.7
    assert {series.symbol for series in generator(changed).decoder.series} == {*SYMBOLS}
