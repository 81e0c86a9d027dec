"""Compare this tree with another revision of git: each benchmark runs old, new, old, new... in one run.

The revision is checked out into a temporary worktree. Only MarketFlow runs from there; servers, load and measurement
are those of this tree, and so are the interpreter and its packages. Pairs that run one after the other share the
state of the machine, so their ratios hold on a busy machine, where times do not.

    python -m tests.benchmarks compare v0.1.0
    python -m tests.benchmarks compare HEAD~20 start single_tick --rounds 3
    python -m tests.benchmarks compare HEAD~20 breadth      takes minutes a round, and runs only when named
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple, TypedDict

from marketflow.settings import Settings
from tests.benchmarks import breadth, ingest, promptness, queries, single_tick, start_stop, stream
from tests.benchmarks.live import SETUPS
from tests.benchmarks.report import report
from tests.benchmarks.stage import stage
from tests.support.application import ROOT

WORSE_THAN_LEDGER = 1.15
LEDGER_ENTRIES = 50
ROUNDS = 5

HIGHER_IS_BETTER = ("ticks_per_core_second", "of_decode_limit", "of_limit", "of_calm", "of_limit_of_calm")
"""The last part of the names of measurements that should be high; all others should be low."""

Measurements = Mapping[str, float]


class Entry(TypedDict):
    """A line of the ledger: both revisions, and the ratios new/old by measurement."""

    old: str
    new: str
    ratios: Mapping[str, float]


class SideError(Exception):
    """A benchmark failed with one of the two revisions."""


class Compared(NamedTuple):
    """A figure of both revisions: medians, the median of the pairs' ratios new/old, and the range of these."""

    figure: str
    old: float
    new: float
    ratio: float
    least: float
    most: float


def _ingest(checkout: Path) -> Measurements:
    counters = ingest.run(0, 6, Settings().symbols, 0, checkout)
    assert ingest.exact(counters), f"the rows are not what was sent: {counters}"
    return {name: counters[name] for name in ("ticks_per_core_second", "of_decode_limit")}


def _single_tick(checkout: Path) -> Measurements:
    counters = single_tick.measure(8, checkout)
    return {
        name: counters[name]
        for name in ("cpu_us", "redis_cpu_us", "redis_commands", "context_switches", "idle_core_percent")
    }


def _promptness(checkout: Path) -> Measurements:
    measured = [
        promptness.measure(case, setup, samples=300, seconds=8, checkout=checkout)
        for setup in SETUPS
        for case in ("100", "1000")
    ]
    return {f"{row['setup']}.{row['case']}.{at}": row[at] for row in measured for at in ("p50_ms", "p99_ms")}


def _queries(checkout: Path) -> Measurements:
    counters: dict[str, float] = {}
    for setup in SETUPS:
        with stage(checkout) as servers, ExitStack() as stack:
            scene = queries.Scene(servers, stack, setup, workers=1, seconds=2, with_past=False)
            calm, flood = queries.measure(scene, setup, "latest", rounds=2)
        assert not calm["failed"] + flood["failed"], f"requests failed: {calm}, {flood}"
        counters[f"{setup}.of_limit"] = calm["of_limit"]
        counters |= {f"{setup}.flood.{name}": flood[name] for name in ("of_calm", "of_limit_of_calm")}
    return counters


def _start(checkout: Path) -> Measurements:
    times = start_stop.Times()
    with tempfile.TemporaryDirectory(prefix="marketflow-") as folder:
        Path(folder).chmod(0o711)
        start_stop.embedded(times, Path(folder) / "embedded", checkout)
    assert not any(times.failed.values()), f"it did not stop cleanly: {dict(times.failed)}"
    return {"import_cpu_s": _import_cpu_seconds(checkout)} | {
        f"{start}_s": statistics.median(times.seconds[f"first price, embedded servers, {start}"])
        for start in ("cold", "warm")
    }


def _import_cpu_seconds(checkout: Path) -> float:
    """CPU of importing what the default command needs for the first price: other load of the machine hardly counts."""
    program = f"{start_stop.IMPORTS}; import os, time; print(time.process_time()); os._exit(0)"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(checkout), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", program]
    seconds = [float(subprocess.check_output(command, cwd=checkout, env=environment)) for _ in range(5)]
    return statistics.median(seconds)


def _stream(checkout: Path) -> Measurements:
    row = stream.measure("both", clients=1000, rate=100, seconds=8, checkout=checkout)
    return {name: row[name] for name in ("p50_ms", "p99_ms", "kb_a_client")} | {"cores": row["cores"]["marketflow"]}


def _breadth(checkout: Path) -> Measurements:
    row = breadth.run("15000", breadth.CASES["15000"], False, checkout)
    assert row["sent"] == row["in_rows"], f"the rows are not what was sent: {row}"
    return {name: row[name] for name in ("us_a_tick", "commands_s", "redis_mb", "rss_mb_max", "rows_after_s")}


BENCHMARKS: Mapping[str, Callable[[Path], Measurements]] = {
    "ingest": _ingest,
    "single_tick": _single_tick,
    "promptness": _promptness,
    "queries": _queries,
    "start": _start,
    "stream": _stream,
    "breadth": _breadth,
}

ONLY_WHEN_NAMED = ("breadth",)
"""Benchmarks that take minutes a round."""


