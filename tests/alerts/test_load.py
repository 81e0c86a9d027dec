"""10,000 rules at 100,000 ticks a second: what evaluation costs beside the decoding of the same ticks."""

import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from marketflow.alerts.evaluator import Evaluator
from marketflow.feeds.decoder import Decoder
from marketflow.model import Candles, Mode, merge_all
from tests.alerts.rules import evaluator_of, stored

SYMBOLS = tuple(f"S{number}USDT" for number in range(20))
EXCHANGES = tuple(f"exchange{number}" for number in range(1, 6))
TICKS_A_SLICE = 10_000
"""100,000 ticks a second."""

SLICES = 20
"""Two seconds."""

START = 1_763_690_040_000


def lines() -> list[dict[str, bytes]]:
    """The lines that each exchange sends in each slice; prices walk, and differ between exchanges."""
    rng = random.Random(5)
    prices = {(exchange, symbol): rng.uniform(99, 101) for exchange in EXCHANGES for symbol in SYMBOLS}
    found = []
    for number in range(SLICES):
        of_exchange: dict[str, list[str]] = {exchange: [] for exchange in EXCHANGES}
        for n in range(TICKS_A_SLICE):
            exchange, symbol = EXCHANGES[n % len(EXCHANGES)], SYMBOLS[n // len(EXCHANGES) % len(SYMBOLS)]
            price = prices[exchange, symbol] = prices[exchange, symbol] * (1 + rng.gauss(0, 1e-5))
            at = START + number * 100 + n * 100 // TICKS_A_SLICE
            of_exchange[exchange].append(f'{{"symbol":"{symbol}","price":{price:.4f},"timestamp":{at}}}\n')
        found.append({exchange: "".join(each).encode() for exchange, each in of_exchange.items()})
    return found


def rules(count: int, symbols: tuple[str, ...] = SYMBOLS, low: float = 90, high: float = 110) -> Evaluator:
    """So many rules of all kinds of prices; levels lie close to the prices, many within reach."""
    rng = random.Random(count)
    found = []
    for number in range(count):
        exchange = (*EXCHANGES, None, "reference")[number % 7]
        symbol = symbols[number // 7 % len(symbols)]
        once, cooldown = number % 2 == 0, f"{number % 3}s"
        fields: dict[str, Any] = {"symbol": symbol, "exchange": exchange, "once": once, "cooldown": cooldown}
        found.append(stored(f"r{number}", level=rng.uniform(low, high), **fields))
    return evaluator_of(*found)


@pytest.fixture(scope="module")
def sent() -> list[dict[str, bytes]]:
    return lines()


def decoders(now_ms: Callable[[], int]) -> dict[str, Decoder]:
    return {
        exchange: Decoder(Mode.TEST, exchange, SYMBOLS, lambda: now_ms() * 1_000_000, 5000, lambda *_: None)
        for exchange in EXCHANGES
    }


def folded(sent: list[dict[str, bytes]]) -> tuple[list[Candles], float]:
    """The candles of new ticks of each slice, and the CPU seconds that decoding and folding took."""
    now = START
    of_exchange = decoders(lambda: now)
    batches: list[Candles] = []
    took = 0.0
    for number, chunks in enumerate(sent):
        now = START + number * 100 + 100
        began = time.process_time()
        batches.append(merge_all([of_exchange[exchange].decode(chunk) for exchange, chunk in chunks.items()]))
        took += time.process_time() - began
    assert sum(candle.ticks for batch in batches for candle in batch.values()) == SLICES * TICKS_A_SLICE
    return batches, took


def evaluated(make: Callable[[], Evaluator], batches: list[Candles], repeats: int = 3) -> tuple[float, int]:
    """The least CPU seconds that evaluation took, and the number of events."""
    best, events = float("inf"), 0
    for _ in range(repeats):
        evaluator = make()
        events, began = 0, time.process_time()
        for number, batch in enumerate(batches):
            events += len(evaluator.evaluate(batch, START + number * 100 + 100))
        best = min(best, time.process_time() - began)
    return best, events


@pytest.mark.long
def test_ten_thousand_rules_cost_a_part_of_the_decoding(
    sent: list[dict[str, bytes]], record_property: Callable[[str, object], None]
) -> None:
    """Evaluation is less than half of decoding, and most of it is the work on 100 candles a slice, not on rules.

    Rules of which no price moves cost nothing, and ten times the rules not three times as much.
    """
    batches, decoding = folded(sent)
    many, events = evaluated(lambda: rules(10_000), batches)
    few, _ = evaluated(lambda: rules(1_000), batches)
    unmoved, none = evaluated(lambda: rules(10_000, low=500, high=1000), batches)
    foreign, _ = evaluated(lambda: rules(10_000, symbols=("OTHERUSDT",)), batches)
    measured = {
        "ms a slice of 10,000 ticks: decoding": decoding,
        "ms a slice: 10,000 rules": many,
        "ms a slice: 1,000 rules": few,
        "ms a slice: 10,000 rules whose levels are far away": unmoved,
        "ms a slice: 10,000 rules of other symbols": foreign,
    }
    for name, seconds in measured.items():
        record_property(name, round(1000 * seconds / SLICES, 3))
    record_property("events", events)
    assert events > 0
    assert none == 0
    assert many < decoding / 2
    assert unmoved < decoding / 4
    assert foreign < unmoved / 2
    assert many < 3 * few
    assert many < SLICES * 0.1 * 0.1, "over a tenth of a core"
