"""The cache in Redis, as the flow writes it from its threads.

The server's answer may get lost after it has done the work, so every command is absolute and repeating it changes
nothing; there is no INCR and no RPUSH, and no hidden retry. Timeouts are short, and after a failure a circuit breaker
answers for Redis until a probe gets through: a Redis that is away costs the flow one timeout each half second. What
was not written meanwhile is not queued; memory has it all, and refills the cache on its return. A process that is
killed before that takes with it what memory alone had: the ticks since then of minutes that were still open.
PostgreSQL has the rest.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast
from uuid import uuid4

import msgspec
import redis
from loguru import logger
from redis.client import Pipeline

from marketflow.clock import Clock, milliseconds
from marketflow.errors import Unavailable
from marketflow.logs import Outage
from marketflow.model import MINUTE_MS, Candle, Candles, Series, Slot, Tick, minute_start
from marketflow.stores.circuit_breaker import CircuitBreaker
from marketflow.stores.ports import MINUTES_KEPT_MS, SLICES_HELD, RecoveredCandles
from marketflow.stores.redis import keys
from marketflow.stores.redis.connection import sync_client
from marketflow.stores.redis.slice_folding import candles, minutes_of_window, slices_of

_CHUNK = 1000  # slots a script: what the server does in a few milliseconds
_SERIES_A_READ = 50  # whose windows, of up to 4200 slices each, are read at once
_ALIVE_SECONDS = 3600

EXPIRY_TOLD_PARTS = 10
"""A newest price is told to expire anew after this part of its time, and may go as much too early."""

INDEX_MS = 5 * MINUTE_MS
"""How often the index of the series is written anew: it says how long ago one was configured, in days."""


# Of a slot the version with more ticks stays, the later one of two with as many: so it does not matter in which order,
# how often and by how many processes it is written. One script for all series, so that no reader meets a slot between
# its old version and its new one, and every change is announced. Written for Redis 6.2.
#
# ARGV: expiry (ms), channel, announcement; then for each of KEYS the number of its slots, the start of the oldest slot
# to keep where older ones are to be trimmed now (else empty), and each slot as start, ticks, member.
_PUT_SLOTS = """
local function ticks_of(member)
    local ok, candle = pcall(cjson.decode, member)
    if not ok or type(candle) ~= 'table' then return 0 end
    if #candle == 3 then return 1 end
    -- What no reader would believe must not keep the right version out.
    for i = 1, 5 do
        local price = candle[i]
        if type(price) ~= 'number' or price ~= price or math.abs(price) == math.huge then return 0 end
    end
    local ticks = candle[6]
    if type(ticks) ~= 'number' or ticks ~= math.floor(ticks) or ticks < 1 or ticks > 2^53 then return 0 end
    return ticks
