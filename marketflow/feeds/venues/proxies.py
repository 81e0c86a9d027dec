"""The proxy through which a venue is reached, by the usual environment variables; REST and WebSocket find the same.

HTTPS_PROXY holds for https and wss, HTTP_PROXY for http and ws, ALL_PROXY for both, none of them for the hosts in
NO_PROXY. A ws address takes HTTPS_PROXY where there is no HTTP_PROXY, since its connection is tunnelled in any case.
"""

from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from marketflow.text import host_port, is_host

_VARIABLES = {
    "wss": ("wss", "https", "all"),
    "ws": ("ws", "http", "https", "all"),
    "https": ("https", "all"),
    "http": ("http", "all"),
}
"""Whose proxies are used for a scheme, in this order."""

_SCHEMES = ("http", "https", "socks5", "socks5h")


class ProxyUnusable(OSError):
    """The address of a proxy in the environment is none."""


def proxy_for(url: str) -> str | None:
    """The address of the proxy for a URL, with the credentials in it; None for none.

    Raises:
        ProxyUnusable: what the environment names is none; without its words, which may hold a password.
    """
    parts = urlsplit(url)
    if proxy_bypass(host_port(parts.hostname or "", parts.port or 0)):
        return None
    proxies = getproxies()
    found = next((proxies[each] for each in _VARIABLES.get(parts.scheme, ()) if proxies.get(each)), None)
    if found is None:
        return None
    address = found if "://" in found else f"http://{found}"
    try:
        proxy = urlsplit(address)
        is_valid = proxy.scheme in _SCHEMES and is_host(proxy.hostname or "") and proxy.port != 0
        is_valid = is_valid and proxy.path in ("", "/") and not (proxy.query or proxy.fragment)
    except ValueError:
        is_valid = False
    if not is_valid:
        known = ", ".join(f"{each}://" for each in _SCHEMES)
        raise ProxyUnusable(f"the proxy for {parts.scheme} in the environment is no address of {known}")
    # The same: a name is looked up by the proxy in either case, and not all libraries know both.
    return "socks5://" + address[len("socks5h://") :] if proxy.scheme == "socks5h" else address


def proxy_place(proxy: str) -> str:
    """The address of a proxy as it may be shown: without credentials."""
    parts = urlsplit(proxy)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
