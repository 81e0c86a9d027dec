"""Ratios, ledger and arguments of `python -m tests.benchmarks compare`, and how it reports a failing side."""

import json
import re
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.benchmarks import __main__ as benchmarks
from tests.benchmarks import bare, compare
from tests.benchmarks.compare import Compared, Entry, Measurements, SideError
from tests.benchmarks.feeder import line
from tests.benchmarks.rawhttp import Client, request_of
from tests.benchmarks.stage import logs_on_error
from tests.support.application import ROOT, Application
from tests.support.servers import HOST


def compared(figure: str, ratio: float) -> Compared:
    return Compared(figure, 1.0, ratio, ratio, ratio, ratio)


def ledger(figure: str, *ratios: float, old: str = "base") -> list[Entry]:
    return [{"old": old, "new": "head", "ratios": {figure: ratio}} for ratio in ratios]


def test_ratio_is_median_of_pairs_not_of_times() -> None:
    """The machine was slow in the second pair: the pair's ratio is not."""
    old = [{"start.cold_s": 1.0}, {"start.cold_s": 10.0}, {"start.cold_s": 2.0}]
    new = [{"start.cold_s": 1.5}, {"start.cold_s": 11.0}, {"start.cold_s": 2.0}]
    assert compare.compare(old, new) == [Compared("start.cold_s", 2.0, 2.0, 1.1, 1.0, 1.5)]


def test_figures_keep_their_order_and_one_round_has_no_spread() -> None:
    found = compare.compare([{"b": 2.0, "a": 4.0}], [{"a": 1.0, "b": 4.0}])
    assert [(each.figure, each.ratio, each.least, each.most) for each in found] == [
        ("b", 2.0, 2.0, 2.0),
        ("a", 0.25, 0.25, 0.25),
    ]


@pytest.mark.parametrize(("old", "new"), [({"a": 1.0}, {"b": 1.0}), ({"a": 0.0}, {"a": 1.0}), ({"a": 1.0}, {"a": 0.0})])
def test_missing_or_zero_figure_is_refused(old: Measurements, new: Measurements) -> None:
    with pytest.raises(ValueError, match=r"figures differ|not positive"):
        compare.compare([old], [new])


@pytest.mark.parametrize(
    ("figure", "ratio", "warned"),
    [
        ("start.cold_s", 1.14, False),
        ("start.cold_s", 1.16, True),
        ("start.cold_s", 0.5, False),
        ("ingest.ticks_per_core_second", 0.88, False),
        ("ingest.ticks_per_core_second", 0.86, True),
        ("queries.both.of_limit", 2.0, False),
        ("queries.both.flood.of_calm", 2.0, False),
        ("queries.both.flood.of_calm", 0.8, True),
        ("queries.both.flood.of_limit_of_calm", 2.0, False),
    ],
)
def test_warning_over_15_percent_worse_than_ledger(figure: str, ratio: float, warned: bool) -> None:
    found = compare.warnings(ledger(figure, 1.0, 1.0, 9.0), "base", [compared(figure, ratio)])
    assert bool(found) == warned
    assert all(figure in line for line in found)


def test_figure_new_to_ledger_gives_no_warning() -> None:
    assert compare.warnings(ledger("a", 1.0), "base", [compared("b", 9.0)]) == []


def test_ledger_entries_of_other_base_are_ignored() -> None:
    """Twice as slow as one revision may be as fast as another."""
    entries = [*ledger("a", 2.0, 2.0, 2.0, old="other"), *ledger("a", 1.0)]
    (warning,) = compare.warnings(entries, "base", [compared("a", 1.5)])
    assert "50% worse than the ledger's 1.000" in warning
    assert compare.warnings(entries[:3], "base", [compared("a", 9.0)]) == []


