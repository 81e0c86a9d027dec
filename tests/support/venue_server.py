"""A venue's server that does what a test says: the simulated venue's protocol, with faults."""

import threading
from collections.abc import Callable, Sequence
from http import HTTPStatus

import msgspec
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.sync.server import Server, ServerConnection, serve

from marketflow.feeds.simulated.dialects import DIALECTS
from marketflow.feeds.venues.registry import VENUES


class VenueServer:
    """Accepts connections, remembers what clients send, and sends what the test hands it.

    Args:
        venue: its name.
        symbols: ours, of which the list of instruments consists.
        acknowledging: whether subscriptions and pings are answered.
        refusals: the statuses and headers with which the first handshakes are refused.
    """

    def __init__(
        self,
        venue: str,
        symbols: Sequence[str],
        acknowledging: bool = True,
        refusals: Sequence[tuple[int, dict[str, str]]] = (),
    ) -> None:
        self.dialect = DIALECTS[venue]
        self.symbols = list(symbols)
        self.received: list[list[str]] = []
        """What each connection has sent."""
        self.connections: list[ServerConnection] = []
        self.handshakes = 0
        self.on_connect: Callable[[ServerConnection], None] = lambda connection: None
        self._acknowledging = acknowledging
        self._refusals = list(refusals)
        self._path = VENUES[venue].instruments_path.partition("?")[0]
        self._server: Server = serve(self._serve, "127.0.0.1", 0, process_request=self._rest, compression=None)
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
        for connection in self.connections:
            connection.close()
        self._server.shutdown()
        self._thread.join(5)

    def has_subscriber(self, number: int = 1) -> bool:
        """Whether the connection of this number is made and has sent something; `send` then reaches it."""
        return len(self.connections) == number and bool(self.received[-1])

    def send(self, *frames: str | bytes) -> None:
        """Send frames on the newest connection, text as text and bytes as binary."""
        for frame in frames:
            self.connections[-1].send(frame)

    def refuse(self, status: int) -> None:
        """Refuse the next handshake."""
        self._refusals.append((status, {}))

    def _rest(self, connection: ServerConnection, request: Request) -> Response | None:
        if "upgrade" in request.headers.get("Connection", "").lower():
            self.handshakes += 1
            if not self._refusals:
                return None
            status, headers = self._refusals.pop(0)
            return Response(status, "refused", Headers({**headers, "Content-Length": "0"}), b"")
        if request.path.partition("?")[0] != self._path:
            return connection.respond(HTTPStatus.NOT_FOUND, "")
        body = msgspec.json.encode(self.dialect.instruments(self.symbols))
        return Response(HTTPStatus.OK, "OK", Headers({"Content-Length": str(len(body)), "Connection": "close"}), body)

    def _serve(self, connection: ServerConnection) -> None:
        messages: list[str] = []
        self.received.append(messages)
        self.connections.append(connection)  # last: who waits for it finds the other
        self.on_connect(connection)
        try:
            for text in connection:
                assert isinstance(text, str)
                messages.append(text)
                if self._acknowledging:
                    self._answer(connection, text)
        except ConnectionClosed:
            pass

    def _answer(self, connection: ServerConnection, text: str) -> None:
        if (pong := self.dialect.pong(text)) is not None:
            connection.send(pong)
        elif symbols := self.dialect.requested(message := msgspec.json.decode(text)):
            for frame in self.dialect.acknowledgements(symbols, message):
                connection.send(frame)
