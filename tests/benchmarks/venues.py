"""How many trades a second a venue's feed takes on one core: frames of Binance, one trade each, over a WebSocket.

A process of its own sends prepared frames as fast as they are taken, with ids that go up by one per symbol and the time
of their sending. The feed is that of MarketFlow, with a consumer that merges its candles as the pipeline does; every
trade is counted at the end. The limit is measured in the same run, by turns with it: the library that receives, and
msgspec, which decodes each frame to a struct, and nothing else. Trades a second are those of a CPU second of this
process, which has one busy thread; by the clock the sender is the slower of the two. Medians with the range.

The exit code is 1 when a trade is missing.

    python -m tests.benchmarks.venues
    python -m tests.benchmarks.venues --symbols 50 --runs 9
"""

import argparse
import asyncio
import multiprocessing
import socket
import statistics
import struct
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha1

import msgspec
import picows

from marketflow.clock import system_clock
from marketflow.feeds.decoder import Decoder
from marketflow.feeds.venues.limits import AttemptBudget
from marketflow.feeds.venues.registry import VENUES
from marketflow.feeds.venues.websocket.frame_stream import RECEIVE_BYTES
from marketflow.feeds.venues.websocket_feed import VenueFeed
from marketflow.model import Candles, Mode, merge_into
from tests.benchmarks.report import report
from tests.support.servers import HOST

FRAMES_A_BLOCK = 500
_STAMP = b"1000000000000"


class _Limit(msgspec.Struct, gc=False):
    """What is decoded of a trade, by the names of the venue."""

    s: str
    t: int
    p: float
    q: float
    T: int
    m: bool


def frames(symbols: Sequence[str], first: int, count: int) -> bytes:
    """WebSocket frames of trades, by turns of each symbol; ids begin at `first`."""
    made = bytearray()
    for number in range(count):
        symbol, trade_id = symbols[number % len(symbols)], first + number // len(symbols)
        text = b'{"e":"trade","E":%s,"s":"%s","t":%d,"p":"%d.29000000","q":"0.00062000","T":%s,"m":%s,"M":true}' % (
            _STAMP,
            symbol.encode(),
            1_000_000_000 + trade_id,
            83_000 + number % 50,
            _STAMP,
            (b"true", b"false")[number % 2],
        )
        made += b"\x81\x7e" + struct.pack("!H", len(text)) + text
    return bytes(made)


def serve(listener: socket.socket, symbols: Sequence[str], trades: int) -> None:
    """Send each client this number of trades, once it has sent something; then wait until it leaves."""
    blocks = [frames(symbols, at // len(symbols), FRAMES_A_BLOCK) for at in range(0, trades, FRAMES_A_BLOCK)]
    while True:
        client, _ = listener.accept()
        with client:
            request = b""
            while b"\r\n\r\n" not in request:
                request += client.recv(4096)
            key = next(line[19:] for line in request.split(b"\r\n") if line.lower().startswith(b"sec-websocket-key: "))
            accept = b64encode(sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11", usedforsecurity=False).digest())
            client.sendall(
                b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n"
            )
            client.recv(4096)
            for block in blocks:
                client.sendall(block.replace(_STAMP, b"%d" % (time.time_ns() // 1_000_000)))
            while client.recv(4096):
                pass


@contextmanager
def serving(symbols: Sequence[str], trades: int) -> Iterator[str]:
    """The URL of a server that sends trades."""
    with socket.create_server((HOST, 0)) as listener:
        process = multiprocessing.get_context("spawn").Process(
            target=serve, args=(listener, symbols, trades), daemon=True
        )
        process.start()
        try:
            yield f"ws://{HOST}:{listener.getsockname()[1]}"
        finally:
            process.kill()
            process.join(5)


class _Bare(picows.WSListener):
    """Decodes each frame."""

    def __init__(self) -> None:
        self.decoded = 0
        self._decode = msgspec.json.Decoder(_Limit, strict=False).decode

    def on_ws_frame(self, transport: picows.WSTransport, frame: picows.WSFrame) -> None:
        self._decode(frame.get_payload_as_bytes())
        self.decoded += 1
        if frame.last_in_buffer and self.decoded >= self.awaited:
            transport.disconnect()

    awaited = 0


def run_limit(url: str, trades: int) -> None:
    """Receive and decode."""

    async def receive() -> None:
        transport, listener = await picows.ws_connect(_Bare, url, read_buffer_init_size=RECEIVE_BYTES)
        assert isinstance(listener, _Bare)
        listener.awaited = trades
        transport.send(picows.WSMsgType.TEXT, b"begin")
        await transport.wait_disconnected()
        assert listener.decoded == trades

    asyncio.run(receive())


def run_feed(url: str, trades: int, symbols: Sequence[str]) -> None:
    """Receive by the feed.

    Raises:
        ValueError: it counted others than were sent.
    """
    decoder = Decoder(Mode.LIVE, "binance", symbols, system_clock, 60_000, lambda *_: None)
    budget = AttemptBudget(100, 1.0, time.monotonic)
    feed = VenueFeed(
        "binance", VENUES["binance"], symbols, {each: each for each in symbols}, decoder, 15.0, budget, url
    )
    done = threading.Event()
    merged: Candles = {}
    errors: list[Exception] = []

    def take(candles: Candles) -> None:
        merge_into(merged, candles)
        if decoder.ticks >= trades:
            done.set()

    def fail(error: Exception) -> None:
        errors.append(error)
        done.set()

    subscription = feed.batches().subscribe(take, fail)
    done.wait(60)
    subscription.dispose()
    counted = sum(candle.ticks for candle in merged.values())
    if counted != trades or errors or feed.doubles:
        raise ValueError(f"{counted} trades of {trades} were counted, {feed.doubles} doubles: {errors}")


def rate(work: Callable[[], None], trades: int) -> tuple[float, float]:
    """Trades a second of CPU time, and by the clock."""
    began, used = time.perf_counter(), time.process_time()
    work()
    return trades / (time.process_time() - used), trades / (time.perf_counter() - began)


def measure(symbols: Sequence[str], trades: int, runs: int) -> dict[str, object]:
    """Limit and feed by turns."""
    limits, feeds, by_clock = [], [], []
    with serving(symbols, trades) as url:
        for _ in range(runs):
            limits.append(rate(lambda: run_limit(url, trades), trades)[0])
            feed, clock = rate(lambda: run_feed(url, trades, symbols), trades)
            feeds.append(feed)
            by_clock.append(clock)
    limit, feed = statistics.median(limits), statistics.median(feeds)
    return {
        "symbols": len(symbols),
        "limit": limit,
        "limit_range": f"{min(limits):,.0f} to {max(limits):,.0f}",
        "trades_per_second": feed,
        "range": f"{min(feeds):,.0f} to {max(feeds):,.0f}",
        "share_of_limit": feed / limit,
        "by_the_clock": statistics.median(by_clock),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--symbols", type=int, nargs="*", default=[1, 5, 50], help="how many; each a measurement")
    parser.add_argument("--trades", type=int, default=500_000, help="in each run; a multiple of 500")
    parser.add_argument("--runs", type=int, default=5, help="of limit and feed, by turns")
    parser.add_argument("--quick", action="store_true", help="short runs, for a look")
    arguments = parser.parse_args()
    trades, runs = (50_000, 3) if arguments.quick else (arguments.trades, arguments.runs)
    measured = []
    try:
        for count in arguments.symbols:
            measured.append(measure([f"S{number}USDT" for number in range(count)], trades, runs))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    report("venues", measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())
