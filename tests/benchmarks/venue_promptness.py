"""How long it takes from the sending of a trade by a venue until GET /prices/latest shows it, beside a tick over TCP.

MarketFlow runs in live mode on a real Redis and a real PostgreSQL, with an exchange over TCP and a venue that speaks
Binance's protocol, both of which send five symbols evenly, at 100 and at 1,000 a second each, from other processes.
This one sends marked ticks by turns to the one and the other, in step with nothing, and asks back to back until each
is shown. The delay over TCP, in the same run, is what that of the venue is compared with.

    python -m tests.benchmarks.venue_promptness
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from tests.benchmarks.feeder import Feeder, line, price_now, trade_frame
from tests.benchmarks.marks import Marks
from tests.benchmarks.report import percentile, report
from tests.benchmarks.stage import stage
from tests.support.application import ScriptedExchange
from tests.support.servers import wait_until
from tests.support.venue_server import VenueServer

MARKED = "BTCUSDT"
OTHERS = ("DOGEUSDT", "TONUSDT", "SOLUSDT", "ETHUSDT", "XRPUSDT")
RATES = (100, 1000)
WARM_UP_SECONDS = 2.0
PAUSE = (0.005, 0.02)


def measure(rate: int, samples: int, seconds: float) -> dict[str, Any]:
    """The delays at one rate of ticks a second and exchange, on a MarketFlow of its own."""
    with stage() as servers, ExitStack() as stack:
        venue = stack.enter_context(VenueServer("binance", (MARKED, *OTHERS)))
        exchange = stack.enter_context(ScriptedExchange("exchange1"))
        exchanges = [
            {"name": "exchange1", "address": exchange.address},
            {"name": "binance", "venue": "binance", "url": venue.url, "rest_url": venue.rest_url, "history": "0s"},
        ]
        symbols = json.dumps([MARKED, *OTHERS])
        application = servers.start({"MODE": "live", "EXCHANGES": json.dumps(exchanges), "SYMBOLS": symbols})
        client = exchange.client()
        wait_until(venue.has_subscriber, timeout=20)
        stream = venue.connections[-1].socket
        feeders = [
            stack.enter_context(Feeder([client], OTHERS, rate)),
            stack.enter_context(Feeder([stream], OTHERS, rate, trade_frame)),
        ]
        over_tcp, of_venue = (f"/prices/latest/{name}/{MARKED}" for name in ("exchange1", "binance"))
        client.sendall(line(MARKED, price_now()))
        stream.sendall(trade_frame(MARKED, price_now(), 0))
        for path in (over_tcp, of_venue):
            wait_until(lambda path=path: application.find(path), timeout=20)  # type: ignore[misc]
        marks = {
            "tcp": stack.enter_context(Marks(client, over_tcp, MARKED, application.port)),
            "venue": stack.enter_context(Marks(stream, of_venue, MARKED, application.port, trade_frame)),
        }
        _collect(marks, samples, WARM_UP_SECONDS)
        sent, began = sum(feeder.sent for feeder in feeders), time.monotonic()
        took = _collect(marks, samples, seconds)
        ticks_per_second = (sum(feeder.sent for feeder in feeders) - sent) / (time.monotonic() - began)
    delays = {f"{name}_p{at}_ms": percentile(took[name], at) for name in took for at in (50, 99)}
    ratios = {f"ratio_p{at}": delays[f"venue_p{at}_ms"] / delays[f"tcp_p{at}_ms"] for at in (50, 99)}
    return {"rate": rate, "samples": len(took["venue"]), **delays, **ratios, "ticks_per_second": ticks_per_second}


def _collect(marks: dict[str, Marks], samples: int, seconds: float) -> dict[str, list[float]]:
    took: dict[str, list[float]] = {name: [] for name in marks}
    end = time.monotonic() + seconds
    gc.disable()
    try:
        while len(took["venue"]) < samples and time.monotonic() < end:
            for name, each in marks.items():
                each.pause(*PAUSE)
                took[name].append(each.sample())
    finally:
        gc.enable()
    return took


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1200, help="marked ticks of each a rate; %(default)s")
    parser.add_argument("--seconds", type=float, default=40, help="the longest a rate may take; %(default)s")
    parser.add_argument("--quick", action="store_true", help="a hundred marked ticks a rate, for a look")
    arguments = parser.parse_args(argv)
    samples, seconds = (100, 5.0) if arguments.quick else (arguments.samples, arguments.seconds)
    report("venue_promptness", [measure(rate, samples, seconds) for rate in RATES])
    return 0


if __name__ == "__main__":
    sys.exit(main())
