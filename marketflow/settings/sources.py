"""Sources of settings, by increasing precedence: settings.toml (or the file of --config), environment, options.

dynaconf reads the files and parses the environment; no other module uses it. Sources are read separately and merged key
by key, because dynaconf's merging joins lists and keeps `HOST` beside `host`, and because messages name the source of a
value. dynaconf's other features are switched off: .env, .secrets and .local files, environments, DYNACONF_* variables,
and `@` tokens, which would change a password that begins with @.
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
from marketflow.settings.schema import KINDS, is_text

_PREFIX = "MARKETFLOW_"
_LOADERS: dict[str, Any] = {".toml": toml_loader, ".yaml": yaml_loader, ".yml": yaml_loader, ".json": json_loader}

_LISTS = ("symbols", "exchanges", "http.allowed_hosts", "http.allowed_origins", "http.trusted_proxies")
"""Keys whose variable may hold items separated by commas or spaces."""

Values = dict[str, tuple[object, str]]
"""Value and source by dotted key in lower case; the source is a file, a variable, or "" for an option."""


def read_sources(config: Path | None, flags: Mapping[str, object]) -> Values:
    """Read and merge all sources.

    Raises:
        SettingsError: a file cannot be read.
    """
    path = config or _settings_file()
    found = _from_file(path) if path else {}
    return found | _from_environment() | {key: (value, "") for key, value in flags.items()}


def parse_text(key: str, text: str) -> object:
    """Parse the text of a variable or option as TOML, as dynaconf does; keys of type text keep it literally.

    A password such as 007, 1e5 or true is text.
    """
    if is_text(KINDS.get(key)):
        return text
    try:
        value: object = parse_with_toml(boolean_fix(text))
        if value == text and text.lstrip().startswith(("[", "{")):
            value = json.loads(text)  # JSON, whose objects have : where tables of TOML have =
    except (ValueError, RecursionError):
        return text
    return text if key in _LISTS and not isinstance(value, list) else value


def variable(key: str) -> str:
    """Return the name of the environment variable of a dotted key: `MARKETFLOW_HTTP__PORT` for `http.port`."""
    return f"{_PREFIX}{key.upper().replace('.', '__')}"


def own_settings_file() -> Path | None:
    """Return settings.toml in the working directory, if there is one."""
    here = "settings.toml"
    return Path(here) if os.path.exists(here) else None  # Path.exists raises in a folder without permission


def _settings_file() -> Path | None:
    if (own := own_settings_file()) is not None:
        return own
    try:
        return resource("settings.toml")
    except FileNotFoundError:
        return None


def _from_file(path: Path) -> Values:
    loader = _LOADERS.get(path.suffix)
    if loader is None:
        raise SettingsError(f"{path}: must be a file that ends in .toml, .yaml, .yml or .json")
    reader = _reader()
    own = set(reader.as_dict())
    try:
        _check_readable(path)
        # _envless: the top level holds keys, not environments. A list, because a string is split at commas.
        loader.load(reader, env="_envless", filename=[str(path)], silent=False)
    except OSError as error:
        raise SettingsError(f"{path}: can't be read: {error.strerror}") from None
    except SettingsError:
        raise
    except Exception as error:  # noqa: BLE001 - each format has its own errors, and dynaconf fails on unusual data
        raise SettingsError(f"{path}: {_malformed(error)}") from None
    return _flat({key: value for key, value in reader.as_dict().items() if key not in own}, str(path))


def _check_readable(path: Path) -> None:
    """Check that a path is a readable regular file: dynaconf only warns about others, and blocks on a FIFO.

    Raises:
        OSError: it cannot be opened.
        SettingsError: it is not a regular file.
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
    """Return a dynaconf that has loaded nothing and ignores its own variables.

    The two options in lower case have no effect in upper case.
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
    """Return the fault of a file, without any of its text, which could be a secret."""
    if isinstance(error, UnicodeDecodeError):
        return f"is not UTF-8 text (byte {error.start})"
    if isinstance(error, ValueError):  # tomllib and json: a fixed text with line and column
        return f"malformed: {error}"
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return f"malformed YAML: line {mark.line + 1}, column {mark.column + 1}"
    return "must hold a table of settings"


def _from_environment() -> Values:
    found: Values = {}
    for name, text in os.environ.items():
        if name.startswith(_PREFIX) and not _is_service_link(name, text):
            key = name.removeprefix(_PREFIX).replace("__", ".").lower()
            found |= _flat({key: parse_text(key, text)}, name)
    return found


def _is_service_link(name: str, text: str) -> bool:
    """Return whether Kubernetes has set a variable: it describes services, such as marketflow-..., to every pod."""
    link = re.search(r"_SERVICE_(HOST|PORT)(_\w+)?\Z|_PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?\Z", name)
    return "__" not in name and (link is not None or text.startswith(("tcp://", "udp://", "sctp://")))


def _flat(data: Mapping[object, object], origin: str, prefix: str = "") -> Values:
    flat: Values = {}
    for name, value in data.items():
        key = f"{prefix}{name}".lower()
        flat |= _flat(value, origin, f"{key}.") if isinstance(value, Mapping) else {key: (value, origin)}
    return flat
