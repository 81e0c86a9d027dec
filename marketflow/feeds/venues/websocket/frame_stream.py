"""The messages of one WebSocket, as many at a time as one read of the socket has given.

By picows, which parses frames in C and calls back without a task switch: it receives 1,000,000 messages of a trade a
second of CPU time, the library `websockets` 155,000 in asyncio and 105,000 on a thread (Python 3.11). It compresses
nothing, so that permessage-deflate is not offered.
"""

import asyncio
from asyncio import Future, get_running_loop
from collections.abc import Callable, Coroutine
from contextlib import suppress
from socket import SHUT_RDWR, socket
from typing import Any, cast

from picows import (
    WSCloseCode,
    WSError,
    WSFrame,
    WSHandshakeError,
    WSInvalidStatusError,
    WSListener,
    WSMsgType,
    WSParsedURL,
    WSTransport,
    WSUpgradeResponse,
    ws_connect,
)
from python_socks import ProxyError

from marketflow import __version__
from marketflow.feeds.venues.limits import refusal_of
from marketflow.feeds.venues.proxies import proxy_for, proxy_place
from marketflow.feeds.venues.venue import MAX_FRAME_BYTES
from marketflow.tasks import connected_socket
from marketflow.text import without_secrets

CONNECT_TIMEOUT_SECONDS = 10.0

RECEIVE_BYTES = 256 * 1024
"""Read from the socket at most at a time: some 1,700 trades of Binance."""

MESSAGES_AT_A_TIME = 4096
"""Handed off at most at a time: what is made of more does not fit into the processor's cache."""

MOST_BYTES = 4 * MAX_FRAME_BYTES
"""A longer message ends the connection; one of over MAX_FRAME_BYTES is rejected, and costs only itself."""

CLOSE_SECONDS = 0.5
"""How long the venue may take to answer the end of a connection."""

_TEXT, _BINARY, _PING, _PONG, _CLOSE = (
    WSMsgType.TEXT,
    WSMsgType.BINARY,
    WSMsgType.PING,
    WSMsgType.PONG,
    WSMsgType.CLOSE,
)
"""As names of the module: an enumeration looks its members up slowly."""


class FrameStream(WSListener):
    """The messages of one connection.

    Args:
        on_messages: called with those of one read, an empty list for pings alone. What it raises ends the connection.
    """

    def __init__(self, on_messages: Callable[[list[bytes]], None]) -> None:
        self.closed: Future[str] = get_running_loop().create_future()
        """Why the connection has ended; an exception where `on_messages` raised it."""
        self._on_messages = on_messages
        self._messages: list[bytes] = []
        self._fragments = bytearray()
        self._transport: Any = None

    def send(self, text: str) -> None:
        """Send a text; without effect where the connection has ended."""
        if not self._transport.is_disconnected:
            self._transport.send(WSMsgType.TEXT, text.encode())

    async def close(self) -> None:
        """Close the connection as a normal end, and await the venue's answer for a moment."""
        self._end("closed")
        if not (self._transport.is_disconnected or self._transport.is_close_frame_sent):
            self._transport.send_close(WSCloseCode.OK)
        with suppress(TimeoutError, WSError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._transport.wait_disconnected()
        self._transport.disconnect(False)
        await asyncio.sleep(0)  # the loop closes the socket in its next round

    # Called by picows

    def on_ws_connected(self, transport: WSTransport) -> None:
        """Keep the transport."""
        self._transport = transport

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        """Collect what makes up messages; the last one of a read hands them off."""
        kind = frame.msg_type
        if (kind is _TEXT or kind is _BINARY) and frame.fin:
            self._messages.append(frame.get_payload_as_bytes())
        elif kind is _PING:
            transport.send_pong(frame.get_payload_as_bytes())
        elif kind is _CLOSE:
            self._hand_off()
            self._on_close(transport, frame)
            return
        elif kind is not _PONG:
            self._on_fragment(frame)
        if frame.last_in_buffer or len(self._messages) >= MESSAGES_AT_A_TIME:
            self._hand_off()

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        """Take notice of an end without a close frame."""
        self._end("without a reason")

    def _on_fragment(self, frame: WSFrame) -> None:
        self._fragments += frame.get_payload_as_bytes()
        if len(self._fragments) > MOST_BYTES:
            self._end(f"a message of over {MOST_BYTES} bytes")
            self._transport.disconnect(False)
        elif frame.fin:
            self._messages.append(bytes(self._fragments))
            self._fragments.clear()

    def _on_close(self, transport: WSTransport, frame: WSFrame) -> None:
        code: Any = frame.get_close_code()  # an int, where the enumeration lacks it
        text = (frame.get_close_message() or b"").decode(errors="replace")
        self._end(f"{int(code)} {text}".strip())
        transport.send_close(WSCloseCode.OK if code == WSCloseCode.NO_INFO else code)  # which is never sent
        transport.disconnect()

    def _hand_off(self) -> None:
        messages, self._messages = self._messages, []
        if self.closed.done():
            return
        try:
            self._on_messages(messages)
        except Exception as error:  # noqa: BLE001 - handed off
            self.closed.set_exception(error)
            self._transport.disconnect(False)

    def _end(self, reason: str) -> None:
        if not self.closed.done():
            self.closed.set_result(reason)


async def open_stream(url: str, on_messages: Callable[[list[bytes]], None]) -> FrameStream:
    """Connect to a venue, through the proxy that the environment names.

    Args:
        url: ws or wss.
        on_messages: see FrameStream.

    Raises:
        VenueRefusal: the venue answers with a status that means no.
        OSError: it cannot be reached, or does not speak WebSocket.
    """
    sockets: list[socket] = []
    proxy = proxy_for(url)

    async def connect(to: WSParsedURL) -> socket:
        try:
            sockets.append(await connected_socket(to.host, to.port))
        except OSError as error:
            if proxy is None:
                raise
            raise OSError(f"the proxy {proxy_place(proxy)} cannot be reached: {error}") from None
        return sockets[-1]

    try:
        return await _open(url, on_messages, connect, proxy)
    except BaseException:
        # The library leaves a connection open that is cancelled in its handshake.
        for each in sockets:
            with suppress(OSError):
                each.shutdown(SHUT_RDWR)
        raise


async def _open(
    url: str,
    on_messages: Callable[[list[bytes]], None],
    connect: Callable[[WSParsedURL], Coroutine[Any, Any, socket]],
    proxy: str | None,
) -> FrameStream:
    through = "" if proxy is None else f" through the proxy {proxy_place(proxy)}"
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_SECONDS):
            _, stream = await ws_connect(
                lambda: FrameStream(on_messages),
                url,
                enable_auto_pong=False,  # a ping may be the last frame of a read, and is a sign of life
                max_frame_size=MOST_BYTES,
                read_buffer_init_size=RECEIVE_BYTES,
                websocket_handshake_timeout=None,
                extra_headers=[("User-Agent", f"MarketFlow/{__version__}")],
                proxy=proxy,
                socket_factory=connect,
            )
    except WSInvalidStatusError as error:
        answer = cast("WSUpgradeResponse", error.response)
        raise refusal_of(int(answer.status), answer.headers) from None
    except TimeoutError:
        raise TimeoutError(f"no answer within {CONNECT_TIMEOUT_SECONDS:g} s{through}") from None
    except (WSError, WSHandshakeError, ProxyError, EOFError, ValueError) as error:
        raise OSError(f"no WebSocket at {without_secrets(url)}{through}: {error}") from None
    assert isinstance(stream, FrameStream)
    return stream
