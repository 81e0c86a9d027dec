"""Events of the stream: what the server sends and `marketflow watch` decodes."""

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from marketflow.api.alerting.event_answer import EventAnswer
from marketflow.api.openapi.operation import Exchange, Symbol
from marketflow.api.rendering import Time
from marketflow.api.routes.charting.candle_objects import CandleAnswer, Interval
from marketflow.api.routes.latest_price import LatestPrice
from marketflow.health import Health
from marketflow.model import Mode


class StreamPrice(LatestPrice, frozen=True):
    """The newest price of a series, or the reference price of a symbol."""

    exchanges: Annotated[
        Annotated[int, Meta(ge=0)] | UnsetType,
        Meta(
            description="Of `reference` alone: number of exchanges whose price is fresh, and counts. With 0, the price "
            "is the last one that there was."
        ),
    ] = UNSET


class StreamCandle(CandleAnswer, frozen=True):
    """A candle as `/candles` has it, and whose it is."""

    symbol: Symbol
    exchange: Annotated[Exchange | None, Meta(description="`reference`, or null over all exchanges.")]
    interval: Interval


class Snapshot(msgspec.Struct, frozen=True):
    """The whole state of a subscription; replaces all earlier events."""

    mode: Mode
    symbols: Annotated[list[Symbol], Meta(description="Those of the subscription, in configured order.")]
    exchanges: Annotated[list[Exchange], Meta(description="Those of the subscription, in configured order.")]
    prices: Annotated[list[StreamPrice], Meta(description="The newest price of each series that has one.")]
    health: Health
    candles: Annotated[
        list[StreamCandle] | UnsetType,
        Meta(
            description="With candles only: of each series the last closed candle and all since, the running one last."
        ),
    ] = UNSET


class ChangedPrices(msgspec.Struct, frozen=True):
    """The newest price of every series that has changed since the last event."""

    prices: list[StreamPrice]


class ChangedCandles(msgspec.Struct, frozen=True):
    """Every candle that has changed since the last event, in its newest version; the oldest first."""

    candles: list[StreamCandle]


class ChangedMode(msgspec.Struct, frozen=True):
    """The mode was switched; a snapshot of the new mode follows."""

    mode: Mode
    previous: Mode


class Heartbeat(msgspec.Struct, frozen=True):
    """The connection is alive; sent at a fixed interval."""

    timestamp: Annotated[Time, Meta(description="Clock of the server.")]


class End(msgspec.Struct, frozen=True):
    """The server shuts down; no event follows."""

    reason: Literal["shutdown"]


class Subscribed(msgspec.Struct, frozen=True):
    """The subscription was changed to these series; their snapshot follows."""

    symbols: list[Symbol]
    exchanges: list[Exchange]
    series: Annotated[list[tuple[Exchange, Symbol]], Meta(description="Those of which it has prices.")]
    candles: Annotated[
        list[tuple[Exchange | None, Symbol, Interval]] | UnsetType, Meta(description="With candles only: those.")
    ] = UNSET


class Rejected(msgspec.Struct, frozen=True):
    """A message of the client was rejected."""

    code: str
    detail: str


EVENT_NAMES: dict[type[msgspec.Struct], str] = {
    Snapshot: "snapshot",
    ChangedPrices: "prices",
    ChangedCandles: "candles",
    ChangedMode: "mode",
    Health: "health",
    Heartbeat: "heartbeat",
    End: "end",
    EventAnswer: "alert",
    Subscribed: "subscribed",
    Rejected: "error",
}
"""Names of the events by their type."""
