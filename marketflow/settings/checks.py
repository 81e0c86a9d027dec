"""The checks: from what the sources say to settings, or to a message with every problem at once.

A person who is told one problem a start corrects a file by trial. A message names the key, the value, what is allowed
and the source, and shows nothing that is or looks like a secret.
"""

import difflib
import json
import re
from collections.abc import Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import msgspec

from marketflow.errors import SettingsError
from marketflow.settings import model
from marketflow.settings.model import ExchangeSettings, Settings
from marketflow.settings.sources import given, parsed

_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+(?:%\w+)?\]|[^\s:@/\[\]\"']+):([0-9]{1,5})", re.ASCII)


class _Wrong(Exception):
    """A value breaks its rule; the text says what is allowed. With a place (`[0].name`), only that part of it does."""

    def __init__(self, allowed: str, place: str = "", part: object = None) -> None:
        super().__init__(allowed)
        self.place, self.part = place, part


def load(config: Path | None = None, overrides: Mapping[str, object] | None = None) -> Settings:
    """Read all sources and check every key.

    `config` is a TOML, YAML or JSON file that is read in the place of settings.toml. `overrides` are dotted keys with
    their values, such as {"http.port": 0}, and win over everything.

    Raises:
        SettingsError: a file can't be read, a key is unknown or a value is wrong; one line for each problem.
    """
    return load_with_origins(config, overrides)[0]


def load_with_origins(
    config: Path | None = None, overrides: Mapping[str, object] | None = None
) -> tuple[Settings, dict[str, str]]:
    """The same, and by dotted key the source of all that is no default: a file, a variable, "" for an override."""
    values: dict[str, Any] = {section: {} for section in model.SECTIONS}
    origins: dict[str, str] = {}
    problems: list[str] = []
    for key, (value, origin) in given(config, overrides or {}).items():
        source = f" (from {origin})" if origin else ""
        if key in model.SECTIONS:
            problems.append(f"{key}: must be a table of {', '.join(model.SECTIONS[key].__struct_fields__)}{source}")
        elif key not in model.KEYS:
            problems.append(f"{key}: unknown key, did you mean {_nearest(key)}?{source}")
        else:
            section, _, name = key.rpartition(".")
            origins[key] = origin
            try:
                (values[section] if section else values)[name] = _checked(key, value)
            except _Wrong as wrong:
                problems.append(f"{_problem(key, value, wrong)}{source}")
    if problems:
        raise SettingsError("\n".join(problems))
    settings = msgspec.convert(values, Settings)
    _check_together(settings)
    return settings, origins


def _check_together(settings: Settings) -> None:
    """Hold keys to what they allow each other.

    Raises:
        SettingsError: they do not go together.
    """
    minutes, days = settings.archive.minutes_days, settings.archive.days_days
    if days is not None and (minutes is None or minutes > days):
        raise SettingsError(
            f'archive.keep_days = "{settings.archive.keep_days}": must be at least archive.keep_minutes'
            f' ("{settings.archive.keep_minutes}"), and "" where that is ""'
        )
    for number, exchange in enumerate(settings.exchanges):
        if others := [symbol for symbol in exchange.symbols if symbol not in settings.symbols]:
            raise SettingsError(f"exchanges[{number}].symbols = {others}: must be among symbols")
    files = [name for name in ("tls_ca", "tls_cert", "tls_key") if getattr(settings.redis, name)]
    if files and not settings.redis.tls:
        raise SettingsError(f"redis.{files[0]}: is of no use without redis.tls = true")
    if bool(settings.redis.tls_cert) != bool(settings.redis.tls_key):
        raise SettingsError("redis.tls_cert and redis.tls_key: must be given together")
    if settings.redis.tls and settings.redis.host.startswith("/"):
        raise SettingsError("redis.tls = true: does not go with the path of a socket as redis.host")


def convert(key: str, text: str) -> Any:
    """The value of one key from the text of a command line flag, checked as if it came from the environment.

    The name of an exchange has the key `exchange.name`.

    Raises:
        SettingsError: `99999: must be a whole number from 0 to 65535`.
    """
    value = parsed(key, text)
    try:
        return _checked(key, value)
    except _Wrong as wrong:
        raise SettingsError(_problem(key, value, wrong).removeprefix(key).removeprefix(" = ")) from None


