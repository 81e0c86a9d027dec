"""Client of the price stream that reconnects after each loss and resumes after the last event.

The server sends a heartbeat every 5 s, so a connection that is silent for more than two heartbeats is taken as lost.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator

import httpx
import msgspec
from httpx_sse import SSEError, aconnect_sse

from marketflow.cli.watch.stream_events import Connected, Lost, WatchEvent, decode
from marketflow.errors import SettingsError, StartError
from marketflow.tasks import Backoff
from marketflow.text import connection_error_text, without_credentials

CONNECT_SECONDS = 5.0
SILENCE_SECONDS = 12.0
BACKOFF = Backoff(first=1.0, cap=10.0, jitter=0.0)  # the pause is shown to the user

WAITED_SECONDS = 0.0005
"""A read that takes longer has waited for the network: the receive buffer was empty."""

_UNKNOWN = ("unknown_symbol", "unknown_exchange")
_NO_STREAM = "there is no stream of prices of MarketFlow"


class _Rejected(Exception):
    """The response is no stream; the text says what it is."""


class _Problem(msgspec.Struct):
    detail: str = ""
    code: str = ""


async def follow(url: str, query: dict[str, str], pause_seconds: float = 0.0) -> AsyncGenerator[WatchEvent, None]:
    """Yield the events of the stream without end; close it (`aclosing`).

    Args:
        url: URL of the application.
        query: query parameters of /stream/prices.
        pause_seconds: pause whenever the receive buffer is empty, so that events arrive in batches.

    Raises:
        SettingsError: the server does not know a symbol or an exchange.
        StartError: the first response is no stream of MarketFlow.
    """
    last_id, received, failures = "", False, 0
    timeout = httpx.Timeout(CONNECT_SECONDS, read=SILENCE_SECONDS)
    # MarketFlow is usually on this machine or network: proxies of the environment are ignored.
    async with httpx.AsyncClient(timeout=timeout, trust_env=False) as client:
        while True:
            headers = {"Last-Event-ID": last_id} if last_id else {}
            try:
                async with aconnect_sse(client, "GET", f"{url}/stream/prices", params=query, headers=headers) as source:
                    await _check(source.response)
                    if pause_seconds:
                        source.response.stream = _PausingStream(source.response.stream, pause_seconds)
                    yield Connected()
                    async for event in source.aiter_sse():
                        last_id = event.id or last_id
                        if (decoded := decode(event.event, event.data)) is not None:
                            received, failures = True, 0
                            yield decoded
                reason = "the server has ended the stream"
            except (_Rejected, SSEError, msgspec.DecodeError) as error:
                reason = str(error) if isinstance(error, _Rejected) else _NO_STREAM
                if not received and not isinstance(error, _Unavailable):
                    raise StartError(f"{without_credentials(url)}: {reason}") from None
            except httpx.TransportError as error:
                reason = _reason(error)
            failures += 1
            pause = BACKOFF.pause(failures)
            yield Lost(reason, pause)
            await asyncio.sleep(pause)


class _PausingStream(httpx.AsyncByteStream):
    """A stream that is read in batches: a wake-up for each of some hundred prices a second costs more."""

    def __init__(self, stream: httpx.AsyncByteStream | httpx.SyncByteStream, seconds: float) -> None:
        assert isinstance(stream, httpx.AsyncByteStream), "the client is an asynchronous one"
        self._stream = stream
        self._seconds = seconds

    async def __aiter__(self) -> AsyncIterator[bytes]:
        began = time.monotonic()
        async for chunk in self._stream:
            waited = time.monotonic() - began > WAITED_SECONDS
            yield chunk
            if waited:  # the buffer was empty; otherwise read on at once
                await asyncio.sleep(self._seconds)
            began = time.monotonic()

    async def aclose(self) -> None:
        """Close the stream."""
        await self._stream.aclose()


class _Unavailable(_Rejected):
    """The server is overloaded or starting; a later attempt may succeed."""


async def _check(response: httpx.Response) -> None:
    """Check that the response is a stream.

    Raises:
        SettingsError: the server does not know a symbol or an exchange.
        _Rejected: the response is something else.
    """
    if response.status_code == 200:
        return
    try:
        problem = msgspec.json.decode(await response.aread(), type=_Problem)
    except msgspec.DecodeError:
        problem = _Problem()
    if problem.code in _UNKNOWN:
        raise SettingsError(problem.detail)
    answer = f"the server answers {response.status_code} {response.reason_phrase}".rstrip()
    if response.status_code >= 500 or response.status_code == 429:
        raise _Unavailable(answer)
    raise _Rejected(f"{answer}: {problem.detail or _NO_STREAM}")


def _reason(error: httpx.TransportError) -> str:
    """Return why the connection failed, as the operating system describes it if it does."""
    match error:
        case httpx.ReadTimeout():
            return f"no sign of life for {SILENCE_SECONDS:g} s"
        case httpx.TimeoutException():
            return f"no answer within {CONNECT_SECONDS:g} s"
        case httpx.RemoteProtocolError() | httpx.ReadError():
            return "the connection broke off"
    return connection_error_text(error)
