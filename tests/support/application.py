"""MarketFlow as a real process, and exchanges on real sockets that send what a test tells them to."""

import fcntl
import itertools
import json
import os
import re
import signal
import socket
import ssl
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, NamedTuple, Self

import httpx
import psycopg

from marketflow.model import Mode, Series, Slot, Tick
from tests.support.core_waits import CoreWaits
from tests.support.oracle import Rows
from tests.support.servers import HOST, PATIENCE_SECONDS, free_port, wait_until

ROOT = Path(__file__).parents[2]

NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""For clients of plain HTTP: each would load all certificates that the machine trusts, which takes 26 ms of CPU."""


class Drained(NamedTuple):
    """Minute rows of a stop, as its log counts them."""

    written: int
    in_redis: int
    in_no_store: int


SET_BACK_MS = 2_000
"""By how much tests of minutes allow the clock of the machine to be set back: that of some is, by half a second."""


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def wait_until_over(end: int) -> None:
    """Wait until a time (Unix ms) is over, even if the clock is set back by up to SET_BACK_MS afterwards."""
    over = end + SET_BACK_MS
    wait_until(lambda: now_ms() > over, timeout=(over - now_ms()) / 1000 + PATIENCE_SECONDS)


class ScriptedExchange:
    """An exchange on a TCP port; remembers every tick that it has sent."""

    def __init__(self, name: str = "exchange1", port: int = 0) -> None:
        self.name = name
        self.sent: list[tuple[Series, Tick]] = []
        self.clients: list[socket.socket] = []
        self.accepted_at: list[float] = []
        """When each connection came, in seconds of the monotonic clock."""
        self.port = port
        self.open()

    def connections(self) -> int:
        """Return the number of clients that have not disconnected."""
        return sum(not _hung_up(client) for client in list(self.clients))

    def open(self) -> None:
        """Listen, on the port of before."""
        self._listener = socket.create_server((HOST, self.port))
        self.port = self._listener.getsockname()[1]
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def close(self) -> None:
        """Refuse everybody and cut off those who are connected."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join(5)
        self.cut()

    def cut(self) -> None:
        """Close all connections; new ones are welcome."""
        while self.clients:
            self.clients.pop().close()

    def reset(self) -> None:
        """Reset all connections; new ones are welcome."""
        for client in self.clients:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.cut()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"

    def client(self) -> socket.socket:
        """The last connection; waits for the first."""
        wait_until(lambda: self.clients, timeout=20, message=f"nobody connected to {self.name}")
        return self.clients[-1]

    def connected(self) -> socket.socket | None:
        """The last connection, None once the other side has ended it."""
        if self.clients and _hung_up(self.clients[-1]):
            self.cut()
        return self.clients[-1] if self.clients else None

    def unread(self) -> int:
        """Bytes sent that have not yet reached the machine of the client."""
        client = self.connected()
        return 0 if client is None else struct.unpack("i", fcntl.ioctl(client, termios.TIOCOUTQ, bytes(4)))[0]

    def send(self, *prices: float, symbol: str = "BTCUSDT", at: int | None = None) -> int:
        """Send a tick for each price, all of the same event time (now, unless told); gives that time (Unix ms)."""
        at = now_ms() if at is None else at
        lines = []
        for price in prices:
            lines.append(json.dumps({"symbol": symbol, "price": price, "timestamp": at}) + "\n")
            tick = Tick(price, at, len(self.sent))
            self.sent.append((Series(Mode.LIVE, self.name, symbol), tick))
        self.send_raw("".join(lines).encode())
        return at

    def offer(self, price: float, symbol: str = "BTCUSDT", at: int | None = None) -> None:
        """Send a tick if somebody is connected. One that nobody can receive is not sent, and not in `sent`."""
        if self.connected() is None:
            return
        try:
            self.send(price, symbol=symbol, at=at)
        except OSError:
            self.sent.pop()
            self.cut()

    def send_raw(self, data: bytes) -> None:
        self.client().sendall(data)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.accepted_at.append(time.monotonic())
            self.clients.append(client)


def _hung_up(client: socket.socket) -> bool:
    try:
        return not client.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


def sent_by(exchanges: Iterable[ScriptedExchange]) -> list[tuple[Series, Tick]]:
    """All that exchanges have sent so far."""
    return [tick for exchange in exchanges for tick in exchange.sent]


