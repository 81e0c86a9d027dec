"""An event of an alert as it is answered and streamed."""

import msgspec

from marketflow.alerts.alert_model import AlertEvent
from marketflow.stores.ports import NumberedEvent


class EventAnswer(msgspec.Struct, frozen=True):
    """An event and its number, which is its id in the stream."""

    number: int
    event: AlertEvent


def event_answer(stored: NumberedEvent) -> EventAnswer:
    """Return a stored event as it is answered."""
    return EventAnswer(stored.number, msgspec.json.decode(stored.event, type=AlertEvent))
