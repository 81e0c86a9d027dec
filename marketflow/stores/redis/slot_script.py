"""Writes slots to sorted sets by a Lua script; written for Redis 6.2."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import redis

from marketflow.clock import Clock, milliseconds
from marketflow.model import Candle, Candles, Series, Slot, minute_start
from marketflow.stores.redis import codec, keys

_SLOTS_A_CALL = 250  # a few milliseconds of the server, in which it runs nothing else

MANY_SLOTS = 4 * _SLOTS_A_CALL
"""Slots of one bucket of a cluster that are a refill: 15,000 series at a tick a second have a hundred in each write."""

PAUSE_FACTOR = 1.0
"""Pause between the calls of a refill as a multiple of the time that one takes. A bucket is refilled after a failover
while all others are in use: without pauses, writing a minute of slices and reading them from their channel took all of
two cores, and prices of the other buckets came 0.4 s late."""

# One script for all series of a write: no reader meets a slot between its old and its new version, and every change is
# published. Of two versions of a slot the more complete one stays, the later one of two that are as complete; so order,
# repetition and the number of writers do not matter. The number of the version never falls, as in `more_complete`.
PUT_SLOTS = """
-- Completeness, and number of the version.
local function versions_of(member)
    local ok, candle = pcall(cjson.decode, member)
    if not ok or type(candle) ~= 'table' then return 0, 1 end
    if #candle <= 5 then return 1.5, 1 end  -- a tick, see codec
    -- An invalid member, which every reader skips, must not keep the right version out.
    for i = 1, 5 do
        local price = candle[i]
        if type(price) ~= 'number' or price ~= price or math.abs(price) == math.huge then return 0, 1 end
    end
    local ticks, version = candle[6], candle[13]
    if type(ticks) ~= 'number' or ticks ~= math.floor(ticks) or ticks < 0 or ticks > 2^53 then return 0, 1 end
    if type(version) ~= 'number' or version ~= math.floor(version) or version > 2^31 then version = 1 end
    return candle[15] == 'venue' and ticks or ticks + 0.5, version
end
-- In the text, since prices that are decoded and encoded lose digits.
local BEFORE_VERSION = '^(' .. ('[^,]*,'):rep(12) .. ')(%d+)'
local function with_version(member, least)
    return (member:gsub(BEFORE_VERSION, function(before, own)
        return before .. string.format('%d', math.max(tonumber(own), least))
    end))
end
local slots, slot, at = #KEYS - tonumber(ARGV[4]), 0, 5
while slot < slots do
    local count, start, completeness = tonumber(ARGV[at]), ARGV[at + 1], tonumber(ARGV[at + 2])
    at = at + 3
    for _ = 1, count do
        slot = slot + 1
        local key, member = KEYS[slot], ARGV[at]
        at = at + 1
        local held = redis.call('zrangebyscore', key, start, start)
        if #held == 0 then
            redis.call('zadd', key, start, member)
        else
            local most, version = 0, 1
            for _, other in ipairs(held) do
                local its_completeness, its_version = versions_of(other)
                most, version = math.max(most, its_completeness), math.max(version, its_version)
            end
            if most <= completeness then
                if version > 1 then member = with_version(member, version) end
                redis.call('zremrangebyscore', key, start, start)
                redis.call('zadd', key, start, member)
                redis.call('pexpire', key, ARGV[1])  -- a key that loses its last member loses its expiry
            end
        end
    end
end
for trimmed = slots + 1, #KEYS do
    redis.call('zremrangebyscore', KEYS[trimmed], '-inf', '(' .. ARGV[at])
    redis.call('pexpire', KEYS[trimmed], ARGV[1])
    at = at + 1
end
redis.call('PUBLISH', ARGV[2], ARGV[3])
"""
"""Write slots of several sorted sets.

KEYS: the sorted set of each slot, then those that are trimmed afterwards. ARGV: expiry (ms), channel, message, number
of those that are trimmed; then the slots, in groups of those that begin at the same time and are as complete: their
number, start and completeness (`Candle.completeness`), and the member of each; then of each that is trimmed the start
of the oldest slot to keep.

