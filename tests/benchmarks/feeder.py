"""What exchanges send, from a process of its own, so that it takes no turns with what measures.

The price of a tick that is sent by itself is the time of its sending, in microseconds of the machine's monotonic clock,
which all processes share: any process can compute the age of a price.
"""

import multiprocessing
import random
import socket
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.sharedctypes import RawValue
from typing import Any, Self

from tests.support.servers import wait_until

LINES_A_BLOCK = 500
STAMP = b"1000000000000"

MOST_KEPT_BYTES = 64 * 1024 * 1024
"""Unsent bytes of a client beyond which it is disconnected."""

_STEADY, _FLOODING, _PAUSED, _ENDED = range(4)


def price_now() -> int:
    """The price of a tick that is sent now."""
    return time.monotonic_ns() // 1000


def line(symbol: str, price: int, number: int = 0) -> bytes:
    """A tick of now, as an exchange sends it; its number is not said."""
    return b'{"symbol":"%s","price":%d,"timestamp":%d}\n' % (symbol.encode(), price, time.time_ns() // 1_000_000)


def trade_frame(symbol: str, price: int, number: int) -> bytes:
    """A trade of now as Binance sends it, in a WebSocket frame; numbers of a symbol go up by one."""
    now = time.time_ns() // 1_000_000
    text = b'{"e":"trade","E":%d,"s":"%s","t":%d,"p":"%d","q":"0.00062000","T":%d,"m":true,"M":true}' % (
        now,
        symbol.encode(),
        number,
        price,
        now,
    )
    head = b"\x81" + bytes([len(text)]) if len(text) < 126 else b"\x81\x7e" + struct.pack("!H", len(text))
    return head + text


def blocks(symbols: Sequence[str], count: int = 16) -> list[bytes]:
    """Prepared blocks of lines, the same in each process; STAMP stands for the time of their sending."""
    rng = random.Random(7)
    prices = {symbol: rng.uniform(1, 70_000) for symbol in symbols}
    made = []
    for block in range(count):
        lines = []
        for i in range(LINES_A_BLOCK):
            symbol = symbols[(block * LINES_A_BLOCK + i) % len(symbols)]
            price = round(prices[symbol] * rng.uniform(0.99, 1.01), 2)
            lines.append(b'{"symbol":"%s","price":%.2f,"timestamp":%s}\n' % (symbol.encode(), price, STAMP))
        made.append(b"".join(lines))
    return made


class Clients:
    """Connections of one exchange that all get the same bytes; a slow client delays no other, as at a real exchange.

    Unsent bytes of each client are kept, up to MOST_KEPT_BYTES.
    """

    def __init__(self) -> None:
        self._kept: dict[socket.socket, bytearray] = {}

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def behind(self) -> list[socket.socket]:
        """Clients that have unsent bytes."""
        return [client for client, kept in self._kept.items() if kept]

    def add(self, client: socket.socket) -> None:
        """Send to this client from now on."""
        client.setblocking(False)
        self._kept[client] = bytearray()

    def send(self, block: bytes = b"") -> None:
        """Send the unsent bytes of each client, and then a block."""
        for client, kept in list(self._kept.items()):
            kept += block
            try:
                while kept:
                    del kept[: client.send(kept)]
            except BlockingIOError:
                if len(kept) < MOST_KEPT_BYTES:
                    continue
            except OSError:
                pass
            else:
                continue
            del self._kept[client]
            client.close()


class Feeder:
    """Sends ticks on connections until the block ends: evenly, one at a time, or as fast as they are taken.

    Args:
        connections: of MarketFlow to its exchanges; they stay the caller's as well.
        symbols: in turn.
        rate: ticks a second and connection, while it does not flood.
        encode: makes what is sent of symbol, price and the number of the tick among those of its symbol.
    """

    def __init__(
        self,
        connections: Sequence[socket.socket],
        symbols: Sequence[str],
        rate: float,
        encode: Callable[[str, int, int], bytes] = line,
    ) -> None:
        self._order: Any = RawValue("b", _STEADY)
        self._sent: Any = RawValue("q", 0)
        arguments = (list(connections), list(symbols), rate, encode, self._order, self._sent)
        self._process = multiprocessing.get_context("spawn").Process(target=_feed, args=arguments, daemon=True)

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def sent(self) -> int:
        """Ticks sent so far."""
        return int(self._sent.value)

    def flood(self) -> None:
        """Send as fast as it is taken from now on."""
        self._order.value = _FLOODING

    def ease(self) -> None:
        """Send at the rate again."""
        self._order.value = _STEADY

    def pause(self) -> None:
        """Send nothing from now on."""
        self._order.value = _PAUSED

    def __enter__(self) -> Self:
        self._process.start()
        wait_until(lambda: self.sent, message="the feeder sends nothing")
        return self

    def __exit__(self, *_: object) -> None:
        self._order.value = _ENDED
        self._process.join(2)  # whole lines, if the other side still takes them
        self._process.kill()
        self._process.join(5)


def _feed(
    connections: list[socket.socket],
    symbols: list[str],
    rate: float,
    encode: Callable[[str, int, int], bytes],
    order: Any,
    sent: Any,
) -> None:
    prepared = blocks(symbols)
    due, beats = time.monotonic(), 0
    with suppress(OSError):  # nobody is there any more
        while order.value != _ENDED:
            if order.value == _FLOODING:
                _send_block(connections, prepared[beats % len(prepared)])
                sent.value += LINES_A_BLOCK * len(connections)
                due = time.monotonic()
            elif order.value == _PAUSED:
                time.sleep(0.05)
                due = time.monotonic()
            else:
                due += 1 / rate / len(connections)
                time.sleep(max(0.0, due - time.monotonic()))
                turn, place = divmod(beats, len(connections))
                symbol, number = symbols[turn % len(symbols)], turn // len(symbols) + 1
                connections[place].sendall(encode(symbol, price_now(), number))
                sent.value += 1
            beats += 1


def _send_block(connections: Sequence[socket.socket], block: bytes) -> None:
    stamped = block.replace(STAMP, b"%d" % (time.time_ns() // 1_000_000))
    for connection in connections:
        connection.sendall(stamped)
