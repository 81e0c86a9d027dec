"""HTTP load: clients that ask one thing as fast as it is answered.

wrk where it is installed, else this program:

    python -m tests.benchmarks.load PORT PATH --seconds 3 --connections 16
"""

import argparse
import asyncio
import json
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple, cast

import uvloop

from tests.benchmarks.rawhttp import length_of, request_of
from tests.benchmarks.report import percentile
from tests.support.servers import HOST

CONNECTIONS = 16


class Load(NamedTuple):
    """What came back: answers a second, latency in ms, answers that were not 200 or did not come, CPU used to ask."""

    per_second: float
    p50_ms: float
    p99_ms: float
    failed: int
    cores: float


def ask(port: int, path: str, seconds: int, connections: int = CONNECTIONS) -> Load:
    """Ask from a process of its own, with `connections` that are kept alive."""
    if wrk := shutil.which("wrk"):
        address = f"http://{HOST}:{port}{path}"
        command = [wrk, "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", address]
    else:
        options = [f"--seconds={seconds}", f"--connections={connections}"]
        command = [sys.executable, "-m", "tests.benchmarks.load", str(port), path, *options]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cores = (after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime) / seconds
    if wrk:
        return _read_wrk(done.stdout, cores)
    return Load(**json.loads(done.stdout))._replace(cores=cores)


def _read_wrk(output: str, cores: float) -> Load:
    def found(pattern: str) -> list[tuple[str, ...]]:
        return [match.groups() for match in re.finditer(pattern, output)]

    in_ms = {"us": 0.001, "ms": 1.0, "s": 1000.0, "m": 60_000.0}
    latency = {at: float(value) * in_ms[unit] for at, value, unit in found(r"(50|99)%\s+([\d.]+)(us|ms|s|m)\b")}
    failed = [count for counts in found(r"Non-2xx or 3xx responses: (\d+)") for count in counts]
    failed += [count for counts in found(r"connect (\d+), read (\d+), write (\d+), timeout (\d+)") for count in counts]
    ((per_second,),) = found(r"Requests/sec:\s+([\d.]+)")
    return Load(float(per_second), latency["50"], latency["99"], sum(map(int, failed)), cores)


class _Asking(asyncio.Protocol):
    """One connection, which asks again as soon as it is answered."""

    def __init__(self, request: bytes, until: float, took: list[float], failed: list[str]) -> None:
        self._request = request
        self._until = until
        self._took = took
        self._failed = failed
        self._data = b""
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance
        self._ask()

    def data_received(self, data: bytes) -> None:
        self._data += data
        try:
            length = length_of(self._data)
        except ValueError as error:
            self._failed.append(str(error))
            self._transport.abort()
            return
        if length is None or len(self._data) < length:
            return
        self._data = b""
        now = time.perf_counter()
        self._took.append(now - self._asked)
        if now < self._until:
            self._ask()
        else:
            self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if error is not None:
            self._failed.append(str(error))
        self.ended.set_result(None)

    def _ask(self) -> None:
        self._asked = time.perf_counter()
        self._transport.write(self._request)


async def _ask(port: int, path: str, seconds: float, connections: int) -> Load:
    took: list[float] = []
    failed: list[str] = []
    until = time.perf_counter() + seconds
    loop = asyncio.get_running_loop()
    pairs = [
        await loop.create_connection(lambda: _Asking(request_of(path), until, took, failed), HOST, port)
        for _ in range(connections)
    ]
    await asyncio.wait([protocol.ended for _, protocol in pairs], timeout=seconds + 5)
    missing = sum(not protocol.ended.done() for _, protocol in pairs)
    in_ms = [1000 * each for each in took or [seconds]]
    return Load(len(took) / seconds, percentile(in_ms, 50), percentile(in_ms, 99), len(failed) + missing, 0.0)


def main(argv: Sequence[str] | None = None) -> int:
    """Ask, and print a Load as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=int)
    parser.add_argument("path")
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--connections", type=int, default=CONNECTIONS)
    arguments = parser.parse_args(argv)
    load = uvloop.run(_ask(arguments.port, arguments.path, arguments.seconds, arguments.connections))
    print(json.dumps(load._asdict()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