In groups, since each argument costs as much as the JSON of a slot: of many series most are in the same one.
"""


class SlotScript:
    """Writes, trims and publishes the slots of one kind of sorted set; for any number of threads.

    Args:
        key_of: returns the key of a series.
        kept_ms: how far back slots are kept.
        channel: where they are published.
        clock: the time by which they are trimmed.
        publish: the command that publishes.
        pause_factor: pause between the calls of a large write, as a multiple of the time that one takes.
    """

    def __init__(
        self,
        key_of: Callable[[Series], str],
        kept_ms: int,
        channel: str,
        clock: Clock,
        publish: str = "PUBLISH",
        pause_factor: float = 0.0,
    ) -> None:
        self._key_of = key_of
        self._kept_ms = kept_ms
        self._channel = channel
        self._clock = clock
        self._pause_factor = pause_factor
        self._script = PUT_SLOTS.replace("PUBLISH", publish)
        self._keys = codec.WrittenKeys(key_of)

    def renew_expiry(self) -> None:
        """Trim every key at its next write, which sets its expiry as well: Redis may have been emptied."""
        self._keys = codec.WrittenKeys(self._key_of)  # new ones: writes under way change the former

    def put(
        self,
        client: "redis.Redis",
        slots: Candles,
        untrimmed: Mapping[Series, Iterable[int]] = {},
        on_written: Callable[[Sequence[tuple[Slot, Candle]]], None] | None = None,
    ) -> None:
        """Write slots, in their order.

        Args:
            client: of Redis.
            slots: whole slices or minutes.
            untrimmed: starts of minutes that are to be kept, however old.
            on_written: called with the slots of each call that Redis has confirmed.

        Raises:
            redis.RedisError: not all are written.
        """
        entries = list(slots.items())
        # Whole minutes are trimmed: a recovery would take what is left of one for the whole minute.
        oldest = minute_start(milliseconds(self._clock())) - self._kept_ms
        pause_factor = self._pause_factor if len(entries) > MANY_SLOTS else 0.0
        for begin in range(0, len(entries), _SLOTS_A_CALL):
            began = time.monotonic()
            some = entries[begin : begin + _SLOTS_A_CALL]
            self._call(client, some, oldest, untrimmed)
            if on_written is not None:
                on_written(some)
            if pause_factor:
                time.sleep(pause_factor * (time.monotonic() - began))

    def _call(
        self,
        client: "redis.Redis",
        entries: Sequence[tuple[Slot, Candle]],
        oldest: int,
        untrimmed: Mapping[Series, Iterable[int]],
    ) -> None:
        groups: dict[tuple[int, int, str], _Group] = {}
        published: list[bytes] = []
        kept: dict[bytes, int] = {}  # the start of the oldest slot to keep, of each key that is trimmed
        trimmed: list[codec.WrittenKey] = []
        written_keys = self._keys
        for (series, start), candle in entries:
            key = written_keys[series]
            member = codec.encode_candle(candle)
            if (group := groups.get(kind := (start, candle.ticks, candle.source))) is None:
                group = groups[kind] = _Group([], [], b"%d" % start, candle.completeness)
            group.keys.append(key.key)
            group.members.append(member)
            published.append(b"[[%b,%b],%b]" % (key.series, group.start, member))
            if key.renewed_at != oldest:  # once a minute: trimming costs as much as writing a slot
                kept[key.key] = min((oldest, *untrimmed.get(series, ())))
                if start >= oldest:
                    trimmed.append(key)
        names = [*chain.from_iterable(group.keys for group in groups.values()), *kept]
        arguments: list[bytes | str | float] = [keys.EXPIRY_MS, self._channel, codec.announcement(published), len(kept)]
        for group in groups.values():
            arguments += (len(group.keys), group.start, group.completeness, *group.members)
        # The text each time: a restarted server knows no script by its hash.
        client.eval(self._script, len(names), *names, *arguments, *kept.values())
        for key in trimmed:
            key.renewed_at = oldest


class _Group(NamedTuple):
    """Slots with the same start (as text) and completeness."""

    keys: list[bytes]
    members: list[bytes]
    start: bytes
    completeness: float