def test_ledger_keeps_newest_ratios_and_no_times(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    assert compare.record(path, "HEAD", [compared("a", 1.0)]) == []
    for _ in range(compare.LEDGER_ENTRIES):
        warnings = compare.record(path, "HEAD", [compared("a", 2.0)])
    entries = json.loads(path.read_text())
    assert len(entries) == compare.LEDGER_ENTRIES
    assert all(entry.keys() == {"old", "new", "ratios"} and entry["ratios"] == {"a": 2.0} for entry in entries)
    assert warnings == []


def test_committed_ledger_names_existing_benchmarks() -> None:
    entries = json.loads((Path(compare.__file__).parent / "ledger.json").read_text())
    assert {name.partition(".")[0] for entry in entries for name in entry["ratios"]} <= compare.BENCHMARKS.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "REF"),
        (["no-such-revision"], "no such revision: no-such-revision"),
        (["HEAD", "ingets"], "no such benchmark: ingets"),
        (["HEAD", "--rounds", "0"], "--rounds 0: at least 1"),
    ],
)
def test_wrong_argument_is_reported_before_any_run(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        benchmarks.main(["compare", *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_sides_alternate_old_first(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def measure(checkout: Path) -> Measurements:
        ran.append(checkout.name)
        return {"figure": float(len(ran))}

    monkeypatch.setitem(compare.BENCHMARKS, "counted", measure)
    (found,) = compare.alternate("counted", {"old": Path("o"), "new": Path("n")}, rounds=2)
    assert ran == ["o", "n", "o", "n"]
    assert found == Compared("counted.figure", 2.0, 3.0, (2.0 + 4 / 3) / 2, 4 / 3, 2.0)


def test_failing_side_is_reported_with_its_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def measure(checkout: Path) -> Measurements:
        application = Application(tmp_path, program=("-c", "raise SystemExit('no such table')"), checkout=checkout)
        with logs_on_error([application]), application:
            raise AssertionError("it became ready")

    monkeypatch.setitem(compare.BENCHMARKS, "failing", measure)
    with pytest.raises(SideError, match=r"(?s)failing failed with the old revision.*ended with 1.*no such table"):
        compare.alternate("failing", {"old": tmp_path, "new": tmp_path}, rounds=1)


def test_application_runs_code_of_given_checkout(tmp_path: Path) -> None:
    package = tmp_path / "marketflow"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text("raise SystemExit(7)")
    assert Application(tmp_path, checkout=tmp_path).fails() == 7


def test_worktree_holds_revision_and_is_removed() -> None:
    with compare.worktree("HEAD") as checkout:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, check=True, capture_output=True, text=True)
        assert head.stdout.strip().startswith(compare.revision_of("HEAD"))
        assert (checkout / "marketflow" / "__main__.py").exists()
    assert not checkout.exists()
    listed = subprocess.run(["git", "worktree", "list"], cwd=ROOT, check=True, capture_output=True, text=True)
    assert str(checkout) not in listed.stdout


def test_benchmark_client_reopens_a_connection_closed_while_idle() -> None:
    """A server closes connections that are idle for longer than its keep-alive timeout."""
    listener = socket.create_server((HOST, 0))
    with listener, Client(listener.getsockname()[1]) as client, ThreadPoolExecutor(1) as pool:
        listener.accept()[0].close()
        served = pool.submit(serve_one, listener)
        assert client.get(request_of("/")) == b"ok"
        served.result()
        listener.close()
        with pytest.raises(ConnectionError):
            client.get(request_of("/"))


def serve_one(listener: socket.socket) -> None:
    listener.settimeout(10)
    connection, _ = listener.accept()
    with connection:
        connection.recv(4096)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")


def test_bare_stream_sends_newest_price_of_each_series() -> None:
    with (
        bare.stream() as server,
        socket.create_connection((HOST, server.port), timeout=10) as client,
        socket.create_connection((HOST, server.port), timeout=10) as exchange,
    ):
        client.sendall(request_of("/stream/prices"))
        received = b""
        while b"event: snapshot" not in received:
            received += client.recv(65536)
        exchange.sendall(b"".join(line("A", price) for price in (1, 2)) + line("B", 3))
        while b'"price":3' not in received:
            received += client.recv(65536)
    _, _, event = received.rpartition(b"event: prices")
    assert re.findall(rb'"symbol":"(.)".*?"price":([0-9]+)', event) == [(b"A", b"2"), (b"B", b"3")]
