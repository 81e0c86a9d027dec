"""Batches as they are framed: once for all connections, and readable by the libraries of clients."""

import h11
import msgspec
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.protocol import OPEN
from websockets.uri import parse_uri

from marketflow.api.streaming.encoding import Batch, encode
from marketflow.api.streaming.events import Heartbeat, Rejected

EVENTS = (Heartbeat("2025-11-21T02:00:30.500Z"), Rejected("malformed", "ü" * 70_000))
BATCH = Batch([encode(event, "run-1") for event in EVENTS])


def test_chunk_is_the_batch_as_server_sent_events() -> None:
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
    connection.receive_data(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + BATCH.chunk)
    assert isinstance(connection.next_event(), h11.Response)
    received = b""
    while isinstance(event := connection.next_event(), h11.Data):
        received += event.data
    assert event is h11.NEED_DATA
    assert received == BATCH.server_sent


def test_frames_are_the_batch_as_text_messages() -> None:
    client = ClientProtocol(parse_uri("ws://localhost/ws"), state=OPEN)
    client.receive_data(BATCH.frames)
    frames = [each for each in client.events_received() if isinstance(each, Frame)]
    assert {each.opcode for each in frames} == {Opcode.TEXT}
    assert [bytes(each.data).decode() for each in frames] == BATCH.texts
    assert [msgspec.json.decode(each)["event"] for each in BATCH.texts] == ["heartbeat", "error"]
