"""Schema of the settings: a struct for each section, with the rule and the default of each key.

The fields are the only list of keys. The type of a field is its rule, and the text in its `Meta` is the error text, so
both state the same range.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
from msgspec import Meta
from msgspec.structs import fields

from marketflow.alerts.alert_model import AlertRule
from marketflow.model import MINUTE_MS, Mode, Series
from marketflow.settings.shards import ShardMap
from marketflow.time_parsing import duration_ms

SLICES_HELD_BEYOND_MS = 10_000
"""Retention of slices beyond the allowed skew, for ticks that were delayed by pending writes."""


def _whole(low: int, high: int, unit: str = "") -> Meta:
    return Meta(ge=low, le=high, description=f"a whole number{unit} from {low} to {high}")


def _number(high: int, unit: str = "") -> Meta:
    # Times are whole ms, of which a smaller number would be none: no timeout at all, or no pause.
    return Meta(ge=0.001, le=high, description=f"a number{unit} from 0.001 to {high}")


def _matches(pattern: str, description: str) -> Meta:
    # \Z, as $ would accept a trailing line feed
    return Meta(pattern=rf"^{pattern}\Z", description=description)


_HOST = r"[^\x00-\x20\x7f\"'@,]"

Port = Annotated[int, _whole(1, 65535)]
Rate = Annotated[float, _number(100_000)]
Speed = Annotated[float, _number(1_000_000)]
Seed = Annotated[
    Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None,
    Meta(description="a whole number of at most 64 bits, or left out"),
]
Text = Annotated[str, _matches(r"[^\x00-\x1f\x7f]+", "text that is not empty")]
Host = Annotated[str, _matches(f"{_HOST}+", "a host name or an IP address")]
HostOrEmbedded = Annotated[str, _matches(f"{_HOST}*", 'a host name, an IP address, or "" for the embedded server')]
Username = Annotated[str, _matches(r"[^\x00-\x20\x7f]*", "a name without spaces")]
Password = Annotated[str, _matches(r"[^\x00]*", "text")]
# Without a port, so only an IPv6 address may have colons.
AllowedHost = Annotated[
    str, _matches(r"(\*|[A-Za-z0-9._-]+|\[?[0-9A-Fa-f.]*(:[0-9A-Fa-f.]*){2,}\]?)", 'a host name without a port, or "*"')
]
# Long enough against guessing; examples are no secrets.
Token = Annotated[
    str,
    _matches(
        r"(?!(?i:.*change-me))([\x21-\x7e]{16,})?",
        "at least 16 characters of printable ASCII without spaces, and must not contain change-me",
    ),
]
Origin = Annotated[
    str,
    _matches(
        r"(\*|https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?)",
        'an origin such as "https://prices.example.com", or "*"',
    ),
]

# Symbols and names of exchanges are path segments of the API, so they have no /.
Symbol = Annotated[
    str, _matches(r"[A-Z0-9][A-Z0-9._-]{0,31}", "1 to 32 of A-Z 0-9 - _ . beginning with a letter or a digit")
]
ExchangeName = Annotated[
    str,
    _matches(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}", "1 to 32 letters, digits, - _ . beginning with a letter or a digit"),
]
Shards = Annotated[int, _whole(1, 64)]
VenueName = Literal["", "binance", "coinbase", "kraken", "okx", "bybit"]
VENUES: tuple[str, ...] = tuple(filter(None, get_args(VenueName)))
SslMode = Literal["", "disable", "allow", "prefer", "require", "verify-ca", "verify-full"]
Keep = Annotated[
    str, _matches(r"(([2-9]|[1-9][0-9]{1,4})d)?", 'a number of days from 2d to 99999d, such as "90d", or "" for ever')
]
History = Annotated[
    str, _matches(r"([0-9]{1,5}[smhd]){1,4}", 'a duration such as "24h", "365d" or "1h30m", or "0s" for none')
]
Buckets = Annotated[
    Annotated[int, Meta(ge=1, le=1024)] | None, Meta(description="a whole number from 1 to 1024, or left out")
]
Switch = Annotated[bool, Meta(description="true or false")]
FilePath = Annotated[str, _matches(r"[^\x00]*", 'the path of a file, or ""')]
FolderPath = Annotated[str, _matches(r"[^\x00]*", 'the path of a folder, or ""')]
SchemaName = Annotated[
    str, _matches(r"(?!pg_)[a-z_][a-z0-9_]{0,62}", "1 to 63 of a-z 0-9 _ that do not begin with a digit or pg_")
]
LogLevel = Literal["TRACE", "DEBUG", "INFO", "SUCCESS", "WARNING", "ERROR", "CRITICAL"]

WRITTEN_MS = 500
"""Most time from the receipt of a tick until queries see it, unless a store is unavailable."""

CLUSTER_BUCKETS = 16
"""Buckets of a Redis Cluster: enough to spread over a handful of masters, and few calls for a write of all series."""

ROOT_DATA_DIR = Path("/var/lib/marketflow")


def user_data_dir() -> Path:
    """Return the platform's data folder of the user; it begins with ~ where the user has no home folder."""
    import platformdirs  # neither root nor a configured folder needs it

    try:
        return platformdirs.user_data_path("marketflow")
    except RuntimeError:  # neither HOME nor an entry in the list of users; who has own servers needs none
        return Path("~/.local/share/marketflow")


