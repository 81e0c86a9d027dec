"""Reads the stream of prices of a MarketFlow, and connects again after each loss, going on where it was.

The server sends a heartbeat every 5 s, so a connection on which nothing at all comes for longer than two of them is
dead, whatever the kernel believes.
"""

import asyncio
import os
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator

import httpx
import msgspec
from httpx_sse import SSEError, aconnect_sse

from marketflow.cli.watch.messages import Connected, Lost, Message, decode
from marketflow.errors import SettingsError, StartError
from marketflow.text import without_credentials

CONNECT_SECONDS = 5.0
SILENCE_SECONDS = 12.0
LONGEST_PAUSE_SECONDS = 10.0

WAITED_SECONDS = 0.0005
"""What took longer than that to come was not there yet when it was asked for."""

_UNKNOWN = ("unknown_symbol", "unknown_exchange")
_NO_STREAM = "there is no stream of prices of MarketFlow"


class _Refused(Exception):
    """The server answers, but not with a stream; the text says what."""


class _Problem(msgspec.Struct):
    detail: str = ""
    code: str = ""


async def follow(url: str, query: dict[str, str], rest_seconds: float = 0.0) -> AsyncGenerator[Message, None]:
    """What is told, without an end; close it (`aclosing`).

    Args:
        url: of the application.
        query: of the subscription, as /stream/prices takes it.
        rest_seconds: how long to rest whenever all that has come is read, for whom looks no more often than that.

    Raises:
        SettingsError: the server knows no such symbol or exchange.
        StartError: what answers there at first is no MarketFlow with a stream.
    """
    last_id, heard, pauses = "", False, _pauses()
    timeout = httpx.Timeout(CONNECT_SECONDS, read=SILENCE_SECONDS)
    # A MarketFlow is next door: no proxy of the environment is asked.
    async with httpx.AsyncClient(timeout=timeout, trust_env=False) as client:
        while True:
            headers = {"Last-Event-ID": last_id} if last_id else {}
            try:
                async with aconnect_sse(client, "GET", f"{url}/stream/prices", params=query, headers=headers) as source:
                    await _check(source.response)
                    if rest_seconds:
                        source.response.stream = _Resting(source.response.stream, rest_seconds)
                    yield Connected()
                    async for event in source.aiter_sse():
                        last_id = event.id or last_id
                        if (message := decode(event.event, event.data)) is not None:
                            heard, pauses = True, _pauses()
                            yield message
                reason = "the server has ended the stream"
            except (_Refused, SSEError, msgspec.DecodeError) as error:
                reason = str(error) if isinstance(error, _Refused) else _NO_STREAM
                if not heard and not isinstance(error, _Busy):
                    raise StartError(f"{without_credentials(url)}: {reason}") from None
            except httpx.TransportError as error:
                reason = _reason(error)
            pause = next(pauses)
            yield Lost(reason, pause)
            await asyncio.sleep(pause)


class _Resting(httpx.AsyncByteStream):
    """A stream that is read in gulps: to wake up for each of some hundred prices a second takes most of the work."""

    def __init__(self, stream: httpx.AsyncByteStream | httpx.SyncByteStream, seconds: float) -> None:
        assert isinstance(stream, httpx.AsyncByteStream), "the client is an asynchronous one"
        self._stream = stream
        self._seconds = seconds

    async def __aiter__(self) -> AsyncIterator[bytes]:
        asked_at = time.monotonic()
        async for chunk in self._stream:
            waited = time.monotonic() - asked_at > WAITED_SECONDS
            yield chunk
            if waited:  # so there was nothing more: while there is it is read without a rest
                await asyncio.sleep(self._seconds)
            asked_at = time.monotonic()

    async def aclose(self) -> None:
        """Close the stream."""
        await self._stream.aclose()


class _Busy(_Refused):
    """It may answer with a stream before long."""


async def _check(response: httpx.Response) -> None:
    """Let a stream pass.

    Raises:
        SettingsError: the server knows no such symbol or exchange.
        _Refused: it answers with something else.
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
        raise _Busy(answer)
    raise _Refused(f"{answer}: {problem.detail or _NO_STREAM}")


def _pauses() -> Iterator[float]:
    """1 s, 2 s, 4 s ... at most 10 s."""
    pause = 1.0
    while True:
        yield pause
        pause = min(pause * 2, LONGEST_PAUSE_SECONDS)


def _reason(error: httpx.TransportError) -> str:
    """Why there is no connection, in the words of the operating system where it has any."""
    match error:
        case httpx.ReadTimeout():
            return f"no sign of life for {SILENCE_SECONDS:g} s"
        case httpx.TimeoutException():
            return f"no answer within {CONNECT_SECONDS:g} s"
        case httpx.RemoteProtocolError() | httpx.ReadError():
            return "the connection broke off"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno and not isinstance(cause, ssl.SSLError):
            # asyncio has words of its own; a name that cannot be looked up has no other number than a negative one.
            return os.strerror(cause.errno) if cause.errno > 0 else str(cause.strerror)
        cause = cause.__cause__ or cause.__context__
    return str(error) or type(error).__name__
