"""Keys and channels of the cache in Redis, and how long each kind is kept.

Every key of a series carries it as hash tag, so that a cluster keeps them on one node. A sorted set holds one member
per slot: the score is the start of the slice or minute in Unix ms, the member is the candle (see codec).
"""

from collections.abc import Callable

from marketflow.model import MINUTE_MS, Series
from marketflow.stores.cache_limits import MINUTES_KEPT_MS, RECENT_MS

# One minute more than any reader needs, since a recovery begins with the whole minute.
WINDOW_KEPT_MS = RECENT_MS + MINUTE_MS

# Scores are starts: the minute that ended a day ago began a minute before that.
MINUTES_TRIMMED_MS = MINUTES_KEPT_MS + 2 * MINUTE_MS

EXPIRY_MS = MINUTES_TRIMMED_MS
"""Expiry of slices and minutes after the last write: what a crash left can be recovered for a day."""

KeyOf = Callable[[Series], str]
"""Gives the key of a series."""

LATEST_FIELDS = ("price", "timestamp", "sequence")

ARCHIVED_KEY = "marketflow:{archive}:until"
"""Start of a minute (Unix ms) before which PostgreSQL has every row, as an earlier version wrote it."""

SERIES_KEY = "marketflow:{archive}:series"
"""Sorted set of all series written here, by the time they were last configured; finds series removed from the settings.

Exists as long as the cache has any data; where it is missing, Redis was emptied."""

NEWEST_CHANNEL = "marketflow:{changes}:newest"
"""Channel of newest ticks, published as they are written: a JSON array of [series, tick]."""

SLICES_CHANNEL = "marketflow:{changes}:slices"
"""Channel of slices, published as they are written: a JSON array of [[series, start], candle]."""

MINUTES_CHANNEL = "marketflow:{changes}:minutes"
"""Channel of closed minutes, in the same form."""

LEASE_KEY = "marketflow:{control}:lease"
"""The run that holds the lease of the ingest role; empty once it was released."""

SHARDS_KEY = "marketflow:{control}:shards"
"""Hash: which ingest process owns which shard, which one is its standby, and until when each process holds them."""

STATE_KEY = "marketflow:{control}:state"
"""Channel on which ingest processes publish their states."""

MODE_KEY = "marketflow:{control}:mode"
"""The mode that runs, or ran last."""

COMMANDS_KEY = "marketflow:{control}:commands"
"""List of the ids of commands to the ingest process."""


def channel(name: str, db: int) -> str:
    """The channel of that name for one database; Redis shares channels between all databases."""
    return f"{name}:{db}" if db else name


def latest_key(series: Series) -> str:
    """Hash: price, timestamp (Unix ms), received (Unix ms), sequence (order of arrival, Unix ns)."""
    return _key(series, "latest")


def window_key(series: Series) -> str:
    """Sorted set of the slices of the last minutes."""
    return _key(series, "window")


def minutes_key(series: Series) -> str:
    """Sorted set of a day of closed minutes."""
    return _key(series, "minutes")


def run_key(run: str) -> str:
    """Key that a run keeps from expiring; where it is missing, Redis was emptied."""
    return f"marketflow:{{run:{run}}}:alive"


def archived_key(shard: str) -> str:
    """String: start of a minute (Unix ms) before which PostgreSQL has every row of a shard."""
    return f"{ARCHIVED_KEY}:{shard}"


def complete_key(exchange: str) -> str:
    """String: until when all trades of an exchange are on record, a JSON object of Unix ms by symbol."""
    return f"marketflow:{{archive}}:complete:{exchange}"


def state_key(run: str) -> str:
    """String: the state of an ingest process."""
    return f"{STATE_KEY}:{run}"


def commands_key(run: str) -> str:
    """List of the ids of commands to an ingest process."""
    return f"{COMMANDS_KEY}:{run}"


def command_key(command: str) -> str:
    """String: the content of a command; expires with the command's deadline."""
    return f"marketflow:{{control}}:command:{command}"


def reply_key(command: str) -> str:
    """List with the one reply to a command."""
    return f"marketflow:{{control}}:reply:{command}"


def _key(series: Series, kind: str) -> str:
    return f"marketflow:{{{series.mode}:{series.exchange}:{series.symbol}}}:{kind}"
