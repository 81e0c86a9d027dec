"""Settings: what can be set, its default and its range, and where a value comes from.

The structs below are the only place that knows a key: the type of a field is its rule, and the text in its `Meta` is
what a person is told when the rule is broken. A key is as good as a later source says: defaults, then settings.toml
(or the file of --config in its place), then the environment, then the flags.

dynaconf reads the files and parses the environment, and nothing else in MarketFlow knows about it. Each source is
read by itself and laid over the last one key by key, because dynaconf's own merging joins lists and keeps `HOST`
beside `host`, and because a message can then say where a bad value came from. Everything else dynaconf would do
unasked is switched off: .env, .secrets and .local files, environments, DYNACONF_* variables, and `@` tokens, which
would turn a password that begins with @ into something else.
"""

import difflib
import json
import os
import re
from collections.abc import Mapping
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol, get_args, get_origin

import msgspec
import platformdirs
from dynaconf import Dynaconf
from dynaconf.loaders import json_loader, toml_loader, yaml_loader
from dynaconf.utils.parse_conf import boolean_fix, parse_conf_data
from msgspec import Meta

from marketflow.errors import SettingsError
from marketflow.model import Mode
from marketflow.resources import resource

PREFIX = "MARKETFLOW_"

# \Z and not $, which would let a trailing line break through. Surrogates are what undecodable bytes become.
_NO_CONTROLS = r"^[^\x00-\x1f\x7f\ud800-\udfff]*\Z"
_HOST = r"^[^\x00-\x20\x7f\"'@,\ud800-\udfff]"
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+(?:%\w+)?\]|[^\s:@/\[\]\"']+):([0-9]{1,5})", re.ASCII)

Port = Annotated[int, Meta(ge=1, le=65535, description="a whole number from 1 to 65535")]
AnyPort = Annotated[int, Meta(ge=0, le=65535, description="a whole number from 0 to 65535")]
Text = Annotated[str, Meta(min_length=1, pattern=_NO_CONTROLS, description="text that is not empty")]
Seconds = Annotated[float, Meta(gt=0, le=86400, description="a number of seconds above 0, at most 86400")]
Rate = Annotated[float, Meta(gt=0, le=1_000_000, description="a number above 0, at most 1000000")]
Host = Annotated[str, Meta(pattern=_HOST + r"+\Z", description="a host name or an IP address")]
HostOrEmbedded = Annotated[
    str, Meta(pattern=_HOST + r"*\Z", description='a host name, an IP address, or "" for the embedded server')
]
Password = Annotated[str, Meta(pattern=r"^[^\x00\ud800-\udfff]*\Z", description="text", extra={"secret": True})]
Token = Annotated[
    str,
    Meta(pattern=r"^[\x21-\x7e]*\Z", description="printable ASCII without spaces", extra={"secret": True}),
]
Symbol = Annotated[
    str,
    Meta(
        pattern=r"^[A-Z0-9][A-Z0-9._/-]{0,31}\Z",
        description="1 to 32 of A-Z 0-9 - _ . / beginning with a letter or a digit",
    ),
]
ExchangeName = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,31}\Z",
        description="1 to 32 letters, digits, - _ . beginning with a letter or a digit",
    ),
]
SslMode = Literal["disable", "allow", "prefer", "require", "verify-ca", "verify-full"]
LogLevel = Literal["TRACE", "DEBUG", "INFO", "SUCCESS", "WARNING", "ERROR", "CRITICAL"]


