"""The states of all owners of shards, as the leader reads them: from the shard table and the published states."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

from marketflow.cluster.merging import merged_exchanges, owners_of
from marketflow.cluster.messages import AlertMark, Published, decode, encode
from marketflow.cluster.shard_table import KEPT_SECONDS, Table, connect, decode_cluster, redis_errors
from marketflow.errors import Unavailable
from marketflow.model import FeedState, Mode
from marketflow.settings.shards import LEAD
from marketflow.stores.redis import keys


class OwnerStates:
    """Reads the states of the owners, and keeps the mark of the alerts; one call at a time.

    Args:
        keywords: of a Redis client.
        own: returns mode and states of the feeds of this process, which count while Redis cannot be used.
    """

    def __init__(self, keywords: Mapping[str, Any], own: Callable[[], tuple[Mode, Mapping[str, FeedState]]]) -> None:
        self._client = connect(keywords)
        self._own = own
        self._states: dict[str, FeedState] = {}
        self._numbers: dict[str, int] = {}

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def feed_states(self, mode: Mode, exchanges: Iterable[str]) -> dict[str, FeedState]:
        """Return the states of the feeds of exchanges by their owners' reports; connecting where there is no owner."""
        try:
            owners = owners_of(*self._read())
        except Unavailable:
            return self._states | dict(self._own()[1])
        found = merged_exchanges(
            {exchange: [each.state for each in of if each.state.mode is mode] for exchange, of in owners.items()}
        )
        self._states = {exchange: found.get(exchange, FeedState.CONNECTING) for exchange in exchanges}
        return self._states

    def have_written(self) -> bool:
        """Return whether each owner has reported twice since `reset_reports` that Redis has all it wrote.

        Raises:
            Unavailable: Redis cannot be reached.
        """
        table, known = self._read()
        owners = {row.owner for shard, row in table.rows.items() if shard != LEAD}
        found = {run: each.number for run, each in known.items() if run in owners and each.state.cache_complete}
        first, self._numbers = self._numbers, found | self._numbers
        # Without an owner nothing is known: a Redis that was emptied has no table before the next call.
        return (
            bool(owners)
            and owners == found.keys()
            and all(number > first.get(run, number) for run, number in found.items())
        )

    def reset_reports(self) -> None:
        """Discard the reports that `have_written` has counted."""
        self._numbers = {}

    def mark(self) -> AlertMark | None:
        """Return the mark of the previous leader; None if there is none.

        Raises:
            Unavailable: Redis cannot be reached.
        """
        with redis_errors():
            return decode(cast("bytes | None", self._client.get(keys.ALERTS_KEY)), AlertMark)

    def put_mark(self, mark: AlertMark) -> None:
        """Store the mark.

        Raises:
            Unavailable: Redis cannot be reached.
        """
        with redis_errors():
            self._client.set(keys.ALERTS_KEY, encode(mark), px=round(KEPT_SECONDS * 1000))

    def _read(self) -> tuple[Table, dict[str, Published]]:
        with redis_errors(), self._client.pipeline(transaction=False) as pipe:
            pipe.get(keys.SHARDS_KEY)
            pipe.hgetall(keys.STATES_KEY)
            return decode_cluster(*pipe.execute())
