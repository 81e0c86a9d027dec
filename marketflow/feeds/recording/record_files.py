"""Files of recorded frames: zstd, a JSON header in the first line, then a line for each frame.

A line is the time of receipt in Unix ns, a space, and the frame as received. A frame that has a line feed stands in
base64 after `=` instead of the space, and `!` precedes the number of frames that are missing at that place. So
`zstdcat FILE | less` shows them. A file that ends in the middle, after a kill or on a full disk, is read up to there.
"""

import base64
import re
from binascii import Error as Base64Error
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, NamedTuple

import msgspec

from marketflow.errors import StartError

try:
    import zstandard
except ImportError:
    raise StartError("recording and --replay need the package zstandard: pip install zstandard") from None

SUFFIX = ".frames.zst"

FORMAT = "marketflow-frames-1"

LEVEL = 3
"""Of the compression: some 200 MB/s on one core."""

READ_BYTES = 1 << 12
"""Read at once: as much is lost before a damage."""

MAX_LINE_BYTES = 1 << 24

_NAME = re.compile(r"[A-Za-z0-9._-]+-(\d{8}T\d{6}Z)(?:\.(\d+))?\.frames\.zst")


class NoRecord(StartError):
    """A file that cannot be replayed as it is no record of frames; the text says why."""


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What a file holds.

    Args:
        format: FORMAT.
        exchange: the name of the exchange in the settings.
        venue: its protocol; "" for lines over TCP.
        place: where the frames came from.
        began: Unix ns.
    """

    format: str = FORMAT
    exchange: str
    venue: str
    place: str
    began: int


class RecordedFrame(NamedTuple):
    """A frame, or a line of a TCP feed, and when it was received (Unix ns)."""

    at: int
    frame: bytes


def line_of(at: int, frame: bytes) -> bytes:
    """The line of a frame."""
    if b"\n" in frame:
        return b"%d=%b\n" % (at, base64.b64encode(frame))
    return b"%d %b\n" % (at, frame)


def missing_line(at: int, count: int) -> bytes:
    """The line for frames that are not in the file."""
    return b"%d!%d\n" % (at, count)


class RecordFile:
    """A file that frames are written to.

    Args:
        folder: where it is made.
        header: its first line; names it together with the time at which it began.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, folder: Path, header: Header) -> None:
        self.path, self._file = _create(folder, header)
        self._writer = zstandard.ZstdCompressor(level=LEVEL).stream_writer(self._file, closefd=False)
        try:
            self.write([msgspec.json.encode(header) + b"\n"])
        except OSError:
            self._close_file()
            raise

    @property
    def size(self) -> int:
        """Bytes written to the disk."""
        return self._file.tell()

    def write(self, lines: Iterable[bytes]) -> None:
        """Write lines so that they can be read even if the process is killed.

        Raises:
            OSError: the disk is full, say.
        """
        self._writer.write(b"".join(lines))
        self._writer.flush(zstandard.FLUSH_BLOCK)
        self._file.flush()

    def close(self) -> None:
        """End the file.

        Raises:
            OSError: the disk is full, say.
        """
        try:
            self._writer.flush(zstandard.FLUSH_FRAME)
        finally:
            self._file.close()

    def _close_file(self) -> None:
        with suppress(OSError):  # what could not be written is tried again
            self._file.close()


def _create(folder: Path, header: Header) -> tuple[Path, BinaryIO]:
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{header.exchange}-{datetime.fromtimestamp(header.began // 10**9, UTC):%Y%m%dT%H%M%SZ}"
    for number in range(10_000):
        path = folder / f"{stem}{f'.{number}' if number else ''}{SUFFIX}"
        try:
            return path, path.open("xb")  # buffered, as a raw file may write but a part
        except FileExistsError:
            continue
    raise FileExistsError(f"{stem}{SUFFIX} and 9,999 more are there")


def record_files(folder: Path) -> list[Path]:
    """The files of frames in a folder, oldest first; nothing else is among them.

    Raises:
        OSError: the folder cannot be read.
    """
    named = [
        (match[1], int(match[2] or 0), path.name, path)
        for path in folder.iterdir()
        if (match := _NAME.fullmatch(path.name))
    ]
    return [path for *_, path in sorted(named)]


def read_header(path: Path) -> Header:
    """The header of a file.

    Raises:
        NoRecord: it has none.
        OSError: it cannot be read.
    """
    first = next(_lines(path), b"")
    try:
        header = msgspec.json.decode(first, type=Header)
    except msgspec.MsgspecError:
        raise NoRecord(f"{path} is no record of frames") from None
    if header.format != FORMAT:
        raise NoRecord(f"{path} is of the format {header.format!r}, not {FORMAT!r}")
    return header


def read_frames(path: Path) -> Iterator[RecordedFrame]:
    """Yield the frames of a file up to where it ends, or is damaged.

    Raises:
        OSError: it cannot be read.
    """
    lines = _lines(path)
    next(lines, None)
    for line in lines:
        digits = len(line) - len(line.lstrip(b"0123456789"))
        mark, frame = line[digits : digits + 1], line[digits + 1 :]
        if not digits or mark not in (b" ", b"=", b"!"):
            return
        if mark == b"!":
            continue
        try:
            yield RecordedFrame(int(line[:digits]), base64.b64decode(frame) if mark == b"=" else frame)
        except Base64Error:
            return


def _lines(path: Path) -> Iterator[bytes]:
    """Whole lines, without their line feeds."""
    decompressor = zstandard.ZstdDecompressor().decompressobj()
    with path.open("rb") as file:
        rest = b""
        while len(rest) < MAX_LINE_BYTES and (compressed := file.read(READ_BYTES)):
            try:
                chunk = decompressor.decompress(compressed)
            except zstandard.ZstdError:
                return
            *lines, rest = (rest + chunk).split(b"\n")
            yield from lines
