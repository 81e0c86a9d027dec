"""Text as it is shown to a person: control characters escaped, credentials removed, times in RFC 3339; and names
of hosts.
"""

import re
from datetime import datetime
from ipaddress import IPv6Address, ip_address
from os import strerror
from ssl import SSLError
from urllib.parse import urlsplit, urlunsplit

_URL = re.compile(r"(\w+://)(?:[^\s/?#]*@)?([^\s?#]*)(?:[?#]\S*)?")
_SYSTEM_ERROR = re.compile(r"\[Errno -?\d+\] ")
_TLS_DETAIL = re.compile(r"^\[SSL[^\]]*\] | \(_ssl\.c:\d+\)$")


def visible(text: str) -> str:
    """Return a text with control characters escaped, except line feeds."""
    return "".join(
        each if each.isprintable() or each == "\n" else each.encode("unicode_escape").decode("ascii") for each in text
    )


def one_line(text: str) -> str:
    """Return a text with runs of white space as one blank and control characters escaped."""
    return visible(" ".join(text.split()))


def words(text: str) -> list[str]:
    """Return the items of a list that is written with commas or spaces: `A,B`, `A B`, `A, B`."""
    return text.replace(",", " ").split()


def without_credentials(url: str) -> str:
    """Return a URL without user and password."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def without_secrets(text: str) -> str:
    """Return a text whose URLs have neither user and password nor a query, which may hold a key."""
    return _URL.sub(r"\1\2", text)


def failure_text(error: Exception) -> str:
    """Return the text of an error, or its class, without secrets and without the number of a system error."""
    return without_secrets(_SYSTEM_ERROR.sub("", str(error))) or type(error).__name__


def connection_error_text(error: Exception) -> str:
    """Return why a connection failed, as the operating system or TLS describes it if one of them does.

    HTTP clients wrap such an error, often with a text that says less.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, SSLError):
            return f"TLS: {_TLS_DETAIL.sub('', str(cause))}"
        if isinstance(cause, OSError) and cause.errno:
            # asyncio rewords messages, so take them from errno; failed name resolution has a negative errno.
            return strerror(cause.errno) if cause.errno > 0 else str(cause.strerror)
        cause = cause.__cause__ or cause.__context__
    return failure_text(error)


def host_port(host: str, port: int) -> str:
    """Return an address as in a URL: `127.0.0.1:6379`, `[::1]:6379`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_host(text: str) -> bool:
    """Return whether a text can be looked up as a host: Python's resolver raises UnicodeError for `redis..svc`."""
    try:
        return bool(text.encode("idna"))
    except UnicodeError:  # a label is empty or over 63 bytes
        return False


def rfc3339(moment: datetime) -> str:
    """Return a UTC time in RFC 3339 with milliseconds: `2026-11-01T09:30:00.000Z`."""
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def is_loopback(host: str) -> bool:
    """Return whether a host is localhost or a loopback address."""
    if host.lower() == "localhost":
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (mapped or address).is_loopback
