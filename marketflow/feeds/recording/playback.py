"""Recorded frames again, in their order and at their distances in time, with event times moved to now."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from heapq import merge
from pathlib import Path

from marketflow.clock import Clock, system_clock
from marketflow.feeds.recording.event_times import mover
from marketflow.feeds.recording.record_files import NoRecord, RecordedFrame, read_frames, read_header

MINUTE_NS = 60_000_000_000

SHORTEST_WAIT_SECONDS = 0.002


class Playback:
    """The frames of files of one venue.

    Event times move by whole minutes, so that candles stay what they were. At the recorded speed the replay begins at
    the same second of the minute, and the times are then those of the clock; at another speed they keep their
    distances, and run ahead of the clock or fall behind it.

    Args:
        paths: the files, in any order.
        speed: how many recorded seconds pass in one.
        clock: of this machine, Unix ns.
        monotonic: measures pauses, in seconds.

    Raises:
        NoRecord: a file is none, there are no frames in them, or they are of several venues.
        OSError: a file cannot be read.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        speed: float,
        clock: Clock = system_clock,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        headers = [read_header(path) for path in paths]
        self.exchange, self.venue = headers[0].exchange, headers[0].venue
        if other := next((each.venue for each in headers if each.venue != self.venue), None):
            raise NoRecord(f"the files are of several venues: {self.venue or 'TCP'} and {other or 'TCP'}")
        self._paths, self._speed = paths, speed
        self._clock, self._monotonic = clock, monotonic
        first = next(self.recorded(), None)
        if first is None:
            raise NoRecord(f"there are no frames in {', '.join(map(str, paths))}")
        self.first_at = first.at
        self._began: float | None = None
        self._ended: float | None = None
        self._last_at = first.at
        self._moved_ns = 0

    def recorded(self) -> Iterator[RecordedFrame]:
        """Yield all frames as they are recorded."""
        return merge(*(read_frames(path) for path in self._paths), key=lambda frame: frame.at)

    @property
    def pause_seconds(self) -> float:
        """How long to wait so that the replay begins at the recorded second of the minute; 0 at another speed."""
        pause_ns = (self.first_at - self._clock()) % MINUTE_NS
        return pause_ns / 1e9 if self._speed == 1 and pause_ns < MINUTE_NS - 500_000_000 else 0.0

    def now(self) -> int:
        """The time of the replay in Unix ns: this machine's before it began, from then on that of its frames."""
        if self._began is None:
            return self._clock()
        if self._ended is not None:
            return self._last_at + self._moved_ns + int((self._monotonic() - self._ended) * 1e9)
        return self.first_at + self._moved_ns + int((self._monotonic() - self._began) * self._speed * 1e9)

    async def frames(self) -> AsyncIterator[RecordedFrame]:
        """Yield the frames when they are due, with their event times moved."""
        minutes = round((self._clock() - self.first_at) / MINUTE_NS)
        self._moved_ns = minutes * MINUTE_NS
        move = mover(self.venue, minutes)
        self._began = self._monotonic()
        for at, frame in self.recorded():
            due = self._began + (at - self.first_at) / 1e9 / self._speed
            if (pause := due - self._monotonic()) > SHORTEST_WAIT_SECONDS:
                await asyncio.sleep(pause)
            self._last_at = at
            yield RecordedFrame(at, move(frame))
        self._ended = self._monotonic()
