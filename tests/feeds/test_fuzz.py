"""The line decoder against one that is slow and plain, on hostile lines and what chance makes of them.

`corpus/` holds streams by what is wrong with them; one that found a bug stays there. More of chance:

    SEEDS=1000 pytest tests/feeds/test_fuzz.py
    SEED=17 pytest tests/feeds/test_fuzz.py
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path
from random import Random
from typing import Any, NoReturn

import msgspec
import pytest

from marketflow.feeds.decoder import MAX_PRICE, Decoder
from marketflow.feeds.line_framing import MAX_LINE_BYTES, Framer
from marketflow.feeds.timestamps import TimestampCheck
from marketflow.model import SLICE_MS, Candles, Mode, Series, Tick, merge_into
from tests.support.oracle import assert_same, candles_of_ticks
from tests.support.seeds import seeds

NOW_MS = 1_763_690_000_000
SKEW_MS = 5000
SYMBOLS = ("BTCUSDT", "ETHUSDT")
CORPUS = sorted((Path(__file__).parent / "corpus").iterdir())
MUTANTS_A_SEED = 150
LONG = b'{"symbol":"BTCUSDT","price":1,"x":"%s"}'
TOKENS = (
    *(b"\n", b"\r\n", b"\r", b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"\\u0070", b"\\ud800", b"\x00", b"\xff"),
    *(b"-", b"0", b"1e999", b"9" * 30, b"NaN", b"null", b"true", b'"price"', b'"symbol"', b'"timestamp"', b"BTCUSDT"),
    *(b" ", b"\xef\xbb\xbf", "\u2028".encode(), b"}\n{", b"}{", b"\n\n"),
)


@dataclass
class Decoded:
    """What became of a stream."""

    candles: Candles
    ticks: int
    replaced: int
    rejected: Counter[str]


# The plain decoder


class _Bad(Exception):
    pass


def reference(stream: bytes) -> Decoded:
    """Line by line, with the JSON module of Python."""
    *lines, unfinished = stream.split(b"\n")
    ticks: list[tuple[Series, Tick]] = []
    rejected: Counter[str] = Counter()
    replaced = 0
    check = TimestampCheck(SKEW_MS, lambda text: None)  # which has tests of its own
    for line in lines:
        try:
            tick = _plain(line)
        except _Bad as reason:
            rejected[str(reason)] += 1
            continue
        if tick is not None:
            symbol, price, timestamp = tick
            at = NOW_MS if timestamp is None else check.date(timestamp, NOW_MS)
            if isinstance(at, str):
                rejected[at] += 1
                continue
            replaced += timestamp is None
            ticks.append((Series(Mode.LIVE, "exchange1", symbol), Tick(price, at, len(ticks))))
    rejected["too_long"] += len(unfinished) > MAX_LINE_BYTES
    return Decoded(candles_of_ticks(ticks, SLICE_MS), len(ticks), replaced, +rejected)


def _plain(line: bytes) -> tuple[str, float, float | None] | None:
    if len(line) > MAX_LINE_BYTES:
        raise _Bad("too_long")
    if not line.strip():
        return None
    fields = _fields(line)
    symbol, price, timestamp = (fields.get(name) for name in ("symbol", "price", "timestamp"))
    if not isinstance(symbol, str):
        raise _Bad("no_symbol")
    amount = _amount(price)
    if not symbol.isascii() or symbol.upper() not in SYMBOLS:
        raise _Bad("unknown_symbol")
    if not 0 < amount <= MAX_PRICE:
        raise _Bad("bad_price")
    number = _number(timestamp)
    return symbol.upper(), amount, None if number is None else max(-(2**63), min(number, 2**63))


def _number(value: object) -> float | None:
    """A number, or a string that is one."""
    if isinstance(value, str):
        plain = re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", value)
        return (int(value) if value.isdigit() and len(value) <= 19 else float(value)) if plain else None
    return value if type(value) in (int, float) else None  # type: ignore[return-value]


def _amount(price: object) -> float:
    """A number that a float can hold."""
    try:
        number = _number(price)
        amount = math.inf if number is None else float(number)
    except OverflowError:
        amount = math.inf
    if math.isinf(amount):
        raise _Bad("bad_price")
    return amount


def _fields(line: bytes) -> dict[str, Any]:
    def no_json(_: str) -> NoReturn:
        raise ValueError("NaN and Infinity are no JSON")

    def text_alone(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        json.dumps(pairs, ensure_ascii=False).encode()  # a lone surrogate is no text, nor where a later key hides it
        return dict(pairs)

    try:
        value = json.loads(line.decode(), parse_constant=no_json, object_pairs_hook=text_alone)
    except (ValueError, RecursionError):
        raise _Bad("malformed") from None
    if not isinstance(value, dict):
        raise _Bad("malformed")
    return value


# The real one


def decoded(stream: bytes, cuts: Iterable[int] = ()) -> Decoded:
    """What framer and decoder make of a stream that comes in pieces."""
    received = count(NOW_MS * 1_000_000, 10_000)  # within one millisecond, so that cuts make no difference
    decoder = Decoder(Mode.LIVE, "exchange1", SYMBOLS, lambda: next(received), SKEW_MS, lambda *_: None)
    framer = Framer(lambda: decoder.reject("too_long", "unfinished"))
    candles: Candles = {}
    ends = sorted({*cuts, len(stream)})
    for begin, end in pairwise([0, *ends]):
        if lines := framer.push(stream[begin:end]):
            merge_into(candles, decoder.decode(lines))
        assert len(framer._tail) <= MAX_LINE_BYTES
    return Decoded(candles, decoder.ticks, decoder.timestamps_replaced, decoder.rejected)


def assert_as_plain(stream: bytes, cuts: Iterable[int] = ()) -> None:
    got, expected = decoded(stream, cuts), reference(stream)
    assert got.rejected == expected.rejected
    assert (got.ticks, got.replaced) == (expected.ticks, expected.replaced)
    assert_same(_unnumbered(got.candles), _unnumbered(expected.candles))


def _unnumbered(candles: Candles) -> Candles:
    """Which of two ticks came first shows in open and close; their numbers are the clock's."""
    return {
        slot: msgspec.structs.replace(candle, first_sequence=0, last_sequence=0) for slot, candle in candles.items()
    }


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_hostile_stream_decodes_as_by_the_reference_at_any_cut(path: Path) -> None:
    stream = path.read_bytes()
    assert_as_plain(stream)
    for cut in range(0, len(stream), max(1, len(stream) // 400)):
        assert_as_plain(stream, [cut])
    assert_as_plain(stream, range(0, len(stream), max(1, len(stream) // 700)))


@pytest.mark.parametrize("length", [MAX_LINE_BYTES - 1, MAX_LINE_BYTES, MAX_LINE_BYTES + 1, 3 * MAX_LINE_BYTES])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
@pytest.mark.parametrize("filling", [b"y", b" ", b"["])
def test_a_long_line_is_the_same_wherever_it_is_cut(length: int, end: bytes, filling: bytes) -> None:
    good = b'{"symbol":"BTCUSDT","price":1}\n'
    line = LONG % (filling * length)
    stream = good + line[: length - 2] + b'"}' + end + good if filling == b"y" else good + filling * length + end + good
    assert_as_plain(stream)
    for cut in (1, 40, MAX_LINE_BYTES, MAX_LINE_BYTES + len(good), MAX_LINE_BYTES + len(good) + 1, len(stream) - 40):
        assert_as_plain(stream, [cut])
    assert_as_plain(stream, range(0, len(stream), 1000))


# Chance


def mutant(random: Random, streams: list[bytes]) -> bytes:
    """A stream with a few accidents."""
    stream = random.choice(streams)
    for _ in range(random.choice((1, 1, 2, 5))):
        begin, end = sorted(random.randrange(len(stream) + 1) for _ in range(2))
        match random.randrange(7):
            case 0 if stream:
                stream = _with_byte(stream, random.randrange(len(stream)), random.randrange(256))
            case 1:
                stream = stream[:begin] + random.choice(TOKENS) + stream[begin:]
            case 2:
                stream = stream[:begin] + random.choice(TOKENS) + stream[begin + random.randrange(1, 4) :]
            case 3:
                stream = stream[:begin] + stream[min(end, begin + 30) :]
            case 4:
                stream = stream[:end] + stream[begin : min(end, begin + 100)] + stream[end:]
            case 5:
                other = random.choice(streams)
                stream = stream[:begin] + other[random.randrange(len(other) + 1) :]
            case _:
                lines = stream.split(b"\n")
                random.shuffle(lines)
                stream = b"\n".join(lines)
    return stream


def _with_byte(stream: bytes, at: int, byte: int) -> bytes:
    return stream[:at] + bytes([byte]) + stream[at + 1 :]


@pytest.mark.parametrize("seed", seeds(10))
def test_streams_made_by_chance_are_decoded_as_by_the_plain_decoder(seed: int) -> None:
    random = Random(seed)
    streams = [path.read_bytes() for path in CORPUS]
    for _ in range(MUTANTS_A_SEED):
        stream = mutant(random, streams)
        cuts = [random.randrange(len(stream) + 1) for _ in range(random.choice((0, 1, 1, 3, 20)))]
        try:
            assert_as_plain(stream, cuts)
        except Exception:
            print(f"cut at {cuts}: {stream!r}\nagain: SEED={seed} pytest {__file__}")
            raise
