"""The last line of a connection counts without a newline, if it is a whole object."""

import socket
import threading

import pytest

from marketflow.clock import milliseconds, system_clock
from marketflow.feeds.decoder import Decoder
from marketflow.feeds.tcp import TcpFeed
from marketflow.model import Candles, Mode
from tests.support.servers import HOST

WHOLE = '{"symbol":"BTCUSDT","price":1.5,"timestamp":%d}'


@pytest.mark.parametrize(
    ("last", "ticks", "rejected"),
    [
        (WHOLE, 2, {}),
        (WHOLE[:-1], 1, {"malformed": 1}),
        ("nonsense", 1, {"malformed": 1}),
        ("[1]", 1, {"malformed": 1}),
        ("   ", 1, {}),
        ("", 1, {}),
    ],
)
def test_last_line_without_a_newline_is_a_tick_or_rejected(last: str, ticks: int, rejected: dict[str, int]) -> None:
    decoder = Decoder(Mode.LIVE, "exchange1", ["BTCUSDT"], system_clock, 5000, lambda *_: None)
    ended = threading.Event()
    received: list[Candles] = []
    with socket.create_server((HOST, 0)) as listener:
        feed = TcpFeed("exchange1", HOST, listener.getsockname()[1], decoder, 15.0)
        feed.batches().subscribe(received.append, lambda _: ended.set(), ended.set)
        connection, _ = listener.accept()
        now_ms = milliseconds(system_clock())
        text = f"{WHOLE % now_ms}\n{last % now_ms if '%' in last else last}"
        connection.sendall(text.encode())
        connection.close()
        assert ended.wait(10)
    assert decoder.ticks == ticks
    assert decoder.rejected == rejected
    assert sum(candle.ticks for batch in received for candle in batch.values()) == ticks
