"""Runs all health checks concurrently, within a deadline.

Each check has a thread of its own, which is abandoned at the deadline: a resolver may hang for minutes, and cannot be
cancelled. Abandoned threads end with the process.
"""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future

from marketflow.cli.check.check_result import Check, CheckResult, CheckState
from marketflow.cli.check.cluster_checks import cluster_check
from marketflow.cli.check.data_folder_checks import data_folder_checks
from marketflow.cli.check.exchange_checks import exchange_check
from marketflow.cli.check.http_checks import http_check, token_results
from marketflow.cli.check.postgres_checks import postgres_check
from marketflow.cli.check.redis_checks import redis_check
from marketflow.model import Mode
from marketflow.runtime.store_servers import find_servers
from marketflow.settings import ExchangeSettings, Settings

DEADLINE_SECONDS = 6.0
"""Deadline for all checks together."""

VENUE_SECONDS = 9.0
"""How much later it is where there are venues: the list of instruments of a large one takes some seconds."""


def run_checks(settings: Settings) -> list[CheckResult]:
    """Check stores, exchanges, port and data folder; a check that misses the deadline has failed."""
    servers = find_servers(settings)
    needed = settings.mode is Mode.LIVE
    results = run_concurrently(
        [
            cluster_check(settings, servers) if settings.redis.nodes else redis_check(settings, servers),
            postgres_check(settings, servers),
            *(_feed_check(each, settings, needed) for each in settings.exchanges),
            http_check(settings.http),
            *data_folder_checks(settings),
        ],
        DEADLINE_SECONDS + (VENUE_SECONDS if any(each.venue for each in settings.exchanges) else 0.0),
    )
    return [*results, *token_results(settings.http)]


def _feed_check(exchange: ExchangeSettings, settings: Settings, needed: bool) -> Check:
    if not exchange.venue:
        return exchange_check(exchange, settings.symbols, settings.flow, needed)
    from marketflow.cli.check.venue_checks import venue_check  # lazily: without venues no client of theirs is needed

    return venue_check(exchange, settings.symbols, settings.flow, needed, settings.history_ms(exchange))


def run_concurrently(checks: Sequence[Check], seconds: float) -> list[CheckResult]:
    """Run the checks, and return all results in the order of the checks."""
    deadline = time.monotonic() + seconds
    futures = [_start(check) for check in checks]
    return [
        result
        for check, future in zip(checks, futures, strict=True)
        for result in _results(check, future, seconds, deadline)
    ]


def _start(check: Check) -> "Future[list[CheckResult]]":
    future: Future[list[CheckResult]] = Future()

    def work() -> None:
        try:
            future.set_result(check.run())
        except Exception as error:  # noqa: BLE001 - one check must not end the others
            bug = f"the check failed, which is a bug: {type(error).__name__}: {error}"
            future.set_result([CheckResult(check.what, check.where, CheckState.FAILED, bug)])

    threading.Thread(target=work, name=f"check-{check.what}", daemon=True).start()
    return future


def _results(check: Check, future: "Future[list[CheckResult]]", seconds: float, deadline: float) -> list[CheckResult]:
    try:
        return future.result(max(0.0, deadline - time.monotonic()))
    except TimeoutError:
        advice = "check whether its name can be resolved, and whether a firewall drops packets"
        return [CheckResult(check.what, check.where, CheckState.FAILED, f"no answer within {seconds:g} s", advice)]