def _checked(key: str, value: object) -> Any:
    own = {
        "symbols": _symbols,
        "http.allowed_hosts": _allowed_hosts,
        "http.allowed_origins": _allowed_origins,
        "http.trusted_proxies": _trusted_proxies,
        "exchanges": _exchanges,
        "redis.host": lambda host: _store_host("redis", host),
        "postgres.host": lambda host: _store_host("postgres", host),
        "data_dir": _data_dir,
        "flow.window_seconds": _window_seconds,
    }.get(key)
    return own(value) if own else _held_to(model.KINDS[key], value)


def _problem(key: str, value: object, wrong: _Wrong) -> str:
    """On one line: `http.port = 99999: must be ...`, `exchanges[0].name = "": must be ...`."""
    return f"{key}{wrong.place} = {_shown(key, wrong.part if wrong.place else value)}: {wrong}"


def _held_to(kind: Any, value: object, place: str = "") -> Any:
    """The value as its type; a word may differ in case."""
    words = model.choices(kind)
    if isinstance(value, str):
        value = next((word for word in words if word.lower() == value.lower()), value)
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError:
        allowed = f"one of {', '.join(filter(None, words))}" if words else kind.__metadata__[0].description
        quotes = "; put it in quotes" if not words and model.is_text(kind) and not isinstance(value, str) else ""
        raise _Wrong(f"must be {allowed}{quotes}", place, value) from None


def _symbols(value: object) -> tuple[str, ...]:
    symbols = _words(value)
    if not isinstance(symbols, list) or not symbols:
        raise _Wrong('must be a list of one or more symbols, such as ["BTCUSDT", "ETHUSDT"]')
    for number, symbol in enumerate(symbols):
        _held_to(model.Symbol, symbol, f"[{number}]")
    _refuse_twins(symbols)
    return tuple(symbols)


def _allowed_hosts(value: object) -> tuple[str, ...]:
    hosts = _words(value)
    if not isinstance(hosts, list | tuple):
        raise _Wrong('must be a list of host names, such as ["prices.example.com"]')
    return tuple(_held_to(model.AllowedHost, host, f"[{number}]") for number, host in enumerate(hosts))


def _allowed_origins(value: object) -> tuple[str, ...]:
    origins = _words(value)
    if not isinstance(origins, list | tuple):
        raise _Wrong('must be a list of origins, such as ["https://prices.example.com"], or "*"')
    return tuple(_held_to(model.Origin, origin, f"[{number}]") for number, origin in enumerate(origins))


def _trusted_proxies(value: object) -> tuple[str, ...]:
    proxies = _words(value)
    if not isinstance(proxies, list | tuple):
        raise _Wrong('must be a list of addresses and networks, such as ["127.0.0.1", "10.0.0.0/8"]')
    for number, proxy in enumerate(proxies):
        try:
            ip_network(proxy if isinstance(proxy, str) else "", strict=False)
        except ValueError:
            raise _Wrong("must be an IP address or a network such as 10.0.0.0/8", f"[{number}]", proxy) from None
    return tuple(proxies)


def _words(value: object) -> object:
    """A list may also be one text with commas or spaces between the items."""
    return re.findall(r"[^,\s]+", value) if isinstance(value, str) else value


def _exchanges(value: object) -> tuple[ExchangeSettings, ...]:
    if not isinstance(value, list) or not value:
        raise _Wrong('must be a list of one or more exchanges, such as [{name="exchange1", address="127.0.0.1:40101"}]')
    exchanges = tuple(_exchange(f"[{number}]", item) for number, item in enumerate(value))
    _refuse_twins([exchange.name for exchange in exchanges])
    return exchanges


def _exchange(place: str, item: object) -> ExchangeSettings:
    fields = {str(name).lower(): value for name, value in item.items()} if isinstance(item, Mapping) else {}
    allowed = {"name", "venue", "symbols", "url", "rest_url"} if "venue" in fields else {"name", "address"}
    required = {"name", "venue"} if "venue" in fields else allowed
    if not required <= fields.keys() <= allowed:  # the message shows the names alone: values could be anything
        meant = "must be a table of name and address, or of name and venue (with symbols, url, rest_url where needed)"
        raise _Wrong(meant, place, list(fields) or item)
    name = _held_to(model.ExchangeName, fields["name"], f"{place}.name")
    if "venue" in fields:
        return _venue(name, place, fields)
    address = fields["address"]
    match = _ADDRESS.fullmatch(address) if isinstance(address, str) else None
    if match is None or not 1 <= int(match[2]) <= 65535:
        raise _Wrong("must be host:port, the port from 1 to 65535", f"{place}.address", address)
    return ExchangeSettings(name=name, address=match[0])


