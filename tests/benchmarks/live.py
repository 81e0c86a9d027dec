"""MarketFlow in live mode, with three exchanges that send from other processes, and marked ticks from this one."""

from collections.abc import Mapping
from contextlib import ExitStack

from marketflow.settings import Settings
from tests.benchmarks.feeder import Feeder
from tests.benchmarks.marks import Marks
from tests.benchmarks.stage import Stage
from tests.support.application import Application, ScriptedExchange, exchanges_setting
from tests.support.servers import wait_until

EXCHANGES = ("exchange1", "exchange2", "exchange3")
SYMBOLS = Settings().symbols
SETUPS = ("both", "separate")
"""One process, or feeds and API in processes of their own."""

LATEST = f"/prices/latest/{EXCHANGES[0]}/{SYMBOLS[0]}"
"""The latest price of the series whose ticks are marked."""


class Live:
    """A MarketFlow that takes ticks of all series. `processes` are those that share the machine, by name.

    Args:
        stage: its servers.
        stack: ends it all.
        setup: one of SETUPS.
        rate: ticks a second and exchange.
        workers: API processes where they are apart.
    """

    def __init__(self, stage: Stage, stack: ExitStack, setup: str, rate: float, workers: int = 1) -> None:
        exchanges = [stack.enter_context(ScriptedExchange(name)) for name in EXCHANGES]
        settings = {"MODE": "live", "EXCHANGES": exchanges_setting(*exchanges)}
        self.processes, self.application = _start(setup, stage, settings, workers)
        connections = [exchange.client() for exchange in exchanges]
        self._steady = stack.enter_context(Feeder(connections[:2], SYMBOLS, rate))
        self.flooder = stack.enter_context(Feeder(connections[2:], SYMBOLS, rate))
        """The feeder of the last exchange, which can flood."""
        assert stage.redis.process is not None
        assert stage.postgres.process is not None
        self.processes |= {
            "redis": stage.redis.process.pid,
            "postgres": stage.postgres.process.pid,
            "feeder": self._steady.pid,
            "flooder": self.flooder.pid,
        }
        wait_until(lambda: self.application.find(LATEST), timeout=30, message="no tick came")
        self.marks = stack.enter_context(Marks(connections[0], LATEST, SYMBOLS[0], self.application.port))

    @property
    def sent(self) -> int:
        """Ticks sent so far, without the marked ones."""
        return self._steady.sent + self.flooder.sent

    def pause(self) -> None:
        """Send no ticks from now on."""
        for feeder in (self._steady, self.flooder):
            feeder.pause()

    def resume(self) -> None:
        """Send at the rate again."""
        for feeder in (self._steady, self.flooder):
            feeder.ease()

    def settle(self) -> None:
        """Wait until what was sent has been taken."""
        wait_until(lambda: self.marks.sample() < 50, timeout=30, message="MarketFlow does not catch up")


def _start(
    setup: str, stage: Stage, settings: Mapping[str, object], workers: int
) -> tuple[dict[str, int], Application]:
    """Start MarketFlow; gives its processes and the application that answers."""
    if setup == "both":
        application = stage.start(settings)
        return {"marketflow": application.process.pid}, application
    feeds = stage.start(settings, "--role", "feeds", wait=False)  # the name that older revisions know, too
    api = stage.start(settings, "--role", "api", "--workers", str(workers))
    return {"feeds": feeds.process.pid, "api": api.process.pid}, api
