"""A venue behind a proxy that the environment names: stream and REST go through it, and its faults have its name."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from marketflow.clock import system_clock
from marketflow.feeds.backfill import rest_client
from marketflow.feeds.backfill.rest_client import RestClient, RestFailed
from marketflow.feeds.decoder import Decoder
from marketflow.feeds.venues.limits import AttemptBudget
from marketflow.feeds.venues.proxies import ProxyUnusable, proxy_for, proxy_place
from marketflow.feeds.venues.registry import VENUES
from marketflow.feeds.venues.websocket_feed import VenueFeed
from marketflow.model import Candles, Mode
from tests.support.servers import HOST, free_port, wait_until
from tests.support.tls import OPENSSL, certificate, tls_front
from tests.support.venue_server import VenueServer
from tests.support.web_proxy import WebProxy, web_proxy

SYMBOLS = ("BTCUSDT",)
USER, PASSWORD = "me", "s3cret word"
QUOTED = "s3cret%20word"

VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "WS_PROXY", "WSS_PROXY", "REQUEST_METHOD")


@pytest.fixture(autouse=True)
def no_proxy_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


# Which one


@pytest.mark.parametrize(
    ("url", "variables", "expected"),
    [
        ("https://api.example", {"HTTPS_PROXY": "http://a:1"}, "http://a:1"),
        ("wss://ws.example", {"HTTPS_PROXY": "http://a:1"}, "http://a:1"),
        ("https://api.example", {"HTTP_PROXY": "http://a:1"}, None),
        ("wss://ws.example", {"HTTP_PROXY": "http://a:1"}, None),
        ("http://api.example", {"HTTP_PROXY": "http://a:1", "HTTPS_PROXY": "http://b:1"}, "http://a:1"),
        ("ws://ws.example", {"HTTP_PROXY": "http://a:1", "HTTPS_PROXY": "http://b:1"}, "http://a:1"),
        ("ws://ws.example", {"HTTPS_PROXY": "http://b:1"}, "http://b:1"),
        *(
            (f"{each}://x.example", {"ALL_PROXY": "http://a:1"}, "http://a:1")
            for each in ("https", "wss", "http", "ws")
        ),
        ("wss://ws.example", {"ALL_PROXY": "http://a:1", "HTTPS_PROXY": "http://b:1"}, "http://b:1"),
        ("wss://ws.example", {"https_proxy": "http://a:1"}, "http://a:1"),
        ("wss://ws.example", {"HTTPS_PROXY": ""}, None),
        ("wss://ws.example", {"HTTPS_PROXY": "a:1"}, "http://a:1"),
        ("wss://ws.example", {"HTTPS_PROXY": "socks5h://u:p@a:1"}, "socks5://u:p@a:1"),
        ("wss://ws.example:8443", {"HTTPS_PROXY": "http://a:1", "NO_PROXY": "ws.example"}, None),
        ("https://ws.example", {"ALL_PROXY": "http://a:1", "NO_PROXY": "other,.example"}, None),
        ("https://ws.example", {"ALL_PROXY": "http://a:1", "NO_PROXY": "*"}, None),
        ("wss://ws.example", {"ALL_PROXY": "http://a:1", "NO_PROXY": "s.example"}, "http://a:1"),
        ("ws://127.0.0.1:8080", {"ALL_PROXY": "http://a:1", "NO_PROXY": "127.0.0.1"}, None),
    ],
)
def test_proxy_follows_from_the_usual_variables(
    monkeypatch: pytest.MonkeyPatch, url: str, variables: dict[str, str], expected: str | None
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert proxy_for(url) == expected


@pytest.mark.parametrize(
    "value",
    [
        "ftp://me:s3cret@h:1",
        "http://",
        "http://me:s3cret@h:x",
        "http://me:s3/cret@h:1",
        "http://h:99999",
        "http://me:s3cret@h..example:1",
    ],
)
def test_address_that_is_no_proxy_is_an_error_without_its_words(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("HTTPS_PROXY", value)
    with pytest.raises(ProxyUnusable, match="the proxy for wss in the environment is no address of http://") as error:
        proxy_for("wss://ws.example")
    assert "cret" not in str(error.value)
    with pytest.raises(RestFailed, match=r"request to https://openapi\.okx\.com/.* failed: the proxy for https"):
        RestClient(VENUES["okx"]).instruments()


def test_proxy_is_shown_without_credentials() -> None:
    assert proxy_place("http://me:p@ss@proxy.example:3128") == "http://proxy.example:3128"


# Through it


class Receiver:
    """A feed, and what came of it."""

    def __init__(self, url: str, rest_url: str) -> None:
        decoder = Decoder(Mode.LIVE, "binance", SYMBOLS, system_clock, 5_000, lambda *_: None)
        attempts, venue = AttemptBudget(100, 60.0, time.monotonic), VENUES["binance"]
        self.rest = RestClient(venue, rest_url)
        self.feed = VenueFeed("binance", venue, SYMBOLS, {}, decoder, 15.0, attempts, url, self.rest)
        self.batches: list[Candles] = []
        self.errors: list[Exception] = []

    @contextmanager
    def receiving(self) -> Iterator[None]:
        subscription = self.feed.batches().subscribe(self.batches.append, self.errors.append)
        try:
            yield
        finally:
            subscription.dispose()
            self.rest.close()


@contextmanager
def addresses(server: VenueServer, folder: Path, is_secure: bool, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The port of a venue, plain or by TLS with a certificate that is trusted."""
    if not is_secure:
        yield server.port
        return
    key, crt = certificate(folder, "venue", f"IP:{HOST}")
    monkeypatch.setenv("SSL_CERT_FILE", str(crt))
    rest_client._tls.cache_clear()
    with tls_front(server.port, key, crt) as port:
        yield port
    rest_client._tls.cache_clear()


