"""MarketFlow on a machine whose resolver hangs at some names: python -m tests.faults.hanging_resolver [ARGUMENTS]."""

import socket
import sys
import threading
from typing import Any

from marketflow.cli.main import main

HANGS = "hangs.invalid"


def run(arguments: list[str]) -> int:
    """Run MarketFlow; the lookup of HANGS never ends."""
    look_up = socket.getaddrinfo

    def hanging(host: Any, *others: Any, **keywords: Any) -> Any:
        if host == HANGS:
            threading.Event().wait()
        return look_up(host, *others, **keywords)

    socket.getaddrinfo = hanging
    return main(arguments)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
