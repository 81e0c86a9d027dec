"""Checks of single values: the rule of each key, by its type in `schema`, or by a function for lists and tables."""

import re
from collections.abc import Mapping, Sequence
from ipaddress import ip_network
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import msgspec

from marketflow.alerts.alert_model import AlertRule, configured_id
from marketflow.alerts.rule_parsing import InvalidRule, convert_rule
from marketflow.model import REFERENCE
from marketflow.settings import schema
from marketflow.settings.schema import ExchangeSettings
from marketflow.text import is_host, words

_EXCHANGES = 'must be a list of one or more exchanges, such as [{name="exchange1", address="127.0.0.1:40101"}]'
_ALERTS = 'must be a list of rules, such as [{kind="price", symbol="BTCUSDT", level=70000, direction="up"}]'
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+(?:%\w+)?\]|[^\s:@/\[\]\"']+):([0-9]{1,5})", re.ASCII)


class RuleViolation(Exception):
    """A value breaks its rule. The text says what is allowed; `place` (`[0].name`) is the wrong part of the value."""

    def __init__(self, allowed: str, place: str = "", part: object = None) -> None:
        super().__init__(allowed)
        self.place, self.part = place, part


def check_value(key: str, value: object) -> Any:
    """Return the value of a key as its type.

    Raises:
        RuleViolation: the value is wrong.
    """
    rule = {
        "symbols": _symbols,
        "http.allowed_hosts": _allowed_hosts,
        "http.allowed_origins": _allowed_origins,
        "http.trusted_proxies": _trusted_proxies,
        "redis.nodes": _redis_nodes,
        "exchanges": _exchanges,
        "alerts": _alerts,
        "http.host": lambda host: _host(host, schema.Host),
        "redis.host": lambda host: _store_host("redis", host),
        "postgres.host": lambda host: _store_host("postgres", host),
        "data_dir": _data_dir,
        "flow.window_seconds": _window_seconds,
    }.get(key)
    return rule(value) if rule else _convert(schema.KINDS[key], value)


def _convert(kind: Any, value: object, place: str = "") -> Any:
    """Return the value as its type; words match in any case."""
    known = schema.choices(kind)
    if isinstance(value, str):
        value = next((word for word in known if word.lower() == value.lower()), value)
    try:
        if isinstance(value, str):
            value.encode()  # refuses surrogates, which stand for undecodable bytes
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, UnicodeEncodeError):
        allowed = f"one of {', '.join(filter(None, known))}" if known else kind.__metadata__[0].description
        quotes = "; put it in quotes" if not known and schema.is_text(kind) and not isinstance(value, str) else ""
        raise RuleViolation(f"must be {allowed}{quotes}", place, value) from None


def _symbols(value: object) -> tuple[str, ...]:
    symbols = _words(value)
    if not isinstance(symbols, list | tuple) or not symbols:
        raise RuleViolation('must be a list of one or more symbols, such as ["BTCUSDT", "ETHUSDT"]')
    for number, symbol in enumerate(symbols):
        _convert(schema.Symbol, symbol, f"[{number}]")
    _refuse_duplicates(symbols)
    return tuple(symbols)


def _allowed_hosts(value: object) -> tuple[str, ...]:
    hosts = _words(value)
    if not isinstance(hosts, list | tuple):
        raise RuleViolation('must be a list of host names, such as ["prices.example.com"]')
    return tuple(_convert(schema.AllowedHost, host, f"[{number}]") for number, host in enumerate(hosts))


def _allowed_origins(value: object) -> tuple[str, ...]:
    origins = _words(value)
    if not isinstance(origins, list | tuple):
        raise RuleViolation('must be a list of origins, such as ["https://prices.example.com"], or "*"')
    return tuple(_convert(schema.Origin, origin, f"[{number}]") for number, origin in enumerate(origins))


