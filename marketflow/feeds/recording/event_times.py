"""Moves the event times in recorded frames by whole minutes; every other byte stays as it was.

Whole minutes, so that each trade stays in its minute: candles keep their values. The times are found in the text of a
frame: decoding and encoding it again would change its numbers.
"""

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

_RFC3339_MINUTE = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d")

_UNIX = {
    "binance": re.compile(rb'"[TE]":(\d{10,19})'),
    "okx": re.compile(rb'"ts":"(\d{10,19})"'),
    "bybit": re.compile(rb'"(?:T|ts)":(\d{10,19})'),
    "": re.compile(rb'"timestamp":\s*"?(\d{10,19})'),
}
"""Numbers of seconds, ms, us or ns, which their length tells; "" are the lines of a TCP exchange."""

_RFC3339 = {
    "coinbase": re.compile(rb'"time":"([^"]+)"'),
    "kraken": re.compile(rb'"timestamp":"([^"]+)"'),
}


def mover(venue: str, minutes: int) -> Callable[[bytes], bytes]:
    """What moves the event times of a venue's frames by that many minutes."""
    pattern, moved = (_UNIX[venue], _unix) if venue in _UNIX else (_RFC3339[venue], _rfc3339)
    return lambda frame: pattern.sub(lambda match: _replaced(match, moved(match[1], minutes)), frame)


def _replaced(match: re.Match[bytes], value: bytes) -> bytes:
    before, after = match.start(1) - match.start(), match.end(1) - match.start()
    return match[0][:before] + value + match[0][after:]


def _unix(text: bytes, minutes: int) -> bytes:
    units_a_minute = 60 * 1000 ** ((len(text) - 10) // 3)
    return b"%d" % (int(text) + minutes * units_a_minute)


def _rfc3339(text: bytes, minutes: int) -> bytes:
    """Only the part up to the minute is replaced: the digits of the second stay."""
    if (match := _RFC3339_MINUTE.match(text)) is None:
        return text
    try:
        moment = datetime.fromisoformat(match[0].decode()).replace(tzinfo=UTC) + timedelta(minutes=minutes)
    except (ValueError, OverflowError):
        return text
    return moment.strftime("%Y-%m-%dT%H:%M").encode() + text[match.end() :]