def default_data_dir() -> Path:
    """Return the platform's data folder of the user; as root a folder that PostgreSQL's user can reach."""
    return ROOT_DATA_DIR if os.geteuid() == 0 else user_data_dir()


def is_secret(kind: Any) -> bool:
    """Return whether values of a type must not be shown."""
    return kind in (Password, Token)


def is_text(kind: Any) -> bool:
    """Return whether values of a type are literal text."""
    return getattr(kind, "__origin__", kind) in (str, Path) or bool(choices(kind))


def choices(kind: Any) -> tuple[str, ...]:
    """Return the words that a type allows; empty for other types."""
    return tuple(Mode) if kind is Mode else get_args(kind) if get_origin(kind) is Literal else ()


class _Section(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all settings; its representation shows *** for secrets."""

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self.__rich_repr__())
        return f"{type(self).__name__}({shown})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        values = [(field, getattr(self, field.name)) for field in fields(self)]
        return [(field.name, "***" if value and is_secret(field.type) else value) for field, value in values]


class ExchangeSettings(_Section, frozen=True, kw_only=True, omit_defaults=True):
    """One exchange: its name in the API, and either the `host:port` of its feed (`[::1]:40101` for IPv6) or its venue.

    `symbols` maps the symbols to ingest from a venue (empty: all) to the venue's names, "" for the name in the venue's
    list of instruments. An empty `url` or `rest_url` is the venue's default, an empty `history` that of all venues.
    `shards` is into how many parts, by symbols, it is divided among ingest processes.
    """

    name: ExchangeName
    address: str = ""
    venue: VenueName = ""
    symbols: dict[str, str] = {}
    url: str = ""
    rest_url: str = ""
    history: History | Literal[""] = ""
    shards: Shards = 1

    def without_symbols(self) -> "ExchangeSettings":
        """Return all but the symbols."""
        return msgspec.structs.replace(self, symbols={})

    @property
    def connection(self) -> "ExchangeSettings":
        """Return all that its feed needs a new connection for."""
        return msgspec.structs.replace(self, symbols={}, shards=1)

    @property
    def host(self) -> str:
        """Return the host of the address, without the brackets of an IPv6 address."""
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """Return the port of the address."""
        return int(self.address.rpartition(":")[2])


class HttpSettings(_Section, frozen=True, kw_only=True):
    """Address of the API (port 0: any free port), bearer token for a switch of the mode, and limits per client.

    `allowed_hosts` are the accepted Host headers; empty means this machine's names on a loopback address, and any name
    on another. Pages of `allowed_origins` may read and open WebSockets. `trusted_proxies` report client addresses.
    """

    host: Host = "127.0.0.1"
    port: Annotated[int, _whole(0, 65535)] = 8080
    token: Token = ""
    allowed_hosts: tuple[AllowedHost, ...] = ()
    allowed_origins: tuple[Origin, ...] = ()
    trusted_proxies: tuple[str, ...] = ()  # its rule is in value_checks
    streams_per_client: Annotated[int, _whole(1, 10_000)] = 100


class PostgresSettings(_Section, frozen=True, kw_only=True):
    """PostgreSQL, which stores candles; an empty host means the embedded server.

    Without sslmode: `prefer` on this machine; over a network `verify-full` with an sslrootcert and `require` without.
    """

    host: HostOrEmbedded = ""
    port: Port = 5432
    user: Text = "marketflow"
    password: Password = ""
    dbname: Text = "marketflow"
    sslmode: SslMode = ""
    sslrootcert: FilePath = ""
    schema: SchemaName = "public"
    prepared_statements: Switch = True


class RedisSettings(_Section, frozen=True, kw_only=True):
    """Redis, which caches recent prices; without host and nodes it is the embedded server.

    `nodes` are nodes of a Redis Cluster, which name all others.
    With TLS the server's certificate is verified, by `tls_ca` or the authorities that this machine trusts.
    """

    host: HostOrEmbedded = ""
    port: Port = 6379
    username: Username = ""
    password: Password = ""
    tls: Switch = False
    tls_ca: FilePath = ""
    tls_cert: FilePath = ""
    tls_key: FilePath = ""
    db: Annotated[int, _whole(0, 65535)] = 0
    nodes: tuple[str, ...] = ()  # its rule is in value_checks
    buckets: Buckets = None
    ttl_seconds: Annotated[int, _whole(1, 86400, " of seconds")] = 70

    @property
    def is_embedded(self) -> bool:
        """Return whether MarketFlow starts the server."""
        return not self.host and not self.nodes

    @property
    def bucket_count(self) -> int:
        """Return into how many parts the keys are divided."""
        return self.buckets or (CLUSTER_BUCKETS if self.nodes else 1)

    @property
    def addresses(self) -> tuple[tuple[str, int], ...]:
        """Return host and port of each node."""
        parts = [node.rpartition(":") for node in self.nodes]
        return tuple((host.strip("[]"), int(port)) for host, _, port in parts)


class FlowSettings(_Section, frozen=True, kw_only=True):
    """Processing of ticks: workers, batches, allowed skew and lateness."""

    workers_per_exchange: Annotated[int, _whole(1, 64)] = 5
    db_batch_size: Annotated[int, _whole(1, 10_000)] = 200
    stale_after_seconds: Annotated[float, _number(86400, " of seconds")] = 15.0
    # Slices of the skew are kept in memory: an hour at most.
    max_clock_skew_seconds: Annotated[float, _number(3600, " of seconds")] = 5.0
    # Minutes are kept for six minutes (RECENT_MS): a longer wait would evict them unwritten.
    late_after_seconds: Annotated[float, _number(300, " of seconds")] = 2.0
    reconnect_after_seconds: Annotated[float, _number(30, " of seconds")] = 1.0
    window_seconds: int = 60  # its rule is in value_checks

    @property
    def max_clock_skew_ms(self) -> int:
        """Return the allowed skew of an event time in ms."""
        return round(self.max_clock_skew_seconds * 1000)

    @property
    def ahead_ms(self) -> int:
        """Return the skew in ms from which a stored time ahead of the clock counts as written under another clock."""
        return max(self.max_clock_skew_ms, MINUTE_MS)

    @property
    def late_after_ms(self) -> int:
        """Return the allowed lateness of ticks in ms: a minute is written that long after its end."""
        return round(self.late_after_seconds * 1000)

    @property
    def slices_held_ms(self) -> int:
        """Return the least retention of slices in ms, whatever their number."""
        return self.max_clock_skew_ms + SLICES_HELD_BEYOND_MS

    @property
    def closed_after_ms(self) -> int:
        """Return the time in ms from the end of a candle until no accepted tick can change it."""
        return max(self.late_after_ms, self.max_clock_skew_ms) + WRITTEN_MS

    @property
    def minute_ms(self) -> int:
        """Return the length of the window of a row in ms."""
        return self.window_seconds * 1000


class ArchiveSettings(_Section, frozen=True, kw_only=True):
    """Retention of minutes, and of the hours and days rolled up from them; "" keeps them for ever."""

    keep_minutes: Keep = ""
    keep_days: Keep = ""  # needs keep_minutes, see the loader

    @property
    def minutes_days(self) -> int | None:
        """Return the retention of minutes in days, None for ever."""
        return int(self.keep_minutes[:-1]) if self.keep_minutes else None

    @property
    def days_days(self) -> int | None:
        """Return the retention of hours and days in days, None for ever."""
        return int(self.keep_days[:-1]) if self.keep_days else None


class GeneratorSettings(_Section, frozen=True, kw_only=True):
    """Generator of test mode: ticks per second and exchange, and a seed for repeatable ticks."""

    rate: Rate = 100.0
    seed: Seed = None


class RecordSettings(_Section, frozen=True, kw_only=True):
    """Record of the raw frames of live feeds: its folder ("" for none), and the size of all its files."""

    dir: FolderPath = ""
    max_bytes: Annotated[int, _whole(2**20, 2**50, " of bytes")] = 2**30


class LogSettings(_Section, frozen=True, kw_only=True):
    """Level and format of the log."""

    level: LogLevel = "INFO"
    format: Literal["text", "json"] = "text"


class Settings(_Section, frozen=True, kw_only=True):
    """All settings, created by `load`, which checks them; passed by argument."""

    mode: Mode = Mode.TEST
    symbols: tuple[Symbol, ...] = ("BTCUSDT", "DOGEUSDT", "TONUSDT", "SOLUSDT", "ETHUSDT")
    exchanges: tuple[ExchangeSettings, ...] = (
        ExchangeSettings(name="exchange1", address="127.0.0.1:40101"),
        ExchangeSettings(name="exchange2", address="127.0.0.1:40102"),
        ExchangeSettings(name="exchange3", address="127.0.0.1:40103"),
    )
    history: History = "24h"
    alerts: tuple[AlertRule, ...] = ()
    data_dir: Path = msgspec.field(default_factory=default_data_dir)
    http: HttpSettings = HttpSettings()
    postgres: PostgresSettings = PostgresSettings()
    redis: RedisSettings = RedisSettings()
    flow: FlowSettings = FlowSettings()
    archive: ArchiveSettings = ArchiveSettings()
    generator: GeneratorSettings = GeneratorSettings()
    record: RecordSettings = RecordSettings()
    log: LogSettings = LogSettings()

    def symbols_of(self, exchange: ExchangeSettings) -> dict[str, str]:
        """Return the symbols of an exchange with the venue's name of each, "" for that in its list."""
        return dict(exchange.symbols) or dict.fromkeys(self.symbols, "")

    @property
    def series(self) -> frozenset[Series]:
        """Return all series, of both modes."""
        found = {Series(Mode.TEST, each.name, symbol) for each in self.exchanges for symbol in self.symbols}
        found |= {Series(Mode.LIVE, each.name, name) for each in self.exchanges for name in self.symbols_of(each)}
        return frozenset(found)

    @property
    def shards(self) -> ShardMap:
        """Return the shards of all exchanges."""
        return ShardMap({exchange.name: exchange.shards for exchange in self.exchanges})

    def history_ms(self, exchange: ExchangeSettings) -> int:
        """Return how far back minutes of an exchange are fetched from its venue, in ms; 0 without a venue.

        At most as far as minutes are kept.
        """
        wanted = duration_ms(exchange.history or self.history) if exchange.venue else 0
        kept_days = self.archive.minutes_days
        return wanted if kept_days is None else min(wanted, kept_days * 86_400_000)


SECTIONS: dict[str, type[_Section]] = {
    field.name: field.type for field in fields(Settings) if isinstance(field.default, _Section)
}

KEYS: dict[str, Any] = {field.name: field.type for field in fields(Settings) if field.name not in SECTIONS} | {
    f"{section}.{field.name}": field.type for section, struct in SECTIONS.items() for field in fields(struct)
}
"""Types by dotted key."""

KINDS = KEYS | {"exchange.name": ExchangeName, "replay.speed": Speed}
"""Types by dotted key, including keys that only an option can set."""