def _trusted_proxies(value: object) -> tuple[str, ...]:
    proxies = _words(value)
    if not isinstance(proxies, list | tuple):
        raise RuleViolation('must be a list of addresses and networks, such as ["127.0.0.1", "10.0.0.0/8"]')
    for number, proxy in enumerate(proxies):
        try:
            ip_network(proxy if isinstance(proxy, str) else "", strict=False)
        except ValueError:
            raise RuleViolation("must be an IP address or a network such as 10.0.0.0/8", f"[{number}]", proxy) from None
    return tuple(proxies)


def _redis_nodes(value: object) -> tuple[str, ...]:
    nodes = _words(value)
    if not isinstance(nodes, list | tuple):
        raise RuleViolation('must be a list of nodes of a Redis Cluster, such as ["10.0.0.1:6379"]')
    for number, node in enumerate(nodes):
        _check_address(node, f"[{number}]")
    _refuse_duplicates(nodes)
    return tuple(nodes)


def _check_address(address: object, place: str) -> None:
    match = _ADDRESS.fullmatch(address) if isinstance(address, str) else None
    if match is None or not is_host(match[1]) or not 1 <= int(match[2]) <= 65535:
        raise RuleViolation("must be host:port, the port from 1 to 65535", place, address)


def _words(value: object) -> object:
    """Split a text at commas and spaces; return other values unchanged."""
    return words(value) if isinstance(value, str) else value


def _exchange_table(word: str) -> dict[str, str]:
    """Return the table that a word stands for: `kraken` is a venue of that name, `name=host:port` a TCP feed."""
    name, is_address, address = word.partition("=")
    if is_address:
        return {"name": name, "address": address}
    if (venue := name.lower()) not in schema.VENUES:
        raise RuleViolation(f"{_EXCHANGES}, or kraken,exchange1=127.0.0.1:40101")
    return {"name": venue, "venue": venue}


def _exchanges(value: object) -> tuple[ExchangeSettings, ...]:
    if isinstance(value, str) and not value.lstrip().startswith(("[", "{")):  # those are malformed lists
        value = [_exchange_table(word) for word in words(value)]
    if not isinstance(value, list) or not value:
        raise RuleViolation(_EXCHANGES)
    exchanges = tuple(_exchange(f"[{number}]", item) for number, item in enumerate(value))
    _refuse_duplicates([exchange.name for exchange in exchanges])
    return exchanges


def _exchange(place: str, item: object) -> ExchangeSettings:
    fields = {str(name).lower(): value for name, value in item.items()} if isinstance(item, Mapping) else {}
    required = {"name", "venue"} if "venue" in fields else {"name", "address"}
    optional = {"shards"} | ({"symbols", "url", "rest_url", "history"} if "venue" in fields else set())
    if not required <= fields.keys() <= required | optional:
        # The message shows the names alone: values could be anything.
        meant = (
            "must be a table of name and address (optional: shards), or of name and venue (optional: symbols, url,"
            " rest_url, history, shards)"
        )
        raise RuleViolation(meant, place, list(fields) or item)
    name = _convert(schema.ExchangeName, fields["name"], f"{place}.name")
    if name.lower() == REFERENCE:
        raise RuleViolation("must be another one: this one is the median over all exchanges", f"{place}.name", name)
    shards = _convert(schema.Shards, fields.get("shards", 1), f"{place}.shards")
    if "venue" in fields:
        return _venue(name, place, fields, shards)
    _check_address(fields["address"], f"{place}.address")
    return ExchangeSettings(name=name, address=str(fields["address"]), shards=shards)


