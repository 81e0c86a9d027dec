"""All benchmarks, one after the other; each is a program of its own as well, which says more with --help.

python -m tests.benchmarks                       all of them
python -m tests.benchmarks --quick queries       one of them, for a look
python -m tests.benchmarks compare REF           this tree against another revision, by turns
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence

from tests.benchmarks import compare

BENCHMARKS = (
    "ingest",
    "single_tick",
    "promptness",
    "queries",
    "breadth",
    "cluster",
    "failover",
    "history",
    "stream",
    "start_stop",
    "venues",
    "venue_promptness",
    "alerts",
    "shared_alerts",
    "page",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run them, each in a process of its own; 1 when one of them failed, after the others had their turn."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["compare"]:
        return compare.main(argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(BENCHMARKS)}; all by default")
    parser.add_argument("--quick", action="store_true", help="short runs, whose counters say little")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.names) - set(BENCHMARKS):
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    failed = []
    for name in arguments.names or BENCHMARKS:
        print(f"== {name}", flush=True)
        began = time.monotonic()
        command = [sys.executable, "-m", f"tests.benchmarks.{name}", *(["--quick"] if arguments.quick else [])]
        code = subprocess.run(command, check=False).returncode
        print(f"== {name}: exit code {code} after {time.monotonic() - began:.0f} s\n", flush=True)
        if code:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
