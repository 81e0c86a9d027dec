"""What alert rules cost the ingest process that leads, which evaluates the prices of all owners.

Three ingest processes share five exchanges with 300 symbols each, one tick a second of each of the 1,500 series. So the
lead owns two exchanges at most; it reads the slices of all series that rules are about from Redis. Rules watch levels
that no price reaches: what is measured is looking for events, and not storing them. `lead` and `others` are cores, of
the process that leads and of the other two on average; `limit_s` is how many commands in pipelines of a thousand one
client does a second on this machine.

    python -m tests.benchmarks.shared_alerts --rules 0 --rules 5000
"""

import argparse
import json
import multiprocessing
import random
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from typing import Any

from marketflow.settings.shards import LEAD
from tests.benchmarks.breadth import CASES, feed, pipelined_limit
from tests.benchmarks.cores import Cores
from tests.benchmarks.report import report
from tests.benchmarks.stage import stage
from tests.faults.test_shared_alerts import owner_of
from tests.support.application import ROOT
from tests.support.servers import HOST, wait_until

CASE = CASES["1500"]
PROCESSES = 3
WARM_UP_SECONDS = 5.0
SECONDS = 20.0


def rules(count: int, exchanges: Sequence[str], symbols: Sequence[str]) -> list[dict[str, Any]]:
    """Return price rules, the same number about each series as nearly as possible."""
    rng = random.Random(11)
    series = [(exchange, symbol) for exchange in exchanges for symbol in symbols]
    rng.shuffle(series)
    given = (series[number % len(series)] for number in range(count))
    return [
        {"kind": "price", "exchange": exchange, "symbol": symbol, "level": 1e6 + number, "cooldown": "1h"}
        for number, (exchange, symbol) in enumerate(given)
    ]


def run(count: int, seconds: float, checkout: Path = ROOT) -> dict[str, Any]:
    """One measurement."""
    symbols = [f"S{number}USDT" for number in range(CASE.symbols)]
    names = [f"exchange{number}" for number in range(CASE.exchanges)]
    with stage(checkout) as servers, ExitStack() as stack:
        limit = pipelined_limit(stack.enter_context(servers.redis.client()))
        ours, theirs = multiprocessing.Pipe()
        feeder = multiprocessing.get_context("spawn").Process(target=feed, args=(theirs, CASE, symbols))
        feeder.start()
        stack.callback(feeder.kill)
        given = [{"name": name, "address": f"{HOST}:{port}"} for name, port in zip(names, ours.recv(), strict=True)]
        config = servers.folder / "config.json"
        alerts = rules(count, names, symbols)
        config.write_text(json.dumps({"mode": "live", "symbols": symbols, "exchanges": given, "alerts": alerts}))
        arguments = ("--config", str(config), "--role", "ingest")
        processes = [servers.start({}, *arguments, wait=False) for _ in range(PROCESSES)]
        wait_until(lambda: all("takes ticks in" in each.log for each in processes), 30, "not all own shards")
        time.sleep(WARM_UP_SECONDS)
        assert servers.redis.process
        parties = {str(number): each.process.pid for number, each in enumerate(processes)}
        with Cores(parties | {"redis": servers.redis.process.pid}) as cores:
            time.sleep(seconds)
        lead = processes.index(next(each for each in processes if owner_of(servers.redis, LEAD, [each])))
        codes = [each.stop(timeout=30)[0] for each in processes]
        ours.send("stop")
        ours.recv()
        ours.send("done")
    return {
        "rules": count,
        "watched_series": min(count, CASE.series),
        "lead": cores.used[str(lead)],
        "others": fmean(cores.used[number] for number in parties if number != str(lead)),
        "redis": cores.used["redis"],
        "limit_s": limit,
        "exit_codes": max(codes),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", action="append", type=int, help="may be given again; default: 0, 100, 1000 and 5000")
    parser.add_argument("--quick", action="store_true", help="some seconds, for a look")
    arguments = parser.parse_args()
    counts = arguments.rules or [0, 100, 1000, 5000]
    measured = [run(count, 5.0 if arguments.quick else SECONDS) for count in counts]
    report("shared_alerts", measured)
    return max(int(row["exit_codes"]) for row in measured)


if __name__ == "__main__":
    sys.exit(main())
