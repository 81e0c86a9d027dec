"""Types of option values, and the options that several commands have."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import click

from marketflow.cli.command import Option
from marketflow.errors import SettingsError
from marketflow.text import is_host, words

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

_Callback = TypeVar("_Callback", bound=Callable[..., Any])

MAX_WORKERS = 64

SETTINGS_FLAGS = {
    "host": "http.host",
    "port": "http.port",
    "data_dir": "data_dir",
    "mode": "mode",
    "symbols": "symbols",
    "venues": "exchanges",
}
"""Options that set a setting, and the keys of the settings."""


class Choice(click.Choice[str]):
    """One of several words."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        """Name the value and the words that are allowed."""
        return f"invalid choice: {value!r} (choose from {', '.join(self.choices)})"


class Setting(click.ParamType[Any]):
    """A value that follows the rule of a setting; `suggestions` are offered by completion."""

    name = "setting"

    def __init__(self, key: str, suggestions: Sequence[str] = ()) -> None:
        self._key = key
        self._suggestions = suggestions

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Convert the text of an argument, as if it came from the environment."""
        from marketflow import settings

        try:
            return settings.convert(self._key, value)
        except SettingsError as error:
            self.fail(str(error), param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
        """Suggest the words that begin like the argument."""
        return _completions(self._suggestions, incomplete)


class Symbols(Setting):
    """One or more symbols with commas or spaces between them, in any case, as a tuple."""

    def __init__(self) -> None:
        super().__init__("symbols")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Convert the text of an argument."""
        return tuple(super().convert(value.upper(), param, ctx))


class ExchangeNames(Setting):
    """One or more names of exchanges with commas or spaces between them, as a tuple."""

    def __init__(self) -> None:
        super().__init__("exchange.name")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Convert the text of an argument."""
        names = tuple(super(ExchangeNames, self).convert(name, param, ctx) for name in words(value))
        return names or self.fail(f"{value!r}: must name one or more exchanges", param, ctx)


class Venue(click.ParamType[str]):
    """The name of a venue."""

    name = "venue"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Convert the text of an argument."""
        if (name := str(value).strip().lower()) in _venues():
            return name
        return self.fail(f"{value!r}: no such venue; there are {', '.join(_venues())}", param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
        """Suggest the venues that begin like the argument."""
        return _completions(_venues(), incomplete)


class Venues(Venue):
    """One or more names of venues with commas or spaces between them; each venue is an exchange of that name."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Convert the text of an argument to the setting `exchanges`."""
        if not isinstance(value, str):
            return value
        names = [super(Venues, self).convert(name, param, ctx) for name in words(value)]
        if not names:
            self.fail(f"{value!r}: must name one or more venues", param, ctx)
        if len(set(names)) < len(names):
            self.fail(f"{value!r}: a venue is named twice", param, ctx)
        return [{"name": name, "venue": name} for name in names]

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
        """Suggest the venues that are not named yet."""
        before, comma, _ = incomplete.rpartition(",")
        named = before.split(",")
        return _completions([before + comma + name for name in _venues() if name not in named], incomplete)


def _completions(allowed: Iterable[str], incomplete: str) -> "list[CompletionItem]":
    """Return what may stand in place of an argument that is not complete."""
    from click.shell_completion import CompletionItem  # no command needs it

    return [CompletionItem(word) for word in allowed if word.startswith(incomplete)]


def _venues() -> tuple[str, ...]:
    from marketflow.settings import VENUES

    return VENUES


class Interval(click.ParamType[str]):
    """The interval of candles, as in the API."""

    name = "interval"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Convert the text of an argument."""
        if value in _intervals():
            return str(value)
        return self.fail(f"{value!r}: must be one of {', '.join(_intervals())}", param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
        """Suggest the intervals that begin like the argument."""
        return _completions(_intervals(), incomplete)


def _intervals() -> tuple[str, ...]:
    from marketflow.api.queries.boundaries import INTERVALS

    return tuple(INTERVALS)


class Columns(click.ParamType[tuple[str, ...]]):
    """One or more names of columns with commas or spaces between them, as a tuple."""

    name = "columns"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Convert the text of an argument."""
        return tuple(words(value.lower())) or self.fail(f"{value!r}: must name one or more columns", param, ctx)


class Moment(click.ParamType[int]):
    """A point in time, in Unix ms: an RFC 3339 time, a date, Unix ms, `now` or `-24h`."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Convert the text of an argument."""
        from marketflow.clock import milliseconds, system_clock
        from marketflow.time_parsing import parse_time_ms

        try:
            return parse_time_ms(value, milliseconds(system_clock()))
        except ValueError as error:
            self.fail(f"{value!r}: {error}", param, ctx)


class WorkerCount(click.ParamType[int]):
    """A number of worker processes."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Convert the text of an argument."""
        if value.isascii() and value.isdecimal() and len(value) < 10 and 1 <= int(value) <= MAX_WORKERS:
            return int(value)
        return self.fail(f"{value!r}: must be a whole number from 1 to {MAX_WORKERS}", param, ctx)


class BaseUrl(click.ParamType[str]):
    """The URL of a MarketFlow server, without a trailing slash."""

    name = "url"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Convert the text of an argument. The message leaves out credentials."""
        with suppress(ValueError):  # an unclosed bracket, or the port is no number
            parts = urlsplit(value)
            is_base = parts.scheme in ("http", "https") and not parts.query + parts.fragment
            if is_base and is_host(parts.hostname or "") and parts.port != 0:
                return str(value.rstrip("/"))
        shown = value.rpartition("@")[2]
        return self.fail(f"{shown!r}: must be the URL of a MarketFlow, such as http://127.0.0.1:8080", param, ctx)


def option(name: str, *names: str, **attributes: Any) -> Callable[[_Callback], _Callback]:
    """Return the decorator that adds an option to a command."""
    return click.option(name, *names, cls=Option, **attributes)


def config_option() -> Callable[[_Callback], _Callback]:
    """Return the decorator that adds `--config`."""
    help_text = "Settings file in TOML, YAML or JSON, read instead of settings.toml."
    return option("--config", metavar="FILE", type=click.Path(path_type=Path), help=help_text)


def data_dir_option() -> Callable[[_Callback], _Callback]:
    """Return the decorator that adds `--data-dir`."""
    help_text = "Folder of the embedded servers.  [that of the settings]"
    return option("--data-dir", metavar="FOLDER", type=Setting("data_dir"), help=help_text)


def mode_option(help_text: str) -> Callable[[_Callback], _Callback]:
    """Return the decorator that adds `--mode`."""
    return option("--mode", metavar="test|live", type=Setting("mode", ("test", "live")), help=help_text)


def settings_options(callback: _Callback) -> _Callback:
    """Add the options that set settings, and `--config`."""
    for decorate in (
        mode_option("Mode at the start."),
        config_option(),
        data_dir_option(),
        option("--host", metavar="H", type=Setting("http.host"), help="Address on which the API listens."),
        option("--port", metavar="N", type=Setting("http.port"), help="Port of the API; 0: any free port."),
        option("--symbols", metavar="A,B", type=Symbols(), help="Symbols to ingest.  [those of the settings]"),
        option(
            "--venues",
            metavar="A,B",
            type=Venues(),
            help="Venues to ingest from, in live mode: binance, coinbase, kraken, okx, bybit.",
        ),
    ):
        callback = decorate(callback)
    return callback


def settings_given(**values: object) -> dict[str, object]:
    """Return the settings that options set, by their keys; None is an option that was not given."""
    given = {SETTINGS_FLAGS[name]: value for name, value in values.items() if value is not None}
    if "exchanges" in given:
        given.setdefault("mode", "live")  # a choice of venues implies live prices
    return given
