"""The system clock is set by an hour; every tick is in one row, and nothing is delayed by an hour."""

import math
import signal
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path

import pytest

from tests.faults.conftest import WINDOW_MS, Sent, StartApplication, seconds_until, through, wait_until_connected
from tests.faults.stepped_clock import Step
from tests.support.application import Application, ScriptedExchange, Traffic, now_ms
from tests.support.exposition import samples_of
from tests.support.oracle import Rows, assert_rows_equal
from tests.support.proxy import Proxy
from tests.support.servers import wait_until

HOUR = 3600
STEPS = (HOUR, -HOUR)  # forward by one hour, then back by two
STALE_SECONDS = 2


@pytest.fixture
def step(server_folder: Path) -> Step:
    return Step(server_folder / "step")


@pytest.fixture
def application(
    start: StartApplication, servers: dict[str, object], server_folder: Path, redis_proxy: Proxy, step: Step
) -> Application:
    """An application whose clock is off by `step`."""
    program = ("-m", "tests.faults.stepped_clock", str(server_folder / "step"))
    given = through(servers, redis=redis_proxy) | {"FLOW__STALE_AFTER_SECONDS": STALE_SECONDS}
    return start(given, program=program)


def sent_since(traffic: Traffic, before: int) -> int:
    return traffic.count - before


def rejected(application: Application) -> float:
    """Return how many ticks were dropped because of their time."""
    samples = samples_of(application.http.get("/metrics").text)
    return sum(
        samples.of("ticks_rejected_total", exchange=f"exchange{number}", reason=reason) or 0.0
        for number in (1, 2, 3)
        for reason in ("stale", "ahead")
    )


def tells_offsets(application: Application, exchanges: Sequence[ScriptedExchange], offset_ms: float) -> bool:
    """Return whether /health reports the clock offset of every exchange, to within the allowed skew."""
    told = application.get("/health").get("clock_offsets_ms", {})
    return told.keys() == {each.name for each in exchanges} and all(
        abs(each - offset_ms) <= 5000 for each in told.values()
    )


def are_written(rows: Callable[[], Rows], around: float, ticks: float) -> bool:
    """Return whether `ticks` are in rows of the half hour before and after a time (Unix ms)."""
    near = [int(row["tick_count"]) for slot, row in rows().items() if abs(slot.start - around) < HOUR * 500]
    return sum(near) >= ticks


def assert_goes_on(
    application: Application,
    exchanges: Sequence[ScriptedExchange],
    redis_proxy: Proxy,
    step: Step,
    sent_since: Callable[[], int],
) -> None:
    """Check that new prices are answered, periods end now, and no timer is late by the step or runs at once."""
    for exchange in exchanges:
        assert_latest_advances(application, exchange)
    assert_period_is_of_now(application, step, sent_since)
    assert_waits_are_what_they_were(application, exchanges, redis_proxy)


def assert_latest_advances(application: Application, exchange: ScriptedExchange) -> None:
    seen: set[float] = set()

    def advanced() -> bool:
        if answer := application.find(f"/prices/latest/{exchange.name}/BTCUSDT"):
            seen.add(answer["price"])
        return len(seen) > 3

    wait_until(advanced, timeout=3, message=f"the latest price of {exchange.name} stands still")


def assert_period_is_of_now(application: Application, step: Step, sent_since: Callable[[], int]) -> None:
    """Check that a period ends now by the system clock, and contains exactly the ticks since that was set."""
    answer = application.get("/prices/average/BTCUSDT", period="1m")
    assert 0 < answer["ticks"] <= sent_since()
    assert abs(datetime.fromisoformat(answer["to"]).timestamp() - time.time() - step.seconds) < 2
    assert application.get("/prices/highest/BTCUSDT", period="10s")["price"] > 0