def _venue(name: str, place: str, fields: Mapping[str, object], shards: int) -> ExchangeSettings:
    venue = _convert(schema.VenueName, fields["venue"], f"{place}.venue")
    if not venue:
        raise RuleViolation(f"must be one of {', '.join(schema.VENUES)}", f"{place}.venue", venue)
    for key, schemes in (("url", ("ws", "wss")), ("rest_url", ("http", "https"))):
        url = fields.get(key, "")
        if url != "" and not _is_url(url, schemes):
            raise RuleViolation(
                f"must be a URL that begins with {schemes[1]}:// or {schemes[0]}://", f"{place}.{key}", url
            )
    symbols = fields.get("symbols", [])
    names = symbols if isinstance(symbols, Mapping) else dict.fromkeys(_symbols(symbols) if symbols != [] else (), "")
    native = {str(ours).upper(): str(theirs) for ours, theirs in names.items()}  # dynaconf may change the case of keys
    if native:
        _symbols([*native])
    urls = {key: str(fields.get(key, "")) for key in ("url", "rest_url")}
    history = _convert(schema.History, fields["history"], f"{place}.history") if "history" in fields else ""
    return ExchangeSettings(name=name, venue=venue, symbols=native, history=history, shards=shards, **urls)


def _is_url(url: object, schemes: Sequence[str]) -> bool:
    if not isinstance(url, str) or not re.fullmatch(rf"({'|'.join(schemes)})://[^\s/@]+(/\S*)?", url):
        return False
    try:
        parts = urlsplit(url)
        return is_host(parts.hostname or "") and parts.port != 0
    except ValueError:  # an unclosed bracket, or a port over 65535
        return False


def _alerts(value: object) -> tuple[AlertRule, ...]:
    if not isinstance(value, list | tuple):
        raise RuleViolation(_ALERTS)
    rules = tuple(_alert(f"[{number}]", item) for number, item in enumerate(value))
    ids = [configured_id(rule) for rule in rules]
    if twice := next((number for number, each in enumerate(ids) if each in ids[:number]), None):
        raise RuleViolation("must all be different: this one is there twice", f"[{twice}]", list(value[twice]))
    return rules


def _alert(place: str, item: object) -> AlertRule:
    """Return a rule; messages show the names of its keys alone, since a value may be a secret."""
    fields = {str(name).lower(): value for name, value in item.items()} if isinstance(item, Mapping) else None
    if fields is None:
        raise RuleViolation(_ALERTS, place, item)
    try:
        return convert_rule(fields)
    except InvalidRule as error:
        raise RuleViolation(f"must be a rule: {error}", place, list(fields)) from None


def _host(value: object, kind: Any) -> str:
    host: str = _convert(kind, value)
    if not is_host(host):
        raise RuleViolation(f"must be {kind.__metadata__[0].description}")
    return host


def _store_host(section: str, value: object) -> str:
    """Check a host name, an address or the path of a socket; of a URL, say which settings take its parts."""
    if isinstance(value, str) and (value == "" or value.startswith("/")):
        return cast("str", _convert(schema.HostOrEmbedded, value))
    if not isinstance(value, str) or not re.search(r"[/?#@\[\]]|^[^:]*:[^:]*$", value):
        return _host(value, schema.HostOrEmbedded)
    try:
        parts = urlsplit(value if "://" in value else f"//{value}")
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise RuleViolation("must be a host name or an IP address alone") from None
    if parts.scheme == "unix":
        raise RuleViolation(f'must be the path of the socket alone; write {section}.host = "{parts.path}"')
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
    raise RuleViolation(f"must be a host name or an IP address alone; write {', '.join(meant)}")


def _refuse_duplicates(names: Sequence[str]) -> None:
    """Refuse names that differ in case only, as names match in any case."""
    lower = [name.lower() for name in names]
    for number, name in enumerate(lower):
        if name in lower[:number]:
            raise RuleViolation(f"must all be different, {names[number]} is there twice")


def _data_dir(value: object) -> Path:
    """Return a folder; "" is the default, ~ the home folder."""
    if value == "":
        return schema.default_data_dir()
    try:
        if isinstance(value, Path | str) and "\0" not in str(value):
            return Path(value).expanduser().absolute()
    except (RuntimeError, OSError):
        pass  # ~nobody, or no current folder
    raise RuleViolation('must be the path of a folder, or "" for the default')


def _window_seconds(value: object) -> int:
    """Check that whole minutes consist of whole windows."""
    if type(value) is int and value > 0 and 60 % value == 0:
        return value
    raise RuleViolation("must be a whole number of seconds that divides 60")
