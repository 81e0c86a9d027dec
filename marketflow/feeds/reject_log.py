"""Logs once a minute how many lines of each exchange were rejected and how many ticks dated by receipt."""

from collections.abc import Mapping

from loguru import logger

from marketflow.counters import ExchangeCounters

RATES_SECONDS = 60.0


class FeedRates:
    """Logs the increase of the counters of each exchange since the previous call. Not thread-safe."""

    def __init__(self) -> None:
        self._before: dict[str, ExchangeCounters] = {}

    def log(self, exchanges: Mapping[str, ExchangeCounters], seconds: float) -> None:
        """Log a line for each exchange with rejected lines, or ticks dated by receipt, in the last `seconds`."""
        for name, now in exchanges.items():
            before = self._before.get(name, _NOTHING)
            self._before[name] = now
            dropped = {
                reason: count - before.rejected.get(reason, 0)
                for reason, count in now.rejected.items()
                if count > before.rejected.get(reason, 0)
            }
            replaced = now.timestamps_replaced - before.timestamps_replaced
            if not dropped and not replaced:
                continue
            reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
            logger.bind(exchange=name).warning(
                "in the last {:.0f} s {} lines were dropped{}, {} of {} ticks dated by receipt",
                seconds,
                sum(dropped.values()),
                f" ({reasons})" if reasons else "",
                replaced,
                now.ticks - before.ticks,
            )


_NOTHING = ExchangeCounters(ticks=0, rejected={}, timestamps_replaced=0, reconnects=0, last_tick_at=None)
