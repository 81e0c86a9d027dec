"""The round over everything the settings name: all at once, and over in a few seconds whatever does not answer.

Each check is a thread of its own that nobody waits for longer than DEADLINE_SECONDS: a resolver may hang for minutes,
and nothing can end it. Threads that are left behind end with the process.
"""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future

from marketflow.cli.check.data_folder import data_checks
from marketflow.cli.check.exchange_checks import exchange_check
from marketflow.cli.check.findings import Check, Finding, State
from marketflow.cli.check.http_checks import http_check, token_finding
from marketflow.cli.check.postgres_checks import postgres_check
from marketflow.cli.check.redis_checks import redis_check
from marketflow.model import Mode
from marketflow.runtime.store_servers import find_servers
from marketflow.settings import Settings

DEADLINE_SECONDS = 6.0
"""How long everything together may take."""


def look_at_everything(settings: Settings) -> list[Finding]:
    """Look at stores, exchanges, port and folder, side by side; what has not ended in time has failed."""
    servers = find_servers(settings)
    needed = settings.mode is Mode.LIVE
    findings = side_by_side(
        [
            redis_check(settings, servers),
            postgres_check(settings, servers),
            *(exchange_check(each, settings.symbols, settings.flow, needed) for each in settings.exchanges),
            http_check(settings.http),
            *data_checks(settings),
        ],
        DEADLINE_SECONDS,
    )
    return [*findings, *token_finding(settings.http)]


def side_by_side(checks: Sequence[Check], seconds: float) -> list[Finding]:
    """What all of them find, in their order."""
    deadline = time.monotonic() + seconds
    found = [_begin(check) for check in checks]
    return [
        finding
        for check, future in zip(checks, found, strict=True)
        for finding in _result(check, future, seconds, deadline)
    ]


def _begin(check: Check) -> "Future[list[Finding]]":
    future: Future[list[Finding]] = Future()

    def work() -> None:
        try:
            future.set_result(check.look())
        except Exception as error:  # noqa: BLE001 - one check must not take the others with it
            bug = f"could not be looked at, which is a bug: {type(error).__name__}: {error}"
            future.set_result([Finding(check.what, check.where, State.FAILED, bug)])

    threading.Thread(target=work, name=f"check-{check.what}", daemon=True).start()
    return future


def _result(check: Check, future: "Future[list[Finding]]", seconds: float, deadline: float) -> list[Finding]:
    try:
        return future.result(max(0.0, deadline - time.monotonic()))
    except TimeoutError:
        advice = "see whether its name can be looked up, and what swallows packets on the way"
        return [Finding(check.what, check.where, State.FAILED, f"no answer within {seconds:g} s", advice)]
