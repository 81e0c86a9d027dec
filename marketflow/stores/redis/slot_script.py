"""Writes slots to sorted sets by a Lua script; written for Redis 6.2."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec
import redis

from marketflow.clock import Clock, milliseconds
from marketflow.model import Candle, Candles, Series, Slot, minute_start
from marketflow.stores.redis import codec, keys

_SLOTS_A_CALL = 250  # a few milliseconds of the server, in which it answers nobody else

MANY_SLOTS = 4 * _SLOTS_A_CALL
"""Slots of one bucket of a cluster that are a refill: 15,000 series at a tick a second have a hundred in each write."""

REST = 1.0
"""Pause between the calls of a refill as a multiple of the time that one takes. A master that has failed over is
refilled while all other buckets are in use: without pauses, writing a minute of slices and reading them from their
channel took all of two cores, and prices of the other buckets came 0.4 s late.
"""

# One script for all series of a write: no reader meets a slot between its old and its new version, and every change is
# published. Of two versions of a slot the more complete one stays, the later one of two that are as complete; so order,
# repetition and the number of writers do not matter.
PUT_SLOTS = """
local function completeness_of(member)
    local ok, candle = pcall(cjson.decode, member)
    if not ok or type(candle) ~= 'table' then return 0 end
    if #candle <= 5 then return 1.5 end  -- a tick, see codec
    -- An invalid member, which every reader skips, must not keep the right version out.
    for i = 1, 5 do
        local price = candle[i]
        if type(price) ~= 'number' or price ~= price or math.abs(price) == math.huge then return 0 end
    end
    local ticks = candle[6]
    if type(ticks) ~= 'number' or ticks ~= math.floor(ticks) or ticks < 0 or ticks > 2^53 then return 0 end
    return candle[15] == 'venue' and ticks or ticks + 0.5
end
local at = 4
for _, key in ipairs(KEYS) do
    local count, oldest = tonumber(ARGV[at]), ARGV[at + 1]
    local trims = oldest ~= ''
    local expires = trims
    at = at + 2
    for _ = 1, count do
        local start, completeness, member = ARGV[at], tonumber(ARGV[at + 1]), ARGV[at + 2]
        at = at + 3
        local held, most = redis.call('zrangebyscore', key, start, start), -1
        for _, other in ipairs(held) do most = math.max(most, completeness_of(other)) end
        if most <= completeness then
            if #held > 0 then
                redis.call('zremrangebyscore', key, start, start)
                expires = true  -- a key that loses its last member loses its expiry
            end
            redis.call('zadd', key, start, member)
        end
    end
    if trims then redis.call('zremrangebyscore', key, '-inf', '(' .. oldest) end
    if expires then redis.call('pexpire', key, ARGV[1]) end
end
redis.call('PUBLISH', ARGV[2], ARGV[3])
"""
"""Write slots of several sorted sets.

KEYS: the sorted sets. ARGV: expiry (ms), channel, message; then for each key the number of its slots, the start of the
oldest slot to keep (empty: do not trim now), and each slot as start, completeness (`Candle.completeness`), member.
"""


class SlotScript:
    """Writes, trims and publishes the slots of one kind of sorted set; for any number of threads.

    Args:
        key_of: gives the key of a series.
        kept_ms: how far back slots are kept.
        channel: where they are published.
        clock: the time by which they are trimmed.
        publish: the command that publishes.
        rest: pause between the calls of a large write, as a multiple of the time that one takes.
    """

    def __init__(
        self,
        key_of: Callable[[Series], str],
        kept_ms: int,
        channel: str,
        clock: Clock,
        publish: str = "PUBLISH",
        rest: float = 0.0,
    ) -> None:
        self._key_of = key_of
        self._kept_ms = kept_ms
        self._channel = channel
        self._clock = clock
        self._rest = rest
        self._script = PUT_SLOTS.replace("PUBLISH", publish)
        self._keys: dict[Series, str] = {}
        self._trimmed_to: dict[str, int] = {}  # by key

    def renew_expiry(self) -> None:
        """Trim every key at its next write, which sets its expiry as well: Redis may have been emptied."""
        self._trimmed_to = {}

    def put(self, client: "redis.Redis", slots: Candles, untrimmed: Mapping[Series, Iterable[int]] = {}) -> None:
        """Write slots.

        Args:
            client: to be used.
            slots: whole slices or minutes.
            untrimmed: starts of minutes that are to be kept, however old.

        Raises:
            redis.RedisError: not all are written.
        """
        entries = list(slots.items())
        # Whole minutes are trimmed: a recovery would take what is left of one for the whole minute.
        oldest = minute_start(milliseconds(self._clock())) - self._kept_ms
        rest = self._rest if len(entries) > MANY_SLOTS else 0.0
        for begin in range(0, len(entries), _SLOTS_A_CALL):
            began = time.monotonic()
            self._call(client, entries[begin : begin + _SLOTS_A_CALL], oldest, untrimmed)
            if rest:
                time.sleep(rest * (time.monotonic() - began))

    def _call(
        self,
        client: "redis.Redis",
        entries: Sequence[tuple[Slot, Candle]],
        oldest: int,
        untrimmed: Mapping[Series, Iterable[int]],
    ) -> None:
        by_series: dict[Series, list[str | bytes]] = {}
        published: list[tuple[Slot, msgspec.Raw]] = []
        within: set[Series] = set()
        for slot, candle in entries:
            series, start = slot
            member = codec.encode_candle(candle)
            published.append((slot, msgspec.Raw(member)))
            # Texts, which hiredis packs twice as fast as numbers.
            texts = (str(start), _completeness(candle), member)
            if (slots := by_series.get(series)) is None:
                by_series[series] = [*texts]
            else:
                slots += texts
            if start >= oldest:
                within.add(series)
        trimmed: dict[str, int] = {}
        trimmed_to = self._trimmed_to
        names: list[str] = []
        arguments: list[str | bytes] = [str(keys.EXPIRY_MS), self._channel, codec.encode_announcement(published)]
        for series, slots in by_series.items():
            names.append(key := self._key(series))
            # Once a minute: trimming costs as much as writing a slot.
            due = trimmed_to.get(key) != oldest
            kept = min((oldest, *untrimmed.get(series, ()))) if untrimmed else oldest
            arguments += (str(len(slots) // 3), str(kept) if due else "", *slots)
            if due and series in within:
                trimmed[key] = oldest
        # The text each time: a restarted server knows no script by its hash.
        client.eval(self._script, len(names), *names, *arguments)
        trimmed_to |= trimmed

    def _key(self, series: Series) -> str:
        if (key := self._keys.get(series)) is None:
            key = self._keys[series] = self._key_of(series)
        return key


def _completeness(candle: Candle) -> str:
    """`Candle.completeness` as text, in a quarter of the time that a float takes."""
    return f"{candle.ticks}.5" if candle.source == "ticks" else f"{candle.ticks}"