class Traffic:
    """Ticks from several exchanges, sent at a steady rate until it ends; no two prices of a series are the same.

    Args:
        exchanges: who sends; their `sent` is the log.
        symbols: of what, in turn.
        rate: ticks a second and exchange.
        burst: how many of them are sent together.
        coming_and_going: whether clients may be cut off; what then finds nobody is not sent.
        clock: gives the event times (Unix ms).
        lowest: the prices lie up to 12,501 above it.
    """

    def __init__(
        self,
        exchanges: Sequence[ScriptedExchange],
        symbols: Sequence[str] = ("BTCUSDT", "ETHUSDT"),
        rate: float = 200,
        burst: int = 1,
        coming_and_going: bool = False,
        clock: Callable[[], int] = now_ms,
        lowest: float = 1000,
    ) -> None:
        self._exchanges = exchanges
        self._symbols = symbols
        self._pause = burst / rate
        self._burst = burst
        self._coming_and_going = coming_and_going
        self._clock = clock
        self._lowest = lowest
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._send, daemon=True)
        self.error: Exception | None = None

    @property
    def sent(self) -> list[tuple[Series, Tick]]:
        """All that was sent so far."""
        return sent_by(self._exchanges)

    @property
    def count(self) -> int:
        """How many that are."""
        return sum(len(exchange.sent) for exchange in self._exchanges)

    def end(self) -> None:
        """Send no more; what was sent is on its way."""
        self._ended.set()
        self._thread.join(10)

    def __enter__(self) -> Self:
        for exchange in self._exchanges:
            wait_until(exchange.connected, timeout=20, message=f"nobody connected to {exchange.name}")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        assert self.error is None, f"the exchange could not send: {self.error!r}"

    def _send(self) -> None:
        begun, beats = time.monotonic(), 0
        try:
            while not self._ended.wait(max(0.0, begun + beats * self._pause - time.monotonic())):
                for exchange in self._exchanges:
                    self._send_from(exchange)
                beats += 1
        except Exception as error:  # noqa: BLE001 - raised at the end
            self.error = error

    def _send_from(self, exchange: ScriptedExchange) -> None:
        first = len(exchange.sent)
        symbol = self._symbols[first // self._burst % len(self._symbols)]
        # Eighths add up without rounding, and no run of them amounts to the same as another.
        prices = [self._lowest + (number * 7919 % 100_003) / 8 for number in range(first, first + self._burst)]
        if self._coming_and_going:
            for price in prices:
                exchange.offer(price, symbol, self._clock())
        else:
            exchange.send(*prices, symbol=symbol, at=self._clock())


class Readers:
    """HTTP clients, each with a connection of its own, that ask for prices as fast as they are answered.

    Once the application ends they end as well. What it answered before must have been an answer.

    Args:
        port: of the application.
        count: how many they are.
    """

    PATHS = ("/prices/latest/BTCUSDT", "/prices/average/BTCUSDT?period=1m", "/prices/highest/ETHUSDT", "/health")

    def __init__(self, port: int, count: int = 4) -> None:
        self._port = port
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._read, daemon=True) for _ in range(count)]
        self.answers = 0
        self.refused: list[int] = []
        """Status codes that no reader should see."""

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(10)

    def _read(self) -> None:
        with closing(HTTPConnection(HOST, self._port, timeout=5)) as connection:
            for path in itertools.cycle(self.PATHS):
                try:
                    connection.request("GET", path)
                    answer = connection.getresponse()
                    answer.read()
                except (OSError, HTTPException):
                    return
                self.answers += 1
                if answer.status not in (200, 404):
                    self.refused.append(answer.status)
                if self._ended.is_set():
                    return


def switches(log: str) -> list[str]:
    """What a log says of switches of the mode, without who asked for them."""
    return [found[0] for found in re.finditer(r"(mode )?switched to \w+ (by|mode)", log)]


