"""The cache in Redis, as the flow writes it from its threads.

The server's answer may get lost after it has done the work, so every command is absolute and repeating it changes
nothing; there is no INCR and no RPUSH, and no hidden retry. Timeouts are short, and after a failure a breaker answers
for Redis until a probe gets through: a Redis that is away costs the flow one timeout each half second. What was not
written meanwhile is not queued; memory has it all, and refills the cache on its return. A process that is killed before
that takes with it what memory alone had: the ticks since then of minutes that were still open. PostgreSQL has the rest.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast
from uuid import uuid4

import msgspec
import redis
from loguru import logger
from redis.backoff import NoBackoff

from marketflow.clock import Clock, milliseconds
from marketflow.errors import Unavailable
from marketflow.logs import RateLimit
from marketflow.model import Candle, Candles, Series, Slot, Tick, minute_start
from marketflow.stores import keys
from marketflow.stores.breaker import Breaker
from marketflow.stores.ports import MINUTES_KEPT_MS

TIMEOUT_SECONDS = 0.25
_CHUNK = 1000  # slots a transaction: what the server does in a few milliseconds
_ALIVE_SECONDS = 3600


def connection_keywords(host: str, port: int, password: str, db: int) -> dict[str, Any]:
    """Keywords for a client of either kind; a `host` that begins with / is the path of a Unix socket."""
    place = {"unix_socket_path": host} if host.startswith("/") else {"host": host, "port": port}
    return {**place, "password": password or None, "db": db}


class RedisCache:
    """What the flow writes.

    Args:
        client: shared by all threads.
        series: all series there can be.
        clock: the time by which old slots are trimmed.
        ttl_seconds: how long a newest price outlives its tick.
        breaker: stops asking while Redis is away.
    """

    def __init__(
        self,
        client: "redis.Redis",
        series: Iterable[Series],
        clock: Clock,
        ttl_seconds: int,
        breaker: Breaker | None = None,
    ) -> None:
        self._client = client
        self._series = list(series)
        self._index = [keys.encode_series(each) for each in self._series]
        self._clock = clock
        self._ttl_ms = ttl_seconds * 1000
        self._breaker = breaker or Breaker()
        self._limit = RateLimit(10.0)
        self._run_key = keys.run_key(uuid4().hex)
        self._recovered = False
        self._backlog_read = False
        self._lacking = False  # set by whatever fails, on any thread; cleared by the probe alone
        self._whole = False  # what the last probe found
        self._away = False

    @classmethod
    def connect(
        cls, keywords: dict[str, Any], series: Iterable[Series], clock: Clock, ttl_seconds: int
    ) -> "RedisCache":
        """A cache with a client of its own, which connects when first used."""
        client = redis.Redis(
            **keywords,
            socket_timeout=TIMEOUT_SECONDS,
            socket_connect_timeout=TIMEOUT_SECONDS,
            retry=redis.retry.Retry(NoBackoff(), 0),
        )
        return cls(client, series, clock, ttl_seconds)

    @property
    def complete(self) -> bool:
        """Whether the cache has all that was written to it. While it has not, memory is the better answer."""
        return self._whole and not self._lacking

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    # Cache

    def put_newest(self, newest: dict[Series, Tick]) -> None:
        """Store the newest tick of each series, for as long as a newest price may be shown from here."""
        # A transaction, so that no price is ever left without its expiry.
        with self._writing(), self._client.pipeline(transaction=True) as pipe:
            for series, tick in newest.items():
                key = keys.latest_key(series)
                fields: dict[Any, Any] = {
                    "price": repr(tick.price),
                    "timestamp": tick.at,
                    "received": milliseconds(tick.sequence),
                    "sequence": tick.sequence,
                }
                pipe.hset(key, mapping=fields)
                pipe.pexpire(key, self._ttl_ms)
            pipe.publish(keys.NEWEST_CHANNEL, keys.encode_announcement(list(newest.items())))
            pipe.execute()

    def put_slices(self, slices: Candles) -> None:
        """Store whole slices and trim the minutes that are older than the window."""
        self._put_slots(slices, keys.window_key, keys.WINDOW_KEPT_MS, keys.SLICES_CHANNEL)

    def put_minutes(self, minutes: Candles) -> None:
        """Store closed minutes and trim what is older than a day."""
        self._put_slots(minutes, keys.minutes_key, keys.MINUTES_TRIMMED_MS, keys.MINUTES_CHANNEL)

    def recover(self) -> Candles:
        """The slices of the last minutes of the run before. Nothing is written before this has succeeded.

        Otherwise a recovery that comes late, when Redis was away at the start, would count this run's ticks twice.
        """
        recovered = self._read_slots(keys.window_key, 0)
        self._mark_alive()
        self._recovered = True
        self._whole = True
        if recovered:
            logger.info("recovered {} slices of the last minutes from Redis", len(recovered))
        return recovered

    def unarchived(self) -> Candles:
        """The closed minutes from that one on before which all are known to be archived."""
        with self._asking():
            until = self._client.get(keys.ARCHIVED_KEY)
        now_ms = milliseconds(self._clock())
        oldest = minute_start(now_ms) - MINUTES_KEPT_MS
        since = keys.decode_start(cast("bytes | None", until))
        # A mark ahead of the clock is from before it was set back, and says nothing about the minutes until then.
        minutes = self._read_slots(keys.minutes_key, oldest if since > now_ms else max(since, oldest))
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
            alive = self._mark_alive()
        except Unavailable:
            return False
        self._whole = alive and not self._lacking
        if not self._whole:
            self._lacking = False
        return not self._whole

    def _mark_alive(self) -> bool:
        """Set this run's own key; gives whether it was there, and with it all that was written before."""
        now_ms = milliseconds(self._clock())
        with self._asking(), self._client.pipeline(transaction=True) as pipe:
            pipe.set(self._run_key, 1, ex=_ALIVE_SECONDS, get=True)
            pipe.zadd(keys.SERIES_KEY, dict.fromkeys(self._index, now_ms))
            pipe.zremrangebyscore(keys.SERIES_KEY, "-inf", now_ms - keys.EXPIRY_MS)
            pipe.pexpire(keys.SERIES_KEY, keys.EXPIRY_MS)
            was_alive, *_ = pipe.execute()
        return was_alive is not None

    def _put_slots(self, slots: Candles, key_of: Callable[[Series], str], kept_ms: int, channel: str) -> None:
        entries = list(slots.items())
        # Whole minutes go: of a minute that is cut, a recovery would make a poorer candle than there was.
        oldest = minute_start(milliseconds(self._clock())) - kept_ms
        with self._writing():
            for begin in range(0, len(entries), _CHUNK):
                self._put_chunk(entries[begin : begin + _CHUNK], key_of, oldest, channel)

    def _put_chunk(
        self, entries: list[tuple[Slot, Candle]], key_of: Callable[[Series], str], oldest: int, channel: str
    ) -> None:
        by_series: defaultdict[Series, dict[int, bytes]] = defaultdict(dict)
        announced: list[tuple[Slot, msgspec.Raw]] = []
        for slot, candle in entries:
            member = by_series[slot.series][slot.start] = keys.encode_candle(candle)
            announced.append((slot, msgspec.Raw(member)))
        # A transaction, so that no reader meets a slot between its old version and its new one.
        with self._client.pipeline(transaction=True) as pipe:
            for series, members in by_series.items():
                key = key_of(series)
                for start in members:
                    pipe.zremrangebyscore(key, start, start)
                pipe.zadd(key, {member: start for start, member in members.items()})
                pipe.zremrangebyscore(key, "-inf", f"({oldest}")
                pipe.pexpire(key, keys.EXPIRY_MS)
            pipe.publish(channel, keys.encode_announcement(announced))
            pipe.execute()

    def _read_slots(self, key_of: Callable[[Series], str], since: int) -> Candles:
        """All slots there are, those of series that were removed from the settings included."""
        slots: Candles = {}
        with self._asking():
            entries = self._client.zrange(keys.SERIES_KEY, 0, -1, withscores=True)
            written = keys.decode_series(cast("list[tuple[bytes, float]]", entries))
            for series in written.union(self._series):
                entries = self._client.zrangebyscore(key_of(series), since, "+inf", withscores=True)
                for start, candle in keys.decode_slots(cast("list[tuple[bytes, float]]", entries)).items():
                    slots[Slot(series, start)] = candle
        return slots

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
        """A call: any error of Redis becomes Unavailable and opens the breaker.

        One that fails, or may not be tried, leaves the cache incomplete.
        """
        try:
            self._breaker.check()
            yield
        except redis.RedisError as error:
            self._lacking = True
            self._breaker.failed()
            self._away = True
            self._limit.log("away", "WARNING", f"Redis cannot be used, memory answers meanwhile: {error}")
            raise Unavailable(f"Redis cannot be used: {error}") from error
        except BaseException:
            self._lacking = True
            raise
        self._breaker.succeeded()
        if self._away:
            self._away = False
            self._limit.log("back", "INFO", "Redis can be used again")
