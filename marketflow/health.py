"""What runs and how it does, as /health and the stream tell it."""

from typing import Annotated, Literal, Protocol

import msgspec
from msgspec import Meta

from marketflow.model import FeedState, Mode

StoreState = Literal["ok", "down"]


class Health(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the application does."""

    status: Annotated[Literal["ok", "degraded"], Meta(description="`ok` while both stores and every exchange do well.")]
    mode: Mode
    uptime_seconds: Annotated[float, Meta(ge=0, description="Seconds since the start.", examples=[93.015])]
    postgres: Annotated[StoreState, Meta(description="Whether candles can be read and written.")]
    redis: Annotated[StoreState, Meta(description="Whether newest prices can be read and written.")]
    exchanges: Annotated[dict[str, FeedState], Meta(description="How the feed of each exchange does, by its name.")]
    clock_offsets_ms: Annotated[
        dict[str, int],
        Meta(
            description="Of exchanges whose clock is wrong, by how many milliseconds it is ahead of this machine's; "
            "their ticks are dated by receipt. Left out while there is none."
        ),
    ] = {}


class ModeSwitch(Protocol):
    """Knows the mode that runs and changes it."""

    @property
    def current(self) -> Mode:
        """The mode that runs."""
        ...

    async def switch(self, mode: Mode) -> Mode:
        """Run `mode` from now on and return the one that ran before. Concurrent switches queue up.

        Raises:
            Unavailable: the mode cannot be switched now.
        """
        ...
