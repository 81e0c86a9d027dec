"""The sources: defaults, then settings.toml (or the file of --config), then the environment, then the flags.

dynaconf reads the files and parses the environment, and nothing else in MarketFlow knows about it. Each source is
read by itself and laid over the last one key by key, because dynaconf's own merging joins lists and keeps `HOST`
beside `host`, and because a message can then say where a bad value came from. Everything else dynaconf would do
unasked is switched off: .env, .secrets and .local files, environments, DYNACONF_* variables, and `@` tokens, which
would turn a password that begins with @ into something else.
"""

import errno
import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynaconf import Dynaconf
from dynaconf.loaders import json_loader, toml_loader, yaml_loader
from dynaconf.utils.parse_conf import boolean_fix, parse_with_toml

from marketflow.errors import SettingsError
from marketflow.resources import resource
from marketflow.settings.model import KINDS, is_text

_PREFIX = "MARKETFLOW_"
_LOADERS: dict[str, Any] = {".toml": toml_loader, ".yaml": yaml_loader, ".yml": yaml_loader, ".json": json_loader}

_LISTS = ("symbols", "http.allowed_hosts", "http.allowed_origins", "http.trusted_proxies")
"""Keys whose value in a variable may also be one text with commas or spaces between the items."""

Given = dict[str, tuple[object, str]]
"""By dotted key in lower case: the value, and the name of its source (a file, a variable, or nothing for a flag)."""


def given(config: Path | None, flags: Mapping[str, object]) -> Given:
    """What the sources say.

    Raises:
        SettingsError: a file can't be read.
    """
    path = config or _settings_file()
    found = _from_file(path) if path else {}
    return found | _from_environment() | {key: (value, "") for key, value in flags.items()}


def parsed(key: str, text: str) -> object:
    """The text of a variable or flag as dynaconf reads it, in TOML; literally where text is asked for.

    A password 007, 1e5 or true is no number to anybody but a parser.
    """
    if is_text(KINDS.get(key)):
        return text
    try:
        value: object = parse_with_toml(boolean_fix(text))
        if value == text and text.lstrip().startswith(("[", "{")):
            value = json.loads(text)  # not TOML, whose tables have = in the place of :
    except (ValueError, RecursionError):
        return text
    return text if key in _LISTS and not isinstance(value, list) else value


def _settings_file() -> Path | None:
    here = "settings.toml"
    if os.path.exists(here):  # not Path's, which raises in a folder that may not be entered
        return Path(here)
    try:
        return resource("settings.toml")
    except FileNotFoundError:
        return None


def _from_file(path: Path) -> Given:
    loader = _LOADERS.get(path.suffix)
    if loader is None:
        raise SettingsError(f"{path}: must be a file that ends in .toml, .yaml, .yml or .json")
    reader = _reader()
    own = set(reader.as_dict())
    try:
        _open_once(path)
        # _envless: the top level holds keys, not environments. A list, for a string would be split at its commas.
        loader.load(reader, env="_envless", filename=[str(path)], silent=False)
    except OSError as error:
        raise SettingsError(f"{path}: can't be read: {error.strerror}") from None
    except SettingsError:
        raise
    except Exception as error:  # noqa: BLE001 - each format has errors of its own, and odd data trips dynaconf itself
        raise SettingsError(f"{path}: {_malformed(error)}") from None
    return _flat({key: value for key, value in reader.as_dict().items() if key not in own}, str(path))


def _open_once(path: Path) -> None:
    """Make sure that there is a regular file to read: dynaconf only warns about others, and waits for a FIFO's writer.

    Raises:
        OSError: it can't be opened.
        SettingsError: it is something else than a regular file.
    """
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if stat.S_ISDIR(mode := os.fstat(file).st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(mode):
            raise SettingsError(f"{path}: must be a regular file")
    finally:
        os.close(file)


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


def _from_environment() -> Given:
    found: Given = {}
    for name, text in os.environ.items():
        if name.startswith(_PREFIX) and not _is_service_link(name, text):
            key = name.removeprefix(_PREFIX).replace("__", ".").lower()
            found |= _flat({key: parsed(key, text)}, name)
    return found


def _is_service_link(name: str, text: str) -> bool:
    """Whether Kubernetes has put it there: it describes a service named marketflow-... to every pod beside it."""
    link = re.search(r"_SERVICE_(HOST|PORT)(_\w+)?\Z|_PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?\Z", name)
    return "__" not in name and (link is not None or text.startswith(("tcp://", "udp://", "sctp://")))


def _flat(data: Mapping[object, object], origin: str, prefix: str = "") -> Given:
    flat: Given = {}
    for name, value in data.items():
        key = f"{prefix}{name}".lower()
        flat |= _flat(value, origin, f"{key}.") if isinstance(value, Mapping) else {key: (value, origin)}
    return flat