class Application:
    """A MarketFlow process, configured by the environment as a user would.

    Args:
        folder: where its log goes, and its data unless `environment` says otherwise.
        environment: settings, such as {"REDIS__HOST": "127.0.0.1"}; the prefix is added.
        arguments: of the command line.
        program: what Python runs.
        checkout: the root of the source tree whose code runs.
        variables: of its environment that are no settings.
    """

    def __init__(
        self,
        folder: Path,
        environment: Mapping[str, object] | None = None,
        arguments: tuple[str, ...] = (),
        program: tuple[str, ...] = ("-m", "marketflow"),
        checkout: Path = ROOT,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.port = free_port()
        self.log_path = folder / "application.log"
        self._command = [sys.executable, *program, *arguments]
        # Nothing of the environment of the tests but what any process needs.
        inherited = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        given = {"DATA_DIR": folder / "data", "HTTP__PORT": self.port} | dict(environment or {})
        # The processes it starts must run the code of the same tree.
        inherited["PYTHONPATH"] = str(checkout)
        inherited["PYTHONFAULTHANDLER"] = "1"
        inherited |= variables or {}
        self._checkout = checkout
        self._environment = inherited | {f"MARKETFLOW_{name}": str(value) for name, value in given.items()}
        self._process: subprocess.Popen[bytes] | None = None
        self.http = httpx.Client(base_url=f"http://{HOST}:{self.port}", timeout=5.0, verify=NO_TLS)

    def start(self, wait: bool = True, timeout: float = 30.0) -> Self:
        """Start it and wait until it is ready.

        Raises:
            AssertionError: it was not within `timeout` seconds; with the end of its log.
        """
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=self._checkout,
                env=self._environment,
                stdout=log,
                stderr=log,
            )
        if wait:
            try:
                wait_until(self.ready, timeout, "the application did not become ready")
            except AssertionError as error:
                raise AssertionError(f"{error}\n{self.log[-5000:]}") from None
        return self

    def fails(self) -> int:
        """Start it where it must not start; gives its exit code."""
        self.start(wait=False)
        self.http.close()
        return self.process.wait(20)

    @property
    def process(self) -> "subprocess.Popen[bytes]":
        assert self._process is not None
        return self._process

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def ready(self) -> bool:
        assert self.process.poll() is None, f"the application ended with {self.process.returncode}:\n{self.log}"
        try:
            return self.http.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def get(self, path: str, **query: str) -> Any:
        """The body of an answer that must be a good one; a client with too many requests waits for its Retry-After."""
        answer = self.http.get(path, params=query)
        while answer.status_code == 429:  # a test that awaits a condition asks far more often than any user
            time.sleep(float(answer.headers["Retry-After"]))
            answer = self.http.get(path, params=query)
        assert answer.status_code == 200, (path, answer.status_code, answer.text)
        return answer.json()

    def find(self, path: str, **query: str) -> Any:
        """The body of an answer, None when there is none (yet)."""
        answer = self.http.get(path, params=query)
        return answer.json() if answer.status_code == 200 else None

    def switch(self, mode: str) -> Any:
        answer = self.http.post(f"/mode/{mode}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def stop(self, number: int = signal.SIGINT, timeout: float = 30.0) -> tuple[int, float]:
        """Send a signal and wait for the end; gives the exit code and the seconds it took, without waits for a core.

        Raises:
            AssertionError: no end within `timeout` seconds; with the end of its log and the stacks of its threads.
        """
        try:
            with CoreWaits.of_tests() as waits:
                began = time.monotonic()
                self.process.send_signal(number)
                code = self.process.wait(timeout)
                seconds = waits.seconds_since(began)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)  # the stacks of its threads go to the log
            self.process.send_signal(signal.SIGCONT)  # in case a test has frozen it
            self.process.wait(10)
            raise AssertionError(f"no end within {timeout} s of signal {number}:\n{self.log[-10_000:]}") from None
        return code, seconds

    def drained(self) -> "Drained":
        """What the last stop has logged."""
        pattern = r"drained: (\d+) minute rows are written; (\d+) are confirmed by Redis alone .*; (\d+) are in neither"
        return Drained(*(int(number) for number in re.findall(pattern, self.log)[-1]))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:  # left behind, it would take ticks into the Redis of the tests that follow
            self.close()
            raise

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it if it still runs: what a failed test leaves behind takes CPU from those that follow."""
        self.http.close()
        if self._process is not None and self._process.poll() is None:
            with suppress(AssertionError):  # a test that cares has stopped it
                self.stop(signal.SIGTERM)


def read_rows(connection: "psycopg.Connection[Any]") -> Rows:
    """The table as it is now."""
    cursor = connection.execute("select * from aggregates")
    names = [column.name for column in cursor.description or ()]
    found = [dict(zip(names, row, strict=True)) for row in cursor]
    return {
        Slot(
            Series(Mode(row["mode"]), row["exchange"], row["pair_name"]), round(row["timestamp"].timestamp() * 1000)
        ): row
        for row in found
    }


def exchanges_setting(*exchanges: ScriptedExchange) -> str:
    """The value of MARKETFLOW_EXCHANGES."""
    tables = ", ".join(f'{{name="{exchange.name}",address="{exchange.address}"}}' for exchange in exchanges)
    return f"[{tables}]"
