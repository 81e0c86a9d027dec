"""Records the raw frames of feeds to files, on a thread of its own.

A feed hands its frames to a bounded buffer, and nothing that happens to the disk delays it: frames that find no room,
or that a full disk does not take, are missing from the record, counted and logged.
"""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from marketflow.clock import Clock, system_clock
from marketflow.feeds.feed import Record
from marketflow.feeds.recording.record_files import Header, RecordFile, line_of, missing_line, record_files
from marketflow.logs import Outage, RateLimit

BUFFER_BYTES = 64 << 20
"""Of frames of one feed that are not written yet: over two seconds at 100,000 trades a second."""

FRAME_OVERHEAD_BYTES = 100
"""What a frame costs in memory besides its bytes."""

WRITE_SECONDS = 0.5
"""How often frames are written: a kill costs as much of the record."""

RETRY_SECONDS = 5.0
"""Pause after a failure of the disk."""

HOUR_NS = 3_600_000_000_000

SMALLEST_FILE_BYTES = 1 << 16


class FrameBuffer:
    """Frames of one feed that are not written yet.

    Args:
        exchange: its name.
        venue: its protocol; "" for lines over TCP.
        place: where they come from.
        clock: dates them.
    """

    def __init__(self, exchange: str, venue: str, place: str, clock: Clock) -> None:
        self.exchange, self.venue, self.place = exchange, venue, place
        self.missing = 0
        """Frames that are in no file."""
        self._clock = clock
        self._lock = threading.Lock()
        self._frames: list[tuple[int, bytes]] = []
        self._bytes = 0
        self._unsaid = 0

    def record(self, frames: Sequence[bytes]) -> None:
        """Take frames, as a `Record`."""
        with self._lock:
            at = self._clock()
            for frame in frames:
                size = len(frame) + FRAME_OVERHEAD_BYTES
                if self._bytes + size > BUFFER_BYTES:
                    self.missing += 1
                    self._unsaid += 1
                else:
                    self._bytes += size
                    self._frames.append((at, frame))

    def lose(self, count: int, unsaid: int) -> None:
        """Count frames that were taken and could not be written; `unsaid` are those that were counted before."""
        with self._lock:
            self.missing += count
            self._unsaid += count + unsaid

    def take(self) -> tuple[list[tuple[int, bytes]], int]:
        """The frames that wait, and the number that is missing before them."""
        with self._lock:
            frames, unsaid = self._frames, self._unsaid
            self._frames, self._bytes, self._unsaid = [], 0, 0
        return frames, unsaid


class Recorder:
    """Files of frames in one folder: one an hour and feed, the oldest of which are deleted beyond a size.

    Args:
        folder: where the files are.
        max_bytes: of all files together.
        clock: dates frames, in Unix ns.
        monotonic: measures pauses, in seconds.
    """

    def __init__(
        self,
        folder: Path,
        max_bytes: int,
        clock: Clock = system_clock,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._clock, self._monotonic = clock, monotonic
        self._feeds: list[FrameBuffer] = []
        self._files: dict[FrameBuffer, tuple[RecordFile, int]] = {}  # with the hour of its beginning
        self._stopped = threading.Event()
        self._retry_at = 0.0
        self._outage = Outage("raw frames cannot be recorded", "raw frames are recorded again")
        self._limit = RateLimit(60.0)
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)

    @property
    def missing(self) -> int:
        """How many frames are in no file."""
        return sum(feed.missing for feed in self._feeds)

    def feed(self, exchange: str, venue: str, place: str) -> Record:
        """What a feed hands its frames to; the name, the protocol and the place stand in its files."""
        buffer = FrameBuffer(exchange, venue, place, self._clock)
        self._feeds.append(buffer)
        return buffer.record

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def stop(self, wait_seconds: float = 2.0) -> None:
        """Write what is buffered and close the files; a disk that does not answer is left alone."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(wait_seconds)
        else:
            self._finish()

    def _run(self) -> None:
        while not self._stopped.wait(WRITE_SECONDS):
            self.write()
        self._finish()

    def _finish(self) -> None:
        self._retry_at = 0.0
        self.write()
        for feed in [*self._files]:
            self._close(feed)

    def write(self) -> None:
        """Write what the feeds have handed over, and delete what is beyond the size; failures are logged."""
        if self._monotonic() < self._retry_at:
            return  # the buffers keep what they can
        for feed in self._feeds:
            frames, missing = feed.take()
            if (frames or missing) and not self._write(feed, frames, missing):
                feed.lose(len(frames), missing)
        self._delete_oldest()

    def _write(self, feed: FrameBuffer, frames: list[tuple[int, bytes]], missing: int) -> bool:
        at = frames[0][0] if frames else self._clock()
        try:
            file = self._file_for(feed, at)
            lines = [missing_line(at, missing)] if missing else []
            file.write([*lines, *_lines(feed, frames)])
        except OSError as error:
            self._failed(error)
            self._close(feed)
            return False
        self._outage.over("disk")
        if missing:
            text = "raw frames are missing from the record: {} so far"
            self._limit.log(feed.exchange, "WARNING", text.format(feed.missing), exchange=feed.exchange)
        return True

    def _file_for(self, feed: FrameBuffer, at: int) -> RecordFile:
        file, hour = self._files.get(feed, (None, -1))
        # So that the oldest file, which is deleted as a whole, is a small part of all.
        largest = max(self._max_bytes // (4 * len(self._feeds)), SMALLEST_FILE_BYTES)
        if file is not None and hour == at // HOUR_NS and file.size < largest:
            return file
        self._close(feed)
        file = RecordFile(self._folder, Header(exchange=feed.exchange, venue=feed.venue, place=feed.place, began=at))
        self._files[feed] = file, at // HOUR_NS
        return file

    def _close(self, feed: FrameBuffer) -> None:
        if (open_file := self._files.pop(feed, None)) is not None:
            try:
                open_file[0].close()
            except OSError as error:
                self._failed(error)

    def _delete_oldest(self) -> None:
        written = {file.path for file, _ in self._files.values()}
        try:
            sizes = {path: path.stat().st_size for path in record_files(self._folder)} if self._folder.exists() else {}
            total = sum(sizes.values())
            for path, size in sizes.items():
                if total <= self._max_bytes:
                    break
                if path not in written:
                    path.unlink(missing_ok=True)
                    total -= size
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        self._retry_at = self._monotonic() + RETRY_SECONDS
        self._outage.failed("disk", f"{error.strerror or error}: {error.filename or self._folder}")


def _lines(feed: FrameBuffer, frames: Iterable[tuple[int, bytes]]) -> Iterable[bytes]:
    if feed.venue:
        return (line_of(at, frame) for at, frame in frames)
    return (line_of(at, line) for at, chunk in frames for line in chunk.split(b"\n") if line)
