"""Keys and channels of the cache in Redis, and how long each kind is kept.

On a Redis Cluster the series are divided into buckets by their symbol. A bucket is the hash tag of all its keys and
channels, so that one node has all of it, and all exchanges of a symbol. A plain Redis has one bucket, and keys without
its number.

A sorted set holds one member per slot: the score is the start of the slice or minute in Unix ms, the member is the
candle (see codec).
"""

from collections.abc import Callable
from typing import NamedTuple
from zlib import crc32

from redis.crc import key_slot

from marketflow.model import MINUTE_MS, Series
from marketflow.stores.cache_limits import MINUTES_KEPT_MS, RECENT_MS

# One minute more than any reader needs, since a recovery begins with the whole minute.
WINDOW_KEPT_MS = RECENT_MS + MINUTE_MS

# Scores are starts: the minute that ended a day ago began a minute before that.
MINUTES_TRIMMED_MS = MINUTES_KEPT_MS + 2 * MINUTE_MS

EXPIRY_MS = MINUTES_TRIMMED_MS
"""Expiry of slices and minutes after the last write: what a crash left can be recovered for a day."""

KeyOf = Callable[[Series], str]
"""Returns the key of a series."""

LATEST_FIELDS = ("price", "timestamp", "sequence")

SHARDS_KEY = "marketflow:{control}:table"
"""JSON: which ingest process owns which shard, which one is its standby, and until when each process holds them."""

STATES_KEY = "marketflow:{control}:states"
"""Hash: the state of each ingest process, by run."""

FOLLOWED_KEY = "marketflow:{control}:followed"
"""Exists while other processes read the states."""

FOLLOWERS_KEY = "marketflow:{control}:followers"
"""Hash, by the ids of API processes; those that have ended are removed at the next mode switch."""

MODE_KEY = "marketflow:{control}:mode"
"""The mode that runs, or ran last."""

ALERTS_KEY = "marketflow:{control}:alerts"
"""JSON: until when alerts were evaluated, and which feeds were stale, for the process that leads next."""

BUCKETS_KEY = "marketflow:{control}:buckets"
"""String: into how many buckets the keys of a Redis Cluster are divided."""

BUCKETS_HELD_KEY = "marketflow:{control}:buckets:held"
"""String: the number of buckets of the processes that write now; expires soon after the last one has ended."""

CONTROL_SLOT = key_slot(b"control")
"""Slot of a Redis Cluster with the keys by which processes coordinate."""


class Bucket(NamedTuple):
    """The names of the keys and channels of some series; no series is in two buckets.

    Args:
        number: of the bucket on a Redis Cluster; None for all series on a plain Redis.
        db: number of the database; Redis shares channels between all databases.
    """

    number: int | None = None
    db: int = 0

    @property
    def title(self) -> str:
        """Its name in the log."""
        return "cache" if self.number is None else f"bucket {self.number}"

    @property
    def slot(self) -> int:
        """The slot of a Redis Cluster that has all its keys."""
        return key_slot(self.series_key.encode())

    @property
    def publish(self) -> str:
        """The command that publishes on its channels."""
        return "PUBLISH" if self.number is None else "SPUBLISH"

    def latest_key(self, series: Series) -> str:
        """Hash: price, timestamp (Unix ms), received (Unix ms), sequence (order of arrival, Unix ns)."""
        return self._series_key(series, "latest")

    def window_key(self, series: Series) -> str:
        """Sorted set of the slices of the last minutes."""
        return self._series_key(series, "window")

    def minutes_key(self, series: Series) -> str:
        """Sorted set of a day of closed minutes."""
        return self._series_key(series, "minutes")

    @property
    def series_key(self) -> str:
        """Sorted set of all series written here, by the time they were last configured; finds those removed since.

        Exists as long as the bucket has any data; where it is missing, Redis was emptied.
        """
        return self._key("archive", "series")

    def archived_key(self, shard: str) -> str:
        """String: start of a minute (Unix ms) before which PostgreSQL has every row of a shard."""
        return f"{self.earlier_archived_key}:{shard}"

    @property
    def earlier_archived_key(self) -> str:
        """The mark of all series, which an earlier version wrote in place of one for each shard."""
        return self._key("archive", "until")

    def complete_key(self, exchange: str) -> str:
        """String: until when all trades of an exchange are on record, a JSON object of Unix ms by symbol."""
        return self._key("archive", f"complete:{exchange}")

    def run_key(self, run: str) -> str:
        """Key that a run keeps from expiring; where it is missing, Redis was emptied."""
        return f"marketflow:{{run:{run}}}:alive" if self.number is None else self._key("", f"alive:{run}")

    @property
    def newest_channel(self) -> str:
        """Channel of newest ticks, published as they are written: a JSON array of [series, tick]."""
        return self._channel("newest")

    @property
    def slices_channel(self) -> str:
        """Channel of slices, published as they are written: a JSON array of [[series, start], candle]."""
        return self._channel("slices")

    @property
    def minutes_channel(self) -> str:
        """Channel of closed minutes, in the same form."""
        return self._channel("minutes")

    def _series_key(self, series: Series, kind: str) -> str:
        name = f"{series.mode}:{series.exchange}:{series.symbol}"
        tag = f"{{{name}}}" if self.number is None else f"{{b{self.number}}}:{name}"
        return f"marketflow:{tag}:{kind}"

    def _key(self, plain_tag: str, name: str) -> str:
        return f"marketflow:{{{plain_tag if self.number is None else f'b{self.number}'}}}:{name}"

    def _channel(self, name: str) -> str:
        return channel(self._key("changes", name), self.db)


def bucket_of(symbol: str, buckets: int) -> int:
    """Return the number of the bucket of a symbol, of `buckets` in total."""
    return crc32(symbol.encode()) % buckets


def channel(name: str, db: int) -> str:
    """Return the name of a channel for one database; Redis shares channels between all databases."""
    return f"{name}:{db}" if db else name


def commands_key(run: str) -> str:
    """List of the ids of commands to an ingest process."""
    return f"marketflow:{{control}}:commands:{run}"


def command_key(command: str) -> str:
    """String: the content of a command; expires with the command's deadline."""
    return f"marketflow:{{control}}:command:{command}"


def follower_key(process: str) -> str:
    """String: the mode that an API process answers about; expires once it polls no more."""
    return f"marketflow:{{control}}:follower:{process}"


def reply_key(command: str) -> str:
    """List with the one reply to a command."""
    return f"marketflow:{{control}}:reply:{command}"


PLAIN = Bucket()
"""The only bucket of a plain Redis."""

latest_key, window_key, minutes_key = PLAIN.latest_key, PLAIN.window_key, PLAIN.minutes_key