def compare(old: Sequence[Measurements], new: Sequence[Measurements]) -> list[Compared]:
    """Compare the measurements of pairs of runs, in the order of the first.

    Raises:
        ValueError: a figure is missing on one side, or is not positive, so that there is no ratio.
    """
    compared = []
    names = list(old[0])
    for counters in (*old, *new):
        if counters.keys() != set(names):
            raise ValueError(f"figures differ: {sorted(names)} and {sorted(counters)}")
    for name in names:
        before, after = [counters[name] for counters in old], [counters[name] for counters in new]
        if min(*before, *after) <= 0:
            raise ValueError(f"{name} is not positive: old {before}, new {after}")
        ratios = [two / one for one, two in zip(before, after, strict=True)]
        medians = statistics.median(before), statistics.median(after), statistics.median(ratios)
        compared.append(Compared(name, *medians, min(ratios), max(ratios)))
    return compared


def alternate(name: str, checkouts: Mapping[str, Path], rounds: int) -> list[Compared]:
    """Run a benchmark with both revisions by turns.

    Raises:
        SideError: it failed with one of them; the message has the log of MarketFlow.
    """
    measured: dict[str, list[Measurements]] = {side: [] for side in checkouts}
    for _ in range(rounds):
        for side, checkout in checkouts.items():
            began = time.monotonic()
            try:
                counters = BENCHMARKS[name](checkout)
            except Exception as error:
                notes = "\n".join(getattr(error, "__notes__", ()))
                raise SideError(f"{name} failed with the {side} revision: {error!r}\n{notes}") from error
            measured[side].append({f"{name}.{figure}": value for figure, value in counters.items()})
            print(f"{name} {side}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return compare(*measured.values())


@contextmanager
def worktree(reference: str) -> Iterator[Path]:
    """Check a revision out into a temporary worktree, which is removed after the block.

    Raises:
        LookupError: there is no such revision.
    """
    revision = revision_of(reference)
    with tempfile.TemporaryDirectory(prefix="marketflow-compare-") as folder:
        Path(folder).chmod(0o711)
        checkout = Path(folder) / "old"
        _git("worktree", "add", "--quiet", "--detach", str(checkout), revision)
        try:
            yield checkout
        finally:
            _git("worktree", "remove", "--force", str(checkout))


def revision_of(reference: str) -> str:
    """Return the short hash of a revision.

    Raises:
        LookupError: there is no such revision.
    """
    try:
        return _git("rev-parse", "--short", "--verify", "--quiet", "--end-of-options", f"{reference}^{{commit}}")
    except subprocess.CalledProcessError:
        raise LookupError(f"no such revision: {reference}") from None


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def _prepare(checkout: Path) -> None:
    """Compile a tree ahead of its first start, and make sure that it is what Python imports there."""
    program = "import compileall, marketflow; compileall.compile_dir('marketflow', quiet=1); print(marketflow.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=checkout,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(checkout)},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    if not Path(done.stdout.strip()).is_relative_to(checkout.resolve()):
        raise RuntimeError(f"Python imports {done.stdout.strip()} in {checkout}")


def warnings(ledger: Sequence[Entry], old: str, compared: Sequence[Compared]) -> list[str]:
    """Return a line for each measurement over 15 % worse than the median of its ratios to the same old revision."""
    found = []
    for each in compared:
        ratios = [entry["ratios"] for entry in ledger if entry["old"] == old]
        past = [ratio[each.figure] for ratio in ratios if each.figure in ratio]
        if not past:
            continue
        usual = statistics.median(past)
        higher = each.figure.rpartition(".")[2] in HIGHER_IS_BETTER
        worse = usual / each.ratio if higher else each.ratio / usual
        if worse > WORSE_THAN_LEDGER:
            found.append(f"{each.figure}: ratio {each.ratio:.3f}, {worse - 1:.0%} worse than the ledger's {usual:.3f}")
    return found


def record(ledger: Path, old: str, compared: Sequence[Compared]) -> list[str]:
    """Append the ratios to the ledger, which keeps the newest; return the warnings against what it had before."""
    entries: list[Entry] = json.loads(ledger.read_text()) if ledger.exists() else []
    base = revision_of(old)
    found = warnings(entries, base, compared)
    ratios = {each.figure: round(each.ratio, 4) for each in compared}
    entries = [*entries, Entry(old=base, new=revision_of("HEAD"), ratios=ratios)][-LEDGER_ENTRIES:]
    ledger.write_text("[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]\n")  # one line each, for diffs
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and report; 1 when a side failed, 2 when the arguments are wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("revision", metavar="REF", help="the old revision: a commit, tag or branch")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"which: {', '.join(BENCHMARKS)}; all but breadth by default"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="pairs of runs; %(default)s")
    parser.add_argument("--ledger", type=Path, help="append the ratios here, and warn where they are much worse")
    arguments = parser.parse_args(argv)
    if unknown := [name for name in arguments.names if name not in BENCHMARKS]:
        parser.error(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds}: at least 1")
    try:
        revision_of(arguments.revision)
    except LookupError as error:
        parser.error(str(error))
    compared: list[Compared] = []
    try:
        with worktree(arguments.revision) as checkout:
            checkouts = {"old": checkout, "new": ROOT}
            for tree in checkouts.values():
                _prepare(tree)
            for name in arguments.names or [each for each in BENCHMARKS if each not in ONLY_WHEN_NAMED]:
                compared += alternate(name, checkouts, arguments.rounds)
    except SideError as error:
        print(error, file=sys.stderr)
        return 1
    found = record(arguments.ledger, arguments.revision, compared) if arguments.ledger else []
    for warning in found:
        print(f"WARNING {warning}", file=sys.stderr, flush=True)
    report("compare", [each._asdict() for each in compared])
    return 0


if __name__ == "__main__":
    sys.exit(main())
