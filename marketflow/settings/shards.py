"""Shards: what an ingest process owns. A shard is an exchange, or part k of n of one by its symbols.

A series belongs to one shard, whatever its mode. What belongs to no exchange of the settings is the lead's.
"""

from collections.abc import Collection, Iterable, Mapping
from zlib import crc32

from marketflow.model import Series

LEAD = "*lead"
"""A pseudo-shard: the tasks that one process does for all, and series whose exchange is no longer configured."""


def exchange_of(shard: str) -> str:
    """The exchange that a shard is of; names of exchanges have no slash."""
    return shard.partition("/")[0]


class ShardMap:
    """The shards of the configured exchanges, and the shard of each series.

    Args:
        parts: number of shards by exchange.
    """

    def __init__(self, parts: Mapping[str, int]) -> None:
        self._parts = dict(parts)
        self._of: dict[Series, str] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """All shards of exchanges, such as `exchange1`, or `exchange1/2of4`."""
        return tuple(name for exchange in self._parts for name in self.of_exchange(exchange))

    def of_exchange(self, exchange: str) -> tuple[str, ...]:
        """The shards of an exchange."""
        count = self._parts.get(exchange, 0)
        return (exchange,) if count == 1 else tuple(f"{exchange}/{part}of{count}" for part in range(1, count + 1))

    def of(self, series: Series) -> str:
        """The shard of a series."""
        if (known := self._of.get(series)) is None:
            shards = self.of_exchange(series.exchange)
            known = self._of[series] = shards[crc32(series.symbol.encode()) % len(shards)] if shards else LEAD
        return known

    def symbols(self, exchange: str, shards: Collection[str], symbols: Iterable[str]) -> list[str]:
        """Those of the symbols of an exchange that are in some shards."""
        of_exchange = self.of_exchange(exchange)
        return [each for each in symbols if of_exchange[crc32(each.encode()) % len(of_exchange)] in shards]

    def joined(self, other: "ShardMap") -> "ShardMap":
        """Return these shards and those of the exchanges that only `other` has."""
        return ShardMap(other._parts | self._parts)
