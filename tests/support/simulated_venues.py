"""Simulated venues, each `marketflow exchange` in a process of its own."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from tests.support.servers import wait_until

SYMBOLS = ("BTCUSDT", "ETHUSDT")


def simulated_venue(
    venue: str, folder: Path, port: int = 0, symbols: Sequence[str] = SYMBOLS, rate: float = 50.0
) -> AbstractContextManager[int]:
    """Yield the port of a simulated venue; its log is in the folder."""
    flags = ["--venue", venue, "--symbols", ",".join(symbols), "--rate", f"{rate:g}", "--port", str(port)]
    return exchange_process(flags, folder / f"{venue}.log")


@contextmanager
def exchange_process(flags: Sequence[str | Path], log: Path) -> Iterator[int]:
    """Yield the port of `marketflow exchange` by the protocol of a venue."""
    command = [sys.executable, "-m", "marketflow", "exchange", *flags]
    with log.open("ab") as stderr, subprocess.Popen(command, stderr=stderr) as process:
        try:
            found = wait_until(lambda: re.search(rb"listens on ws://127.0.0.1:(\d+)", log.read_bytes()), 30.0)
            assert found is not None
            yield int(found[1])
        finally:
            process.terminate()
            assert process.wait(10) == 0


def venues_setting(ports: Mapping[str, int]) -> str:
    """The setting `exchanges` for venues on these ports, each by its own name."""
    return json.dumps(
        [
            {"name": venue, "venue": venue, "url": f"ws://127.0.0.1:{port}", "rest_url": f"http://127.0.0.1:{port}"}
            for venue, port in ports.items()
        ]
    )
