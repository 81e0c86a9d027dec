"""A venue's server that does what a test says: the simulated venue's protocol, WebSocket and REST, with faults.

Handshakes: `refuse` (a status with headers and a body, for the next ones), `hang` (before or after the 101).
Subscriptions: `acknowledging` (at once, late by `acknowledge`, or never), `known` (others are refused as by the venue).
Frames: `send` (text as text, bytes as binary), `send_fragmented`, `send_together` (one packet), `trade` (made, kept for
REST and sent). Ends: `close` (any code), `reset` (RST), `freeze` (silent with the connection open, pings unanswered).
REST: `book` holds what it answers (`book.add` keeps a trade without sending it), `book.lag_seconds` keeps it behind the
stream, `rest_answers` come first (errors, HTML, empty pages; None: the usual answer), `rest_hangs` while set.
"""

import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import msgspec
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.sync.server import Server, ServerConnection, serve

from marketflow.clock import milliseconds, system_clock
from marketflow.feeds.simulated.dialects import DIALECTS
from marketflow.feeds.simulated.rest_registry import RESTS
from marketflow.feeds.simulated.rest_side import RestAnswer
from marketflow.feeds.simulated.trade_book import TradeBook
from marketflow.feeds.venues.venue import Side, Trade


class VenueServer:
    """Accepts connections, remembers what clients send, and sends what the test hands it.

    Args:
        venue: its name.
        symbols: ours, of which the list of instruments consists.
        acknowledging: whether subscriptions and pings are answered at once.
        refusals: the statuses and headers with which the first handshakes are refused.
        limited: whether REST keeps the venue's documented limits.
        clock: the venue's, in Unix ns.
    """

    def __init__(
        self,
        venue: str,
        symbols: Sequence[str],
        acknowledging: bool = True,
        refusals: Sequence[tuple[int, dict[str, str]]] = (),
        limited: bool = False,
        clock: Callable[[], int] = system_clock,
    ) -> None:
        self.dialect = DIALECTS[venue]
        listed = [self.dialect.listed(symbol) for symbol in symbols]
        self.known = {each.native for each in listed}
        """The venue's names that can be subscribed to."""
        self.book = TradeBook(self.known)
        self.rest = RESTS[venue](listed, self.book, clock, limited=limited)
        self.rest_requests: list[str] = []
        """Path and query of each request by REST."""
        self.rest_answers: deque[RestAnswer | None] = deque()
        self.rest_hangs = threading.Event()
        self.statuses: dict[str, str] = {}
        """Of Binance: what its list of instruments says of the state of these symbols in place of TRADING."""
        self.received: list[list[str]] = []
        """What each connection has sent."""
        self.connections: list[ServerConnection] = []
        self.handshakes = 0
        self.handshake_times: list[float] = []
        """When each began, of the monotonic clock."""
        self.on_connect: Callable[[ServerConnection], None] = lambda connection: None
        self.acknowledging = acknowledging
        self.unanswered: list[tuple[ServerConnection, str]] = []
        """Messages of clients that `acknowledge` has yet to answer."""
        self._clock = clock
        self._refusals = deque(RestAnswer(b"", status, headers) for status, headers in refusals)
        self._hanging: deque[bool] = deque()
        self._frozen: list[ServerConnection] = []
        self._ended = threading.Event()
        self._server: Server = serve(
            self._serve, "127.0.0.1", 0, process_request=self._process, compression=None, max_size=2**24
        )
        self.port: int = self._server.socket.getsockname()[1]
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    @property
    def rest_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "VenueServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.thaw()
        for connection in self.connections:
            connection.close()
        self._server.shutdown()
        self._thread.join(5)

    # Handshakes

    def refuse(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        """Refuse the next handshake that is not refused yet."""
        self._refusals.append(RestAnswer(body, status, headers or {}))

    def hang(self, after_101: bool = False) -> None:
        """Leave the next handshake without an answer; or take it, and then neither read nor send anything."""
        self._hanging.append(after_101)

    def has_subscriber(self, number: int = 1) -> bool:
        """Whether the connection of this number is made and has sent something; `send` then reaches it."""
        return len(self.connections) == number and bool(self.received[-1])

    # Frames

    def send(self, *frames: str | bytes) -> None:
        """Send frames on the newest connection, text as text and bytes as binary."""
        for frame in frames:
            self.connections[-1].send(frame)

    def send_fragmented(self, frame: str, parts: int = 3) -> None:
        """Send one text message in as many frames of the protocol."""
        size = -(-len(frame) // parts)
        self.connections[-1].send([frame[at : at + size] for at in range(0, len(frame), size)])

    def send_together(self, *frames: str) -> None:
        """Send several messages in one packet."""
        connection = self.connections[-1]
        with connection.protocol_mutex:
            for frame in frames:
                connection.protocol.send_text(frame.encode())
            connection.socket.sendall(b"".join(connection.protocol.data_to_send()))

    def make(
        self,
        number: int,
        symbol: str = "BTCUSDT",
        price: float = 100.5,
        quantity: float = 0.25,
        at: int | None = None,
        side: Side = "buy",
        count: int = 1,
    ) -> Trade:
        """A trade of one of our symbols, now if no time is given, that is neither kept nor sent."""
        at = milliseconds(self._clock()) if at is None else at
        return Trade(self.dialect.native(symbol), price, quantity, at, number, side, count)

    def trade(self, *trades: Trade) -> None:
        """Keep trades for REST, and send each on the newest connection."""
        for trade in trades:
            self.book.add(trade)
            self.send(self.dialect.trade(trade))

    def acknowledge(self, newest_first: bool = False) -> None:
        """Answer what clients sent while `acknowledging` was false."""
        waiting, self.unanswered = self.unanswered, []
        for connection, text in waiting[::-1] if newest_first else waiting:
            self._answer(connection, text)

    # Ends

    def close(self, code: int = 1000, reason: str = "") -> None:
        """Close the newest connection in the protocol's way: any code but 1006, which is `reset`."""
        self.connections[-1].close(code, reason)

    def reset(self) -> None:
        """Cut the newest connection with a RST."""
        connection = self.connections[-1]
        with connection.protocol_mutex:  # so that the library does not end it properly before
            connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.socket.close()
        connection.close_socket()

    def freeze(self) -> None:
        """Fall silent on the newest connection, as a stopped process: nothing is read, answered or sent (by tests)."""
        self._freeze(self.connections[-1])

    def thaw(self) -> None:
        """Go on on all frozen connections."""
        while self._frozen:
            self._frozen.pop().protocol_mutex.release()

    def _freeze(self, connection: ServerConnection) -> None:
        connection.protocol_mutex.acquire()
        self._frozen.append(connection)

    def _process(self, connection: ServerConnection, request: Request) -> Response | None:
        if "upgrade" not in request.headers.get("Connection", "").lower():
            return self._rest(request.path)
        self.handshakes += 1
        self.handshake_times.append(time.monotonic())
        if self._refusals:
            return self._refusals.popleft().as_response()
        if self._hanging and not self._hanging[0]:
            self._hanging.popleft()
            self._ended.wait()
        return None

    def _rest(self, target: str) -> Response:
        self.rest_requests.append(target)
        while self.rest_hangs.is_set() and not self._ended.wait(0.01):
            pass
        answer = self.rest_answers.popleft() if self.rest_answers else None
        answer = answer or self.rest.answer(target)
        for symbol, status in self.statuses.items():
            listed = f'"symbol":"{symbol}","status":"'
            body = answer.body.replace(f"{listed}TRADING".encode(), f"{listed}{status}".encode())
            answer = answer._replace(body=body)
        return answer.as_response()

    def _serve(self, connection: ServerConnection) -> None:
        messages: list[str] = []
        hanging = bool(self._hanging) and self._hanging.popleft()
        if hanging:
            self._freeze(connection)
        self.received.append(messages)
        self.connections.append(connection)  # last: who waits for it finds the others
        if hanging:
            self._ended.wait()
            return
        self.on_connect(connection)
        try:
            for text in connection:
                assert isinstance(text, str)
                messages.append(text)
                if self.acknowledging:
                    self._answer(connection, text)
                else:
                    self.unanswered.append((connection, text))
        except ConnectionClosed:
            pass

    def _answer(self, connection: ServerConnection, text: str) -> None:
        if (pong := self.dialect.pong(text)) is not None:
            connection.send(pong)
            return
        message = msgspec.json.decode(text)
        symbols, frames = self.dialect.respond(message, self.known)
        books = [book for symbol in symbols if (book := self.book.of(symbol)) is not None]
        before = [frame for book in books for frame in self.dialect.before_answer(book, message)]
        after = [frame for book in books for frame in self.dialect.after_answer(book, message)]
        for frame in before + frames + after:
            connection.send(frame)