class _Section(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all settings: its representation shows *** in the place of a secret."""

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self.__rich_repr__())
        return f"{type(self).__name__}({shown})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        values = [(field, getattr(self, field.name)) for field in msgspec.structs.fields(self)]
        return [(field.name, "***" if value and _is_secret(field.type) else value) for field, value in values]


class ExchangeSettings(_Section, frozen=True, kw_only=True):
    """One exchange: the name its prices go by, and the `host:port` of its feed (`[::1]:40101` for IPv6)."""

    name: ExchangeName
    address: str

    @property
    def host(self) -> str:
        """Host of the address, without the brackets of an IPv6 address."""
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """Port of the address."""
        return int(self.address.rpartition(":")[2])


class HttpSettings(_Section, frozen=True, kw_only=True):
    """Where the API listens (port 0: any free one) and the bearer token that switching the mode asks for, if any."""

    host: Host = "127.0.0.1"
    port: AnyPort = 8080
    token: Token = ""


class PostgresSettings(_Section, frozen=True, kw_only=True):
    """Where candles are stored; no host means the embedded PostgreSQL."""

    host: HostOrEmbedded = ""
    port: Port = 5432
    user: Text = "marketflow"
    password: Password = ""
    dbname: Text = "marketflow"
    sslmode: SslMode = "prefer"


class RedisSettings(_Section, frozen=True, kw_only=True):
    """Where recent prices are cached, and for how long; no host means the embedded Redis."""

    host: HostOrEmbedded = ""
    port: Port = 6379
    password: Password = ""
    db: Annotated[int, Meta(ge=0, le=65535, description="a whole number from 0 to 65535")] = 0
    ttl_seconds: Annotated[int, Meta(ge=1, le=86400, description="a whole number of seconds from 1 to 86400")] = 70


class FlowSettings(_Section, frozen=True, kw_only=True):
    """How ticks are worked on, and how old or late they may be."""

    workers_per_exchange: Annotated[int, Meta(ge=1, le=64, description="a whole number from 1 to 64")] = 5
    db_batch_size: Annotated[int, Meta(ge=1, le=10_000, description="a whole number from 1 to 10000")] = 200
    stale_after_seconds: Seconds = 15.0
    max_clock_skew_seconds: Seconds = 5.0
    late_after_seconds: Seconds = 2.0


class GeneratorSettings(_Section, frozen=True, kw_only=True):
    """Test mode: ticks a second and exchange, and the seed that makes them repeatable."""

    rate: Rate = 100.0
    seed: Annotated[
        Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None,
        Meta(description="a whole number of at most 64 bits, or left out"),
    ] = None


class LogSettings(_Section, frozen=True, kw_only=True):
    """How much is logged, and as what."""

    level: LogLevel = "INFO"
    format: Literal["text", "json"] = "text"


def _user_data_dir() -> Path:
    return platformdirs.user_data_path("marketflow")


class Settings(_Section, frozen=True, kw_only=True):
    """All settings. Made by `load`, which checks them; handed on by argument."""

    mode: Mode = Mode.TEST
    symbols: tuple[Symbol, ...] = ("BTCUSDT", "DOGEUSDT", "TONUSDT", "SOLUSDT", "ETHUSDT")
    exchanges: tuple[ExchangeSettings, ...] = (
        ExchangeSettings(name="exchange1", address="127.0.0.1:40101"),
        ExchangeSettings(name="exchange2", address="127.0.0.1:40102"),
        ExchangeSettings(name="exchange3", address="127.0.0.1:40103"),
    )
    data_dir: Path = msgspec.field(default_factory=_user_data_dir)
    http: HttpSettings = HttpSettings()
    postgres: PostgresSettings = PostgresSettings()
    redis: RedisSettings = RedisSettings()
    flow: FlowSettings = FlowSettings()
    generator: GeneratorSettings = GeneratorSettings()
    log: LogSettings = LogSettings()


class _Given(NamedTuple):
    """A value that a source gives, and the name of the source: a file, a variable, or nothing for a flag."""

    value: object
    origin: str


class _Wrong(Exception):
    """A value, or the part of it at `place`, breaks its rule; the text says what is allowed."""

    def __init__(self, allowed: str, place: str = "", part: object = None) -> None:
        super().__init__(allowed)
        self.place = place
        self.part = part

    def line(self, key: str, value: object) -> str:
        """The problem on one line: `http.port = 99999: must be ...`, `exchanges[0].name = "": must be ...`."""
        return f"{key}{self.place} = {_shown(key, self.part if self.place else value)}: {self}"


def load(config: Path | None = None, overrides: Mapping[str, object] | None = None) -> Settings:
    """Read all sources and check every key.

    `config` is a TOML, YAML or JSON file that is read in the place of settings.toml. `overrides` are dotted keys with
    their values, such as {"http.port": 0}, and win over everything.

    Raises:
        SettingsError: a file can't be read, a key is unknown or a value is wrong; one line for each problem.
    """
    given: dict[str, _Given] = {}
    path = config or _settings_file()
    if path is not None:
        given |= _from_file(path)
    given |= _from_environment()
    given |= {key: _Given(value, "") for key, value in (overrides or {}).items()}
    return _settings(given)


def convert(key: str, text: str) -> Any:
    """The value of one key from the text of a command line flag, checked as if it came from the environment.

    The name of an exchange has the key `exchange.name`.

    Raises:
        SettingsError: `99999: must be a whole number from 0 to 65535`.
    """
    value = _parsed(key, text)
    try:
        return _checked(key, value)
    except _Wrong as wrong:
        raise SettingsError(wrong.line("", value).removeprefix(" = ")) from None


# --- the keys, read off the structs


def _meta(kind: Any) -> Meta | None:
    return next((extra for extra in get_args(kind)[1:] if isinstance(extra, Meta)), None)


def _is_secret(kind: Any) -> bool:
    meta = _meta(kind)
    return meta is not None and bool((meta.extra or {}).get("secret"))


@cache
def _sections() -> dict[str, type[_Section]]:
    return {
        field.name: field.type
        for field in msgspec.structs.fields(Settings)
        if isinstance(field.type, type) and issubclass(field.type, _Section)
    }


@cache
def _kinds() -> dict[str, Any]:
    """Type of each key; the keys are dotted."""
    kinds = {field.name: field.type for field in msgspec.structs.fields(Settings) if field.name not in _sections()}
    for section, struct in _sections().items():
        kinds |= {f"{section}.{field.name}": field.type for field in msgspec.structs.fields(struct)}
    return kinds


def _kind(key: str) -> Any:
    return ExchangeName if key == "exchange.name" else _kinds()[key]


def _choices(kind: Any) -> tuple[str, ...]:
    """The words a key can be set to, when it's one of a few."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return tuple(kind) if isinstance(kind, type) and issubclass(kind, StrEnum) else ()


def _is_text(kind: Any) -> bool:
    base = get_args(kind)[0] if _meta(kind) else kind
    return base in (str, Path) or bool(_choices(kind))


# --- the sources


class _Loader(Protocol):
    def load(self, obj: Any, *, env: str, filename: list[str], silent: bool) -> None: ...


_LOADERS: dict[str, _Loader] = {
    ".toml": toml_loader,
    ".yaml": yaml_loader,
    ".yml": yaml_loader,
    ".json": json_loader,
}

_PLAIN: Mapping[str, object] = {"AUTO_CAST_FOR_DYNACONF": False, "DYNABOXIFY": False}
"""Tells dynaconf's parser to leave `@` tokens alone and to return plain dicts."""


def _settings_file() -> Path | None:
    here = Path("settings.toml")
    if here.exists():
        return here
    try:
        return resource("settings.toml")
    except FileNotFoundError:
        return None


def _reader() -> Any:
    """A dynaconf that has loaded nothing yet, whatever variables it would listen to by itself.

    The two options in lower case are not heeded in upper case.
    """
    return Dynaconf(
        dynaconf_skip_loaders=True,
        load_dotenv=False,
        ENVIRONMENTS_FOR_DYNACONF=False,
        MERGE_ENABLED_FOR_DYNACONF=False,
        AUTO_CAST_FOR_DYNACONF=False,
        ENCODING_FOR_DYNACONF="utf-8",
        YAML_LOADER_FOR_DYNACONF="safe_load",
        COMMENTJSON_ENABLED_FOR_DYNACONF=False,
        DOTTED_LOOKUP_FOR_DYNACONF=True,
        NESTED_SEPARATOR_FOR_DYNACONF=False,
        INDEX_SEPARATOR_FOR_DYNACONF=False,
        VALIDATE_ON_UPDATE_FOR_DYNACONF=False,
        SYSENV_FALLBACK_FOR_DYNACONF=False,
    )


def _from_file(path: Path) -> dict[str, _Given]:
    loader = _LOADERS.get(path.suffix)
    if loader is None:
        raise SettingsError(f"{path}: must be a file that ends in .toml, .yaml, .yml or .json")
    reader = _reader()
    own = set(reader.as_dict())
    try:
        path.open("rb").close()  # dynaconf would only warn about a file that it can't open
        # _envless: the top level holds keys, not environments. A list, for a string would be split at its commas.
        loader.load(reader, env="_envless", filename=[str(path)], silent=False)
    except OSError as error:
        raise SettingsError(f"{path}: can't be read: {error.strerror}") from None
    except Exception as error:  # each format has errors of its own, and odd data trips dynaconf itself
        raise SettingsError(f"{path}: {_malformed(error)}") from None
    return _flat({key: value for key, value in reader.as_dict().items() if key not in own}, str(path))


def _malformed(error: Exception) -> str:
    """What is wrong with a file. Never a piece of it, which could be a secret."""
    if isinstance(error, UnicodeDecodeError):
        return f"is not UTF-8 text (byte {error.start})"
    if isinstance(error, ValueError):  # tomllib and json: a fixed text with line and column
        return f"malformed: {error}"
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return f"malformed YAML: line {mark.line + 1}, column {mark.column + 1}"
    return "must hold a table of settings"


def _from_environment() -> dict[str, _Given]:
    given: dict[str, _Given] = {}
    for name, text in os.environ.items():
        if name.startswith(PREFIX) and not _is_service_link(name, text):
            key = name.removeprefix(PREFIX).replace("__", ".").lower()
            given |= _flat({key: _parsed(key, text)}, name)
    return given


def _is_service_link(name: str, text: str) -> bool:
    """Whether Kubernetes has put it there: it describes a service named marketflow-... to every pod beside it."""
    link = re.search(r"_SERVICE_(HOST|PORT)(_\w+)?\Z|_PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?\Z", name)
    return "__" not in name and (link is not None or text.startswith(("tcp://", "udp://", "sctp://")))


def _parsed(key: str, text: str) -> object:
    """The text of a variable or flag as dynaconf reads it, in TOML; literally where text is asked for.

    A password 007, 1e5 or true is no number to anybody but a parser.
    """
    if key == "exchange.name" or _is_text(_kinds().get(key)):
        return text
    try:
        value: object = parse_conf_data(boolean_fix(text), tomlfy=True, box_settings=_PLAIN)
        if value == text and text.lstrip().startswith(("[", "{")):
            value = json.loads(text)  # not TOML, whose tables have = in the place of :
    except (ValueError, RecursionError):
        return text
    return text if key == "symbols" and not isinstance(value, list) else value


def _flat(data: Mapping[object, object], origin: str, prefix: str = "") -> dict[str, _Given]:
    """Nested tables as dotted keys in lower case."""
    flat: dict[str, _Given] = {}
    for name, value in data.items():
        key = f"{prefix}{name}".lower()
        if isinstance(value, Mapping):
            flat |= _flat(value, origin, f"{key}.")
        else:
            flat[key] = _Given(value, origin)
    return flat


# --- the checks


def _settings(given: Mapping[str, _Given]) -> Settings:
    values: dict[str, Any] = {}
    problems: list[str] = []
    for key, (value, origin) in given.items():
        source = f" (from {origin})" if origin else ""
        if key in _sections():
            fields = ", ".join(_sections()[key].__struct_fields__)
            problems.append(f"{key}: must be a table of {fields}{source}")
        elif key not in _kinds():
            problems.append(f"{key}: {_unknown(key, [*_kinds(), *_sections()])}{source}")
        else:
            try:
                values[key] = _checked(key, value)
            except _Wrong as wrong:
                problems.append(f"{wrong.line(key, value)}{source}")
    if problems:
        raise SettingsError("\n".join(problems))
    return _built(values)


def _built(values: Mapping[str, Any]) -> Settings:
    whole: dict[str, Any] = {key: value for key, value in values.items() if "." not in key}
    for section, struct in _sections().items():
        fields = {
            name: values[f"{section}.{name}"] for name in struct.__struct_fields__ if f"{section}.{name}" in values
        }
        whole[section] = struct(**fields)
    return Settings(**whole)


def _checked(key: str, value: object) -> Any:
    """The value as its key's type.

    Raises:
        _Wrong: with what is allowed.
    """
    match key:
        case "symbols":
            return _symbols(value)
        case "exchanges":
            return _exchanges(value)
        case "data_dir":
            return _data_dir(value)
    return _scalar(_kind(key), value)


def _scalar(kind: Any, value: object) -> Any:
    choices = _choices(kind)
    if choices and isinstance(value, str):
        value = next((choice for choice in choices if choice.lower() == value.lower()), value)
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError:
        meta = _meta(kind)
        allowed = f"one of {', '.join(choices)}" if choices else meta.description if meta else "text"
        quotes = "; put it in quotes" if meta and _is_text(kind) and not isinstance(value, str) else ""
        raise _Wrong(f"must be {allowed}{quotes}") from None


def _symbols(value: object) -> tuple[str, ...]:
    """A list, or one text with commas or spaces between the symbols."""
    symbols = re.split(r"[,\s]+", value.strip(", \t")) if isinstance(value, str) else value
    if not isinstance(symbols, list) or not symbols or symbols == [""]:
        raise _Wrong('must be a list of one or more symbols, such as ["BTCUSDT", "ETHUSDT"]')
    for number, symbol in enumerate(symbols):
        _part(Symbol, symbol, f"[{number}]")
    _refuse_twins(symbols)
    return tuple(symbols)


def _exchanges(value: object) -> tuple[ExchangeSettings, ...]:
    if not isinstance(value, list) or not value:
        raise _Wrong('must be a list of one or more exchanges, such as [{name="exchange1", address="127.0.0.1:40101"}]')
    exchanges = tuple(_exchange(number, item) for number, item in enumerate(value))
    _refuse_twins([exchange.name for exchange in exchanges])
    return exchanges


def _exchange(number: int, item: object) -> ExchangeSettings:
    place = f"[{number}]"
    fields = {str(name).lower(): value for name, value in item.items()} if isinstance(item, Mapping) else {}
    if fields.keys() != {"name", "address"}:  # the message shows the names alone: values could be anything
        raise _Wrong("must be a table of name and address, and of nothing else", place, list(fields) or item)
    name = _part(ExchangeName, fields["name"], f"{place}.name")
    address = fields["address"]
    match = _ADDRESS.fullmatch(address) if isinstance(address, str) else None
    if match is None or not 1 <= int(match[2]) <= 65535:
        raise _Wrong("must be host:port, the port from 1 to 65535", f"{place}.address", address)
    return ExchangeSettings(name=name, address=match[0])


def _part(kind: Any, value: object, place: str) -> Any:
    try:
        return _scalar(kind, value)
    except _Wrong as wrong:
        raise _Wrong(str(wrong), place, value) from None


def _data_dir(value: object) -> Path:
    """A folder; "" is the platform's folder for data of the user, ~ the home folder."""
    if value == "":
        return _user_data_dir()
    try:
        if isinstance(value, Path | str) and "\0" not in str(value):
            return Path(value).expanduser().absolute()
    except (RuntimeError, OSError):
        pass  # ~nobody, or no current folder
    raise _Wrong('must be the path of a folder, or "" for the usual place')


def _refuse_twins(names: list[str]) -> None:
    """Names are matched without regard to case, so they must differ in more than that."""
    seen: set[str] = set()
    for name in names:
        if name.lower() in seen:
            raise _Wrong(f"must all be different, {name} is there twice")
        seen.add(name.lower())


def _unknown(key: str, known: list[str]) -> str:
    by_ending = [name for name in known if name.endswith(f".{key}")]
    nearest = (by_ending or difflib.get_close_matches(key, known, n=1, cutoff=0.0))[0]
    return f"unknown key, did you mean {nearest}?"


def _shown(key: str, value: object) -> str:
    """A value for a message: short, on one line, and without what is or looks like a secret."""
    if key in _kinds() and _is_secret(_kinds()[key]):
        return "***"
    text = json.dumps(value) if isinstance(value, str) else ascii(value)
    text = re.sub(r"://.*@", "://***@", text)  # a URL in the wrong place may hold a password
    return text if len(text) <= 200 else f"{text[:200]}..."