@pytest.mark.parametrize(
    "is_secure", [False, pytest.param(True, marks=pytest.mark.skipif(OPENSSL is None, reason="there is no openssl"))]
)
@pytest.mark.parametrize("variable", ["ALL_PROXY", "own"])
def test_stream_and_rest_go_through_the_proxy_with_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: list[str], is_secure: bool, variable: str
) -> None:
    own = "HTTPS_PROXY" if is_secure else "HTTP_PROXY"
    with ExitStack() as stack:
        server = stack.enter_context(VenueServer("binance", SYMBOLS))
        proxy = stack.enter_context(web_proxy(tmp_path, f"{USER}:{PASSWORD}"))
        port = stack.enter_context(addresses(server, tmp_path, is_secure, monkeypatch))
        monkeypatch.setenv(own if variable == "own" else variable, proxy.url_of(USER, QUOTED))
        s = "s" if is_secure else ""
        receiver = Receiver(f"ws{s}://{HOST}:{port}", f"http{s}://{HOST}:{port}")
        with receiver.receiving():
            wait_until(server.has_subscriber, timeout=20)
            server.trade(server.make(1))
            wait_until(lambda: bool(receiver.batches))
            assert server.rest_requests == ["/api/v3/exchangeInfo?permissions=SPOT"]
        assert not receiver.errors
        tunnels = 2 if is_secure else 1  # what is not encrypted is forwarded, and not tunnelled
        wait_until(lambda: proxy.log.count(f"CONNECT {HOST}:{port}") == tunnels)
        assert is_secure or f"GET {HOST}:{port}/api/v3/exchangeInfo" in proxy.log
    assert "s3cret" not in "".join(log)


@pytest.fixture
def refusing(tmp_path: Path) -> Iterator[WebProxy]:
    with web_proxy(tmp_path, f"{USER}:{PASSWORD}") as proxy:
        yield proxy


def failures(server: VenueServer, is_stream: bool) -> str:
    """What REST, or the stream whose REST is reached otherwise, fails with."""
    receiver = Receiver(server.url, server.rest_url)
    if not is_stream:
        with pytest.raises(RestFailed) as error:
            receiver.rest.instruments()
        return str(error.value)
    receiver.rest.instruments = lambda: VENUES["binance"].instruments(  # type: ignore[method-assign]
        server.rest.answer("/api/v3/exchangeInfo").body
    )
    with receiver.receiving():
        wait_until(lambda: bool(receiver.errors), timeout=20)
    assert isinstance(receiver.errors[0], OSError), receiver.errors
    return str(receiver.errors[0])


@pytest.mark.parametrize("is_stream", [False, True])
def test_proxy_that_refuses_is_named(refusing: WebProxy, monkeypatch: pytest.MonkeyPatch, is_stream: bool) -> None:
    with VenueServer("binance", SYMBOLS) as server:
        monkeypatch.setenv("HTTP_PROXY", refusing.url_of(USER, "wrong-word"))
        text = failures(server, is_stream)
        assert f" through the proxy {refusing.url}{': ' if is_stream else ' failed: '}" in text
        assert "407" in text
        assert "wrong-word" not in text
        assert (server.handshakes, server.rest_requests) == (0, [])


@pytest.mark.parametrize("is_stream", [False, True])
def test_proxy_that_is_unreachable_is_named(monkeypatch: pytest.MonkeyPatch, is_stream: bool) -> None:
    place = f"http://{HOST}:{free_port()}"
    with VenueServer("binance", SYMBOLS) as server:
        monkeypatch.setenv("ALL_PROXY", place.replace("//", "//me:s3cret@"))
        text = failures(server, is_stream)
        assert f"the proxy {place}" in text
        assert "refused" in text or "Connect call failed" in text
        assert "s3cret" not in text


def test_no_proxy_is_used_for_hosts_that_are_excepted(monkeypatch: pytest.MonkeyPatch) -> None:
    with VenueServer("binance", SYMBOLS) as server:
        monkeypatch.setenv("ALL_PROXY", f"http://{HOST}:{free_port()}")
        monkeypatch.setenv("NO_PROXY", f"localhost,{HOST}")
        receiver = Receiver(server.url, server.rest_url)
        with receiver.receiving():
            wait_until(server.has_subscriber, timeout=20)
