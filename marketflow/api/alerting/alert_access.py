"""What the routes of alerts need: changes of rules by the process that ingests, and reads of the archive."""

from collections.abc import Awaitable, Callable
from functools import cached_property

import msgspec

from marketflow.api.alerting.event_feed import EventFeed
from marketflow.cluster.messages import RuleChange, RuleChanged
from marketflow.stores.ports import AlertReader


class AlertAccess(msgspec.Struct, dict=True, frozen=True, eq=False):
    """Alerts as the API sees them.

    Args:
        change: changes a rule in the process that ingests; raises Unavailable if it does not answer.
        reader: reads rules and events.
        newest_event: returns the number of the newest event as far as the process that ingests is known to have stored
            one, without blocking; 0 if it is not.
    """

    change: Callable[[RuleChange], Awaitable[RuleChanged]]
    reader: AlertReader
    newest_event: Callable[[], int] = lambda: 0

    @cached_property
    def events(self) -> EventFeed:
        """The events, as they are stored."""
        return EventFeed(self.reader, self.newest_event)
