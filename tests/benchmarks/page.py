"""What the page costs the browser that shows it: CPU, layouts a second, and the heap of its scripts.

A real Chromium without a window shows the page of an application that generates 100 ticks a second and exchange, in a
tab that is left alone. The heap is what is reachable: garbage is collected before it is read, once a minute. The limit
is a tab in the same browser that shows nothing.

    python -m tests.benchmarks.page --minutes 30
    python -m tests.benchmarks.page --symbols 107        # 321 series
"""

import argparse
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Sequence

import psutil
from playwright.sync_api import CDPSession, Page, sync_playwright

from tests.benchmarks.report import report
from tests.benchmarks.stage import stage
from tests.support.servers import HOST

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
SETTLE_SECONDS = 10.0
"""What happens once, when the page is opened, is not measured."""


def cpu_by_kind(browser: psutil.Process) -> dict[str, float]:
    """Seconds of CPU time of the browser's processes: `browser`, `renderer`, `gpu-process` and so on."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for process in (browser, *browser.children(recursive=True)):
        kind = next((part[7:] for part in process.cmdline() if part.startswith("--type=")), "browser")
        times = process.cpu_times()
        seconds[kind] += times.user + times.system
    return seconds


def metric(session: CDPSession, name: str) -> float:
    """One of Chromium's counters of the page."""
    found = session.send("Performance.getMetrics")["metrics"]
    return float(next(each["value"] for each in found if each["name"] == name))


def heap(session: CDPSession) -> float:
    """What scripts of the page can reach, in MB."""
    session.send("HeapProfiler.collectGarbage")
    return float(session.send("Runtime.getHeapUsage")["usedSize"]) / 1e6


def measure(page: Page, browser: psutil.Process, minutes: float) -> dict[str, object]:
    """CPU, layouts and heap of a tab that is left alone."""
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable")
    page.wait_for_timeout(SETTLE_SECONDS * 1000)
    heaps = [heap(session)]
    cpu, layouts = cpu_by_kind(browser), metric(session, "LayoutCount")
    began = time.monotonic()
    while time.monotonic() - began < minutes * 60:
        page.wait_for_timeout(min(60.0, minutes * 60) * 1000)
        heaps.append(heap(session))
    seconds = time.monotonic() - began
    used = {kind: after - cpu.get(kind, 0.0) for kind, after in cpu_by_kind(browser).items()}
    return {
        "minutes": seconds / 60,
        "core_percent": 100 * sum(used.values()) / seconds,
        "by_kind": {kind: 100 * each / seconds for kind, each in used.items() if each / seconds > 0.001},
        "layouts_per_s": (metric(session, "LayoutCount") - layouts) / seconds,
        "heap_mb_first": heaps[0],
        "heap_mb_after_a_third": heaps[len(heaps) // 3],
        "heap_mb_last": heaps[-1],
        "heap_mb_most": max(heaps),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0, help="how long the page is watched; %(default)s")
    parser.add_argument("--symbols", type=int, default=5, help="on each of three exchanges; %(default)s")
    parser.add_argument("--quick", action="store_true", help="a quarter of a minute, for a look")
    arguments = parser.parse_args(argv)
    minutes = 0.25 if arguments.quick else arguments.minutes
    chromium = shutil.which("chromium")
    if chromium is None:
        print("there is no chromium (Debian's package of this name)", file=sys.stderr)
        return 1
    symbols = ",".join(f"S{number:03}USDT" for number in range(arguments.symbols))
    with stage() as servers:
        application = servers.start({"MODE": "test", "SYMBOLS": symbols})
        table = [
            {"page": name} | watched(chromium, url, minutes if name == "prices" else min(minutes, 1.0))
            for name, url in (("prices", f"http://{HOST}:{application.port}/"), ("blank", "about:blank"))
        ]
    report("page", table)
    return 0


def watched(chromium: str, url: str, minutes: float) -> dict[str, object]:
    """Open a page in a browser of its own and measure it."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.goto(url)
        (process,) = (each for each in psutil.Process().children(recursive=True) if is_browser(each))
        measured = measure(page, process, minutes)
        browser.close()
        return measured


def is_browser(process: psutil.Process) -> bool:
    """Whether it is Chromium's first process, the parent of all others."""
    return "chrom" in process.name() and not any(part.startswith("--type=") for part in process.cmdline())


if __name__ == "__main__":
    sys.exit(main())
