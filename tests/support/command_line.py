"""The command line as a process."""

import os
import subprocess
import sys
from collections.abc import Mapping


def command(*arguments: str) -> list[str]:
    """Return the arguments of a process that runs the command line."""
    return [sys.executable, "-m", "marketflow", *arguments]


def environment(given: Mapping[str, object]) -> dict[str, str]:
    """Return an environment with the given settings and no others."""
    inherited = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return inherited | {f"MARKETFLOW_{name}": str(value) for name, value in given.items()}


def run(*arguments: str, **given: object) -> "subprocess.CompletedProcess[str]":
    """Run the command line as a process, without a terminal."""
    return subprocess.run(
        command(*arguments),
        env=environment(given),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
    )