def assert_waits_are_what_they_were(
    application: Application, exchanges: Sequence[ScriptedExchange], redis_proxy: Proxy
) -> None:
    came = [len(exchange.accepted_at) for exchange in exchanges]
    redis_proxy.stall()
    seconds_until(lambda: application.get("/health")["redis"] == "down", timeout=3)
    redis_proxy.heal()
    seconds_until(lambda: application.get("/health")["redis"] == "ok", timeout=3)
    exchanges[0].cut()
    seconds_until(lambda: len(exchanges[0].accepted_at) > came[0], timeout=2)
    wait_until_connected(application, exchanges)
    assert [len(exchange.accepted_at) for exchange in exchanges] == [came[0] + 1, *came[1:]]


def assert_each_tick_is_in_one_row(rows: Rows, sent: Sent) -> None:
    """Check that the rows of each series have all ticks that were sent, with the same total."""
    for series in {series for series, _ in sent}:
        prices = [tick.price for each, tick in sent if each == series]
        found = [row for slot, row in rows.items() if slot.series == series]
        assert sum(row["tick_count"] for row in found) == len(prices)
        assert math.isclose(
            math.fsum(row["average_price"] * row["tick_count"] for row in found), math.fsum(prices), rel_tol=1e-9
        )
    assert all(row["tick_count"] > 0 for row in rows.values())


def assert_ends_well(application: Application) -> None:
    """Check that a silent feed is still detected, and the stop is in time."""
    seconds_until(lambda: "stale" in application.get("/health")["exchanges"].values(), timeout=STALE_SECONDS + 3)
    code, seconds = application.stop(signal.SIGTERM)
    assert code == 0
    assert seconds < 5
    assert "Traceback" not in application.log


def test_local_clock_step_keeps_each_tick_in_one_row(
    application: Application,
    exchanges: list[ScriptedExchange],
    rows: Callable[[], Rows],
    redis_proxy: Proxy,
    step: Step,
) -> None:
    with Traffic(exchanges, coming_and_going=True) as traffic:
        wait_until(rows)
        before = 0
        dropped = 0.0
        for seconds in STEPS:
            previous, before = before, traffic.count
            earlier, dropped = dropped, rejected(application)
            old = now_ms() + step.seconds * 1000
            step.seconds = seconds
            set_at = time.monotonic()
            assert_goes_on(application, exchanges, redis_proxy, step, partial(sent_since, traffic, before))
            wait_until(partial(tells_offsets, application, exchanges, -seconds * 1000), timeout=4)
            # A few may have been on their way when the clock was set.
            all_written = partial(are_written, rows, old, 0.95 * (before - previous) - (dropped - earlier))
            wait_until(all_written, timeout=set_at + 5 - time.monotonic(), message="rows are not written in time")
    wait_until(lambda: "stale" in application.get("/health")["exchanges"].values(), timeout=STALE_SECONDS + 3)
    dropped = rejected(application)
    assert_ends_well(application)
    # Until a clock counts as wrong its ticks count as old trades, or as those of a time that has not come.
    assert 0 < dropped < len(traffic.sent)
    assert sum(row["tick_count"] for row in rows().values()) + dropped == len(traffic.sent)


def test_clock_step_on_both_sides_keeps_rows_exact(
    application: Application,
    exchanges: list[ScriptedExchange],
    rows: Callable[[], Rows],
    redis_proxy: Proxy,
    step: Step,
) -> None:
    def clock() -> int:
        return now_ms() + step.seconds * 1000

    sent: Sent = []
    for seconds in (0, *STEPS):
        before = len(sent)
        step.seconds = seconds
        with Traffic(exchanges, coming_and_going=True, clock=clock) as traffic:
            assert_goes_on(application, exchanges, redis_proxy, step, partial(sent_since, traffic, before))
        sent = traffic.sent
        # What is still on its way when the clock is set would be too far off to be believed.
        wait_until(lambda: all(is_shown(application, exchange) for exchange in exchanges))
    assert_ends_well(application)
    assert_rows_equal(rows(), sent, WINDOW_MS)


def is_shown(application: Application, exchange: ScriptedExchange) -> bool:
    series, tick = exchange.sent[-1]
    price: float = application.get(f"/prices/latest/{exchange.name}/{series.symbol}")["price"]
    return price == tick.price