end
local at = 4
for _, key in ipairs(KEYS) do
    local count, oldest = tonumber(ARGV[at]), ARGV[at + 1]
    local trims = oldest ~= ''
    local expires = trims
    at = at + 2
    for _ = 1, count do
        local start, ticks, member = ARGV[at], tonumber(ARGV[at + 1]), ARGV[at + 2]
        at = at + 3
        local held, most = redis.call('zrangebyscore', key, start, start), -1
        for _, other in ipairs(held) do most = math.max(most, ticks_of(other)) end
        if most <= ticks then
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
redis.call('publish', ARGV[2], ARGV[3])
"""


def _left(windows: "Iterable[tuple[Series, list[bytes]]]") -> RecoveredCandles:
    return RecoveredCandles(
        {
            Slot(series, start): candle
            for series, members in windows
            for start, candle in slices_of(candles(members)).items()
        }
    )


class RedisWriter:
    """What the flow writes.

    Args:
        client: shared by all threads.
        series: all series there can be.
        clock: the time by which old slots are trimmed.
        ttl_seconds: how long a newest price outlives its tick.
        circuit_breaker: stops asking while Redis is away.
        db: the number of the database that the client uses.
    """

    def __init__(
        self,
        client: "redis.Redis",
        series: Iterable[Series],
        clock: Clock,
        ttl_seconds: int,
        circuit_breaker: CircuitBreaker | None = None,
        db: int = 0,
    ) -> None:
        self._client = client
        self._series = list(series)
        self._indexed_at: int | None = None
        self._expiry_told: dict[Series, int] = {}  # when each newest price was last told to expire (Unix ms)
        self._kept_since: dict[str, int] = {}  # what each key was last trimmed to, and then told when to expire
        self._index = [keys.encode_series(each) for each in self._series]
        self._clock = clock
        self._ttl_ms = ttl_seconds * 1000
        self._circuit_breaker = circuit_breaker or CircuitBreaker()
        self._db = db
        self._run_key = keys.run_key(uuid4().hex)
        self._recovered = False
        self._backlog_read = False
        self._unstored: dict[Series, set[int]] = {}  # recovered minutes (starts) that are nowhere but in their slices
        self._lacking = False  # set by whatever fails, on any thread; cleared by the probe alone
        self._whole = False  # what the last probe found
        self._outage = Outage("Redis cannot be used", "Redis can be used again")
        self._closed = False
        self._may_ask_types = True

    @classmethod
    def connect(
        cls,
        keywords: dict[str, Any],
        series: Iterable[Series],
        clock: Clock,
        ttl_seconds: int,
        max_connections: int = 100,
    ) -> "RedisWriter":
        """A cache with a client of its own, which connects when first used; a connection for each thread."""
        client = sync_client(keywords, max_connections=max_connections)
        return cls(client, series, clock, ttl_seconds, db=keywords.get("db", 0))

    @property
    def complete(self) -> bool:
        """Whether the cache has all that was written to it. While it has not, memory is the better answer."""
        return self._whole and not self._lacking

    def close(self) -> None:
        """Close all connections, also under calls that are under way; they end as Unavailable."""
        self._closed = True
        self._client.close()

    # Cache

    def put_newest(self, newest: dict[Series, Tick]) -> None:
        """Store the newest tick of each series, for as long as a newest price may be shown from here."""
        # Now and then is often enough to tell of the expiry, which costs as much as the price itself.
        now_ms = milliseconds(self._clock())
        told = self._expiry_told
        due = {each for each in newest if abs(now_ms - told.get(each, 0)) >= self._ttl_ms // EXPIRY_TOLD_PARTS}
        # A transaction where one is told, so that no price is ever left without its expiry.
        with self._writing(), self._client.pipeline(transaction=bool(due)) as pipe:
            for series, tick in newest.items():
                key = keys.latest_key(series)
                fields: dict[Any, Any] = {
                    "price": repr(tick.price),
                    "timestamp": tick.at,
                    "received": milliseconds(tick.sequence),
                    "sequence": tick.sequence,
                }
                pipe.hset(key, mapping=fields)
                if series in due:
                    pipe.pexpire(key, self._ttl_ms)
            pipe.publish(keys.channel(keys.NEWEST_CHANNEL, self._db), keys.encode_announcement(list(newest.items())))
            pipe.execute()
        told |= dict.fromkeys(due, now_ms)

    def put_slices(self, slices: Candles) -> None:
        """Store whole slices and trim the minutes that are older than the window.

        A series is trimmed up to its oldest recovered minute that is not stored: until it is, slices, however old, are
        all that there is of it.
        """
        self._put_slots(slices, keys.window_key, keys.WINDOW_KEPT_MS, keys.SLICES_CHANNEL, self._unstored)

    def put_minutes(self, minutes: Candles) -> None:
        """Store closed minutes and trim what is older than a day."""
        self._put_slots(minutes, keys.minutes_key, keys.MINUTES_TRIMMED_MS, keys.MINUTES_CHANNEL)
        self.note_stored(minutes)

    def note_stored(self, minutes: Iterable[Slot]) -> None:
        """Allow the slices of recovered minutes to be trimmed: the minutes are stored, here or in the archive."""
        if not self._unstored:
            return
        for series, start in minutes:
            if (starts := self._unstored.get(series)) is not None:
                starts.discard(start)
                if not starts:
                    self._unstored.pop(series, None)  # two threads may come to this

    def recover(self, minute_ms: int = MINUTE_MS) -> RecoveredCandles:
        """What the run before left of the last minutes. Nothing is written before this has succeeded.

        Otherwise a recovery that comes late, when Redis was away at the start, would count this run's ticks twice.
        """
        with self._asking():
            self._remove_foreign()
            series = self._known_series()
            # A run that died before it noticed that Redis had been emptied may have left keys that never expire.
            for key_of in (keys.window_key, keys.minutes_key):
                deque(self._each(series, key_of, lambda pipe, key: pipe.pexpire(key, keys.EXPIRY_MS)), maxlen=0)
            found = sum(count for _, count in self._each(series, keys.window_key, lambda pipe, key: pipe.zcard(key)))
            windows = self._each(series, keys.window_key, lambda pipe, key: pipe.zrange(key, 0, -1))
            left = self._folded(windows, minute_ms) if found > SLICES_HELD else _left(windows)
        self._mark_alive()
        unstored: defaultdict[Series, set[int]] = defaultdict(set)
        for each, start in (*left.slices, *left.minutes):
            unstored[each].add(minute_start(start, minute_ms))
        self._unstored = dict(unstored)
        self._recovered = True
        self._whole = True
        if found:
            logger.info("recovered {} slices of the last minutes from Redis", found)
        return left

    def _folded(self, windows: "Iterable[tuple[Series, list[bytes]]]", minute_ms: int) -> RecoveredCandles:
        minutes = {
            Slot(series, start): candle
            for series, members in windows
            for start, candle in minutes_of_window(members, minute_ms).items()
        }
        return RecoveredCandles({}, minutes, whole_from=milliseconds(self._clock()))

    def slices_between(self, since: int, until: int) -> Candles:
        """The slices that begin at or after `since` and before `until` (Unix ms), whichever process wrote them.

        Empty where they are more than may be held: they are read for what little one process may lack.

        Raises:
            Unavailable: Redis cannot be asked now.
        """
        until -= 1
        with self._asking():
            counts = self._each(self._series, keys.window_key, lambda pipe, key: pipe.zcount(key, since, until))
            if sum(count for _, count in counts) > SLICES_HELD:
                return {}
            found = self._each(
                self._series, keys.window_key, lambda pipe, key: pipe.zrangebyscore(key, since, until, withscores=True)
            )
            return {
                Slot(series, start): candle
                for series, entries in found
                for start, candle in keys.decode_slots(entries).items()
            }

    def unarchived(self) -> Candles:
        """The closed minutes from that one on before which all are known to be archived."""
        with self._asking():
            until = self._client.get(keys.ARCHIVED_KEY)
        now_ms = milliseconds(self._clock())
        oldest = minute_start(now_ms) - MINUTES_KEPT_MS
        since = keys.decode_start(cast("bytes | None", until))
        # A mark ahead of the clock is from before it was set back, and says nothing about the minutes until then.
        first = oldest if since > now_ms else max(since, oldest)
        with self._asking():
            found = self._each(
                self._known_series(),
                keys.minutes_key,
                lambda pipe, key: pipe.zrangebyscore(key, first, "+inf", withscores=True),
            )
            minutes = {
                Slot(series, start): candle
                for series, entries in found
                for start, candle in keys.decode_slots(entries).items()
            }
        self._backlog_read = True
        return minutes

    def mark_archived(self, until: int) -> None:
        """Remember before which minute the archive is complete, once the backlog of the run before has been read."""
        if self._backlog_read:
            with self._writing():
                self._client.set(keys.ARCHIVED_KEY, until, px=MINUTES_KEPT_MS)

    def needs_refill(self) -> bool:
        """Probe Redis: True when it answers and may lack what was written, because a call failed or it was emptied.

        A probe that fails counts as well: it may have set the key of this run, and hidden that the key was gone.
        """
        if not self._recovered:
            return False
        try:
            alive = self._probe()
        except Unavailable:
            return False
        self._whole = alive and not self._lacking
        if not self._whole:
            with suppress(Unavailable), self._asking():
                self._remove_foreign()
            self._lacking = False
            self._expiry_told, self._kept_since = {}, {}
        return not self._whole

    def _probe(self) -> bool:
        """Whether this run's own key is there, and with it all that was written before."""
        with self._asking(), self._client.pipeline(transaction=False) as pipe:
            pipe.expire(self._run_key, _ALIVE_SECONDS)
            pipe.pexpire(keys.SERIES_KEY, keys.EXPIRY_MS)
            alive, indexed = pipe.execute()
        due = self._indexed_at is None or abs(milliseconds(self._clock()) - self._indexed_at) >= INDEX_MS
        if not alive or not indexed or due:
            self._mark_alive()
        return bool(alive)

    def _mark_alive(self) -> None:
        """Set this run's own key and tell of its series, as long as any of them may be found here."""
        now_ms = milliseconds(self._clock())
        self._indexed_at = None
        with self._asking(), self._client.pipeline(transaction=True) as pipe:
            pipe.set(self._run_key, 1, ex=_ALIVE_SECONDS)
            pipe.zadd(keys.SERIES_KEY, dict.fromkeys(self._index, now_ms))
            pipe.zremrangebyscore(keys.SERIES_KEY, "-inf", now_ms - keys.EXPIRY_MS)
            pipe.pexpire(keys.SERIES_KEY, keys.EXPIRY_MS)
            pipe.execute()
        self._indexed_at = now_ms

    def _put_slots(
        self,
        slots: Candles,
        key_of: Callable[[Series], str],
        kept_ms: int,
        channel: str,
        untrimmed: Mapping[Series, Iterable[int]] = {},
    ) -> None:
        entries = list(slots.items())
        # Whole minutes go: of a minute that is cut, a recovery would make a poorer candle than there was.
        oldest = minute_start(milliseconds(self._clock())) - kept_ms
        with self._writing():
            for begin in range(0, len(entries), _CHUNK):
                self._put_chunk(entries[begin : begin + _CHUNK], key_of, oldest, channel, untrimmed)

    def _put_chunk(
        self,
        entries: list[tuple[Slot, Candle]],
        key_of: Callable[[Series], str],
        oldest: int,
        channel: str,
        untrimmed: Mapping[Series, Iterable[int]],
    ) -> None:
        by_series: defaultdict[Series, list[object]] = defaultdict(list)
        announced: list[tuple[Slot, msgspec.Raw]] = []
        within: set[Series] = set()
        for slot, candle in entries:
            member = keys.encode_candle(candle)
            by_series[slot.series] += (slot.start, candle.ticks, member)
            announced.append((slot, msgspec.Raw(member)))
            if slot.start >= oldest:
                within.add(slot.series)
        trimmed: dict[str, int] = {}
        kept_since = self._kept_since
        names: list[str] = []
        announcement = keys.encode_announcement(announced)
        arguments: list[object] = [keys.EXPIRY_MS, keys.channel(channel, self._db), announcement]
        for series, slots in by_series.items():
            names.append(key := key_of(series))
            # Once a minute, for each command costs as much as writing a slot.
            due = kept_since.get(key) != oldest
            kept = min((oldest, *untrimmed.get(series, ()))) if untrimmed else oldest
            arguments += (len(slots) // 3, kept if due else "", *slots)
            if due and series in within:
                trimmed[key] = oldest
        # As text each time: a server that was restarted knows no script by its hash.
        self._client.eval(_PUT_SLOTS, len(names), *names, *arguments)  # type: ignore[arg-type]
        kept_since |= trimmed

    def _known_series(self) -> list[Series]:
        """All series of which something may be here, those that were removed from the settings included."""
        entries = self._client.zrange(keys.SERIES_KEY, 0, -1, withscores=True)
        written = keys.decode_series(cast("list[tuple[bytes, float]]", entries))
        return list(set(self._series) | written)

    def _remove_foreign(self) -> None:
        """Remove keys of another type than the one written: other clients have put them there, and no command works.

        Without the right to TYPE, as by the ACL of an earlier version, they stay.
        """
        if not self._may_ask_types:
            return
        try:
            self._remove_of_other_types()
        except redis.exceptions.NoPermissionError as error:
            self._may_ask_types = False
            logger.warning("Redis: keys of other types are not removed; permit TYPE to the user: {}", error)

    def _remove_of_other_types(self) -> None:
        fixed = {keys.SERIES_KEY: b"zset", keys.ARCHIVED_KEY: b"string"}
        self._remove([key for key, kind in fixed.items() if self._client.type(key) not in (kind, b"none")])
        series = self._known_series()
        for key_of, kind in ((keys.latest_key, b"hash"), (keys.window_key, b"zset"), (keys.minutes_key, b"zset")):
            found = self._each(series, key_of, lambda pipe, key: pipe.type(key))
            self._remove([key_of(each) for each, answer in found if answer not in (kind, b"none")])

    def _remove(self, foreign: list[str]) -> None:
        if foreign:
            self._client.delete(*foreign)
            logger.warning("removed keys from Redis that are not of the type MarketFlow writes: {}", ", ".join(foreign))

    def _each(
        self, series: Sequence[Series], key_of: Callable[[Series], str], command: "Callable[[Pipeline, str], object]"
    ) -> Iterator[tuple[Series, Any]]:
        """The answers to a command about each series, a few at a time."""
        for begin in range(0, len(series), _SERIES_A_READ):
            some = series[begin : begin + _SERIES_A_READ]
            with self._client.pipeline(transaction=False) as pipe:
                for each in some:
                    command(pipe, key_of(each))
                yield from zip(some, pipe.execute(), strict=True)

    # Failures

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A write, once it is known what an earlier run left."""
        if not self._recovered:
            self._lacking = True
            raise Unavailable("Redis has not yet been asked what an earlier run left")
        with self._asking():
            yield

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """A call: any error of Redis becomes Unavailable and opens the circuit breaker.

        One that fails, or may not be tried, leaves the cache incomplete.
        """
        try:
            self._circuit_breaker.check()
            yield
        except redis.RedisError as error:
            self._lacking = True
            self._circuit_breaker.failed()
            self._outage.failed("cache", f"memory answers meanwhile: {_reason(error)}")
            raise Unavailable(f"Redis cannot be used: {error}") from error
        except BaseException as error:
            self._lacking = True
            if self._closed:  # by another thread, and what then goes wrong in the client is nobody's fault
                raise Unavailable("the cache is closed") from error
            raise
        self._circuit_breaker.succeeded()
        self._outage.over("cache")


_OF_A_CLUSTER = (
    redis.exceptions.AskError,
    redis.exceptions.MovedError,
    redis.exceptions.ClusterCrossSlotError,
    redis.exceptions.ClusterDownError,
)
"""Told apart by their type, for redis-py cuts the code off the text."""


def _reason(error: redis.RedisError) -> str:
    """What is wrong; of a node of a cluster, which refuses what another node has, what it is."""
    text = str(error)
    if isinstance(error, _OF_A_CLUSTER) or "SELECT is not allowed in cluster" in text:
        return f"it is a node of a Redis Cluster, which MarketFlow does not follow; set redis.host to another ({text})"
    return text
