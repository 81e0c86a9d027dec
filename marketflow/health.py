"""The health of the application, and the port by which the mode is switched."""

from collections.abc import Sequence
from typing import Annotated, Literal, Protocol

import msgspec
from msgspec import Meta

from marketflow.errors import Unavailable
from marketflow.model import FeedState, Mode

Time = Annotated[
    str,
    Meta(
        pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{3}Z$",
        examples=["2026-11-21T05:12:57.069Z"],
        extra_json_schema={"format": "date-time"},
    ),
]
"""RFC 3339 in UTC with milliseconds, as `text.rfc3339` makes it."""

StoreState = Literal["ok", "down"]


class FeedProblem(msgspec.Struct, frozen=True):
    """What is wrong with the feed of an exchange."""

    state: Annotated[FeedState, Meta(description="Its state, as in `exchanges`.")]
    address: Annotated[str, Meta(description="Where it connects, without credentials.")]
    error: Annotated[str | None, Meta(description="What is wrong, in words; null while nothing is known.")]
    error_at: Annotated[Time | None, Meta(description="When its last attempt or connection failed.")]
    next_try_at: Annotated[Time | None, Meta(description="When the next attempt begins, or has begun.")]
    absent: Annotated[tuple[str, ...], Meta(description="Symbols that the venue does not list, or refuses.")]
    halted: Annotated[tuple[str, ...], Meta(description="Symbols that it lists and does not trade now.")] = ()


StandbyState = Literal["warm", "cold", "connecting", "none"]

Process = Annotated[str | None, Meta(description="Host and process id; null while there is none.")]


class ShardHealth(msgspec.Struct, frozen=True):
    """Who ingests a shard: an exchange, or a part of one by symbols."""

    shard: Annotated[str, Meta(description="Its name.", examples=["exchange1", "exchange1/2of4"])]
    owner: Process
    standby: Process
    standby_state: Annotated[
        StandbyState,
        Meta(
            description="`warm`: takes over without losing a tick; `cold`: begins when it takes over, since no other "
            "process receives the same ticks; `connecting`: not yet warm; `none`: there is no standby."
        ),
    ]
    lag_ms: Annotated[
        int | None,
        Meta(description="How far the newest tick of the standby is behind that of the owner, in ms; null if unknown."),
    ]


class Health(msgspec.Struct, frozen=True, omit_defaults=True):
    """Health of stores, exchanges and the application."""

    status: Annotated[
        Literal["ok", "degraded"], Meta(description="`ok` while both stores and every exchange are healthy.")
    ]
    mode: Mode
    uptime_seconds: Annotated[float, Meta(ge=0, description="Seconds since the start.", examples=[93.015])]
    postgres: Annotated[StoreState, Meta(description="Whether candles can be read and written.")]
    redis: Annotated[StoreState, Meta(description="Whether newest prices can be read and written.")]
    exchanges: Annotated[dict[str, FeedState], Meta(description="State of the feed of each exchange, by its name.")]
    clock_offsets_ms: Annotated[
        dict[str, int],
        Meta(
            description="Of exchanges whose clock is wrong, by how many milliseconds it is ahead of this machine's; "
            "their ticks are dated by receipt. Left out while there is none."
        ),
    ] = {}
    feeds: Annotated[
        dict[str, FeedProblem],
        Meta(
            description="Of exchanges whose feed is neither `connected` nor `generated`, or that lack a symbol, what "
            "is wrong. Left out while there is none."
        ),
    ] = {}
    unavailable_symbols: Annotated[
        tuple[str, ...],
        Meta(
            description="Symbols whose part of a Redis Cluster cannot be used: their newest prices are late. Left out "
            "while there is none."
        ),
    ] = ()
    stalled: Annotated[
        tuple[str, ...],
        Meta(
            description="Branches of the pipeline that have had work for 30 s without finishing any. Left out while "
            "there is none."
        ),
    ] = ()
    shards: Annotated[
        tuple[ShardHealth, ...],
        Meta(description="Who ingests what. Left out where ingest runs in the process that answers."),
    ] = ()


class ModeUnconfirmed(Unavailable):
    """The mode was set, and the owners of these shards have not confirmed it in time. They adopt it when they can."""

    def __init__(self, shards: Sequence[str]) -> None:
        super().__init__(f"not confirmed for {', '.join(shards)}")
        self.shards = shards


class ModeSwitch(Protocol):
    """Returns the current mode, and switches it."""

    @property
    def current(self) -> Mode:
        """The current mode."""
        ...

    async def switch(self, mode: Mode) -> Mode:
        """Switch to `mode` and return the previous one. Concurrent switches are serialized.

        Raises:
            Unavailable: the mode cannot be switched now.
        """
        ...
