import threading

import pytest

from marketflow.cli.check.check_result import (
    Check,
    CheckResult,
    CheckState,
    bytes_text,
    seconds_text,
    worst_state,
)
from marketflow.cli.check.runner import run_concurrently
from marketflow.text import host_port


def result(what: str) -> CheckResult:
    return CheckResult(what, "here", CheckState.OK, "fine")


def test_checks_run_concurrently_and_keep_their_order() -> None:
    met = threading.Barrier(2)

    def look(what: str) -> list[CheckResult]:
        met.wait(10)  # breaks unless both run at once
        return [result(what), result(f"{what} again")]

    checks = [Check(what, "here", lambda what=what: look(what)) for what in ("a", "b")]  # type: ignore[misc]
    assert [found.what for found in run_concurrently(checks, 10.0)] == ["a", "a again", "b", "b again"]


def test_hanging_check_fails_without_delaying_others() -> None:
    for_ever = threading.Event()

    def hang() -> list[CheckResult]:
        for_ever.wait()
        return []

    hanging, fine = run_concurrently([Check("a", "there", hang), Check("b", "here", lambda: [result("b")])], 0.2)
    for_ever.set()
    assert (hanging.what, hanging.where, hanging.state) == ("a", "there", CheckState.FAILED)
    assert hanging.found == "no answer within 0.2 s"
    assert fine == result("b")


def test_bug_in_one_check_is_reported_alone() -> None:
    def broken() -> list[CheckResult]:
        raise ZeroDivisionError("oh")

    found = run_concurrently([Check("a", "there", broken), Check("b", "here", lambda: [result("b")])], 10.0)
    assert [each.state for each in found] == [CheckState.FAILED, CheckState.OK]
    assert "ZeroDivisionError: oh" in found[0].found


def test_worst_state_of_several_is_chosen() -> None:
    assert worst_state([]) is CheckState.OK
    assert worst_state([CheckState.HINT, CheckState.OK]) is CheckState.HINT
    assert worst_state([CheckState.WARNING, CheckState.FAILED, CheckState.HINT]) is CheckState.FAILED


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "under 1 ms"),
        (0.0032, "3 ms"),
        (1, "1 s"),
        (2.5, "2.5 s"),
        (90, "90 s"),
        (600, "10 min"),
        (9e4, "25 h"),
        (1e6, "12 days"),
    ],
)
def test_duration_is_shown_in_its_unit(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


@pytest.mark.parametrize(("host", "text"), [("a.example", "a.example:1"), ("::1", "[::1]:1")])
def test_ipv6_address_is_shown_in_brackets(host: str, text: str) -> None:
    assert host_port(host, 1) == text


@pytest.mark.parametrize(("number", "text"), [(0, "0 bytes"), (1500, "1.5 kB"), (812e6, "812 MB"), (999.6e9, "1 TB")])
def test_bytes_are_shown_in_their_unit(number: float, text: str) -> None:
    assert bytes_text(number) == text