def _venue(name: str, place: str, fields: Mapping[str, object]) -> ExchangeSettings:
    venue = _held_to(model.VenueName, fields["venue"], f"{place}.venue")
    if not venue:
        raise _Wrong(f"must be one of {', '.join(model.VENUES)}", f"{place}.venue", venue)
    for key, schemes in (("url", ("ws", "wss")), ("rest_url", ("http", "https"))):
        url = fields.get(key, "")
        if not isinstance(url, str) or (url and not re.fullmatch(rf"({'|'.join(schemes)})://[^\s/@]+(/\S*)?", url)):
            raise _Wrong(f"must be a URL that begins with {schemes[1]}:// or {schemes[0]}://", f"{place}.{key}", url)
    symbols = fields.get("symbols", [])
    names = symbols if isinstance(symbols, Mapping) else dict.fromkeys(_symbols(symbols) if symbols != [] else (), "")
    native = {str(ours).upper(): str(theirs) for ours, theirs in names.items()}  # dynaconf may change the case of keys
    if native:
        _symbols([*native])
    urls = {key: str(fields.get(key, "")) for key in ("url", "rest_url")}
    return ExchangeSettings(name=name, venue=venue, symbols=native, **urls)


def _store_host(section: str, value: object) -> str:
    """A name, an address or the path of a socket alone: of a URL the parts stand in settings of their own."""
    if not isinstance(value, str) or value.startswith("/") or not re.search(r"[/?#@\[\]]|^[^:]*:[^:]*$", value):
        return cast("str", _held_to(model.HostOrEmbedded, value))
    try:
        parts = urlsplit(value if "://" in value else f"//{value}")
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise _Wrong("must be a host name or an IP address alone") from None
    if parts.scheme == "unix":
        raise _Wrong(f'must be the path of the socket alone; write {section}.host = "{parts.path}"')
    meant = [f'{section}.host = "{host}"'] + ([f"{section}.port = {port}"] if port else [])
    if parts.password is not None:
        user = "redis.username" if section == "redis" else "postgres.user"
        meant += [f'{user} = "{parts.username}"'] if parts.username else []
        meant.append(f"{section}.password")
    elif parts.username is not None:
        meant.append(f"{section}.password")  # redis://secret@host is taken for a password by some clients
    if parts.scheme in ("rediss", "valkeys"):
        meant.append(f"{section}.tls = true")
    if database := parts.path.strip("/"):
        meant.append(f"redis.db = {database}" if section == "redis" else f'postgres.dbname = "{database}"')
    raise _Wrong(f"must be a host name or an IP address alone; write {', '.join(meant)}")


def _refuse_twins(names: list[str]) -> None:
    """Names are matched without regard to case, so they must differ in more than that."""
    lower = [name.lower() for name in names]
    for number, name in enumerate(lower):
        if name in lower[:number]:
            raise _Wrong(f"must all be different, {names[number]} is there twice")


def _data_dir(value: object) -> Path:
    """A folder; "" is the usual one, ~ the home folder."""
    if value == "":
        return model.default_data_dir()
    try:
        if isinstance(value, Path | str) and "\0" not in str(value):
            return Path(value).expanduser().absolute()
    except (RuntimeError, OSError):
        pass  # ~nobody, or no current folder
    raise _Wrong('must be the path of a folder, or "" for the usual place')


def _window_seconds(value: object) -> int:
    """The rest of MarketFlow goes by whole minutes, which must not cut a window in two."""
    if type(value) is int and value > 0 and 60 % value == 0:
        return value
    raise _Wrong("must be a whole number of seconds that divides 60")


def _nearest(key: str) -> str:
    known = [*model.KEYS, *model.SECTIONS]
    by_ending = [name for name in known if name.endswith(f".{key}")]
    return (by_ending or difflib.get_close_matches(key, known, n=1, cutoff=0.0))[0]


def _shown(key: str, value: object) -> str:
    """A value for a message: short, on one line, and without what is or looks like a secret."""
    if model.is_secret(model.KINDS[key]):
        return "***"
    text = json.dumps(value) if isinstance(value, str) else ascii(value)
    # A URL in the wrong place may hold a password.
    text = re.sub(r'(://|")[^"]*@', r"\1***@", text)
    text = re.sub(r'\?[^"]*', "?***", text)
    return text if len(text) <= 200 else f"{text[:200]}..."
