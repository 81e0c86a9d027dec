"""The recorder: a file an hour and feed, within a size, and never at the cost of a feed."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from loguru import logger

from marketflow.clock import system_clock
from marketflow.feeds.backfill.rest_client import RestClient
from marketflow.feeds.decoder import Decoder
from marketflow.feeds.recording import recorder as module
from marketflow.feeds.recording.record_files import read_frames, read_header, record_files
from marketflow.feeds.recording.recorder import Recorder
from marketflow.feeds.tcp import TcpFeed
from marketflow.feeds.venues.limits import AttemptBudget
from marketflow.feeds.venues.registry import VENUES
from marketflow.feeds.venues.websocket_feed import VenueFeed
from marketflow.model import Mode
from tests.support.servers import wait_until
from tests.support.venue_server import VenueServer

AT = 1_790_667_453_786_450_123


class Disk:
    """A recorder whose time a test sets, and which writes when a test says so, until a `with` ends."""

    def __init__(self, folder: Path, max_bytes: int = 2**30) -> None:
        self.folder = folder
        self.at = AT
        self.seconds = 0.0
        self.recorder = Recorder(folder, max_bytes, lambda: self.at, lambda: self.seconds)
        self.record = self.recorder.feed("binance", "binance", "wss://example.com/ws")

    def __enter__(self) -> "Disk":
        return self

    def __exit__(self, *_: object) -> None:
        self.recorder.stop()

    def frames(self) -> list[bytes]:
        return [frame for path in record_files(self.folder) for _, frame in read_frames(path)]


@contextmanager
def logged() -> Iterator[list[str]]:
    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(message.record["message"]), level="INFO")
    try:
        yield lines
    finally:
        logger.remove(sink)


def test_each_feed_has_a_file_an_hour(tmp_path: Path) -> None:
    with Disk(tmp_path) as disk:
        other = disk.recorder.feed("kraken", "kraken", "wss://example.com/v2")
        for hour in range(3):
            disk.at = AT + hour * 3_600_000_000_000
            disk.record([b"one", b"two"])
            disk.recorder.write()
            disk.record([b"three"])
            other([b"other"])
            disk.recorder.write()
        paths = record_files(tmp_path)
        assert len(paths) == 6
        mine = [path for path in paths if read_header(path).exchange == "binance"]
        assert [[frame for _, frame in read_frames(path)] for path in mine] == [[b"one", b"two", b"three"]] * 3
        assert [at for at, _ in read_frames(mine[1])] == [AT + 3_600_000_000_000] * 3
        assert read_header(mine[0]).place == "wss://example.com/ws"


def test_oldest_files_are_deleted_beyond_the_size(tmp_path: Path) -> None:
    with Disk(tmp_path, max_bytes=2**20) as disk:
        kept = tmp_path / "notes.txt"
        kept.write_bytes(b"x" * 2**20)
        sizes = []
        for number in range(60):
            disk.at = AT + number * 1_000_000_000
            disk.record([os.urandom(50_000)])
            disk.recorder.write()
            sizes.append(sum(path.stat().st_size for path in record_files(tmp_path)))
        assert max(sizes) <= 2**20
        assert sizes[-1] > 2**19
        assert kept.exists()
        oldest = next(at for path in record_files(tmp_path) for at, _ in read_frames(path))
        assert AT + 30_000_000_000 < oldest < AT + 50_000_000_000


def test_full_buffer_costs_frames_that_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUFFER_BYTES", 1000)
    with Disk(tmp_path) as disk:
        with logged() as lines:
            disk.record([b"x" * 400] * 5)
            disk.recorder.write()
            disk.record([b"y"])
            disk.recorder.write()
        assert disk.frames() == [b"x" * 400, b"x" * 400, b"y"]
        assert disk.recorder.missing == 3
        assert "raw frames are missing from the record: 3 so far" in lines


def test_unusable_folder_costs_a_log_line_and_no_feed(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.write_bytes(b"a file where the folder should be")
    with Disk(place / "frames") as disk:
        with logged() as lines:
            for _ in range(10):
                disk.record([b"lost"])
                disk.recorder.write()
                disk.seconds += 1
            place.unlink()
            disk.seconds += 5
            disk.record([b"kept"])
            disk.recorder.write()
        assert [line for line in lines if "cannot be recorded" in line] == [
            f"raw frames cannot be recorded, Not a directory: {place / 'frames'}"
        ]
        assert sum("raw frames are recorded again" in line for line in lines) == 1
        assert disk.frames()[-1] == b"kept"
        assert disk.frames().count(b"lost") + disk.recorder.missing == 10


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True)
    if mount.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_full_disk_is_logged_and_recovered_from(small_disk: Path) -> None:
    with Disk(small_disk) as disk:
        with logged() as lines:
            for number in range(20):
                disk.at = AT + number * 1_000_000_000
                disk.record([os.urandom(30_000)])
                disk.recorder.write()
                disk.seconds += 6
            assert sum("No space left on device" in line for line in lines) == 1
            written = len(disk.frames())
            assert 0 < written < 20
            assert disk.recorder.missing == 20 - written
            for path in record_files(small_disk)[:1]:
                path.unlink()
            disk.at += 1_000_000_000
            disk.record([b"after"])
            disk.recorder.write()
            assert any("raw frames are recorded again" in line for line in lines)
        assert disk.frames()[-1] == b"after"


def test_stop_writes_what_is_buffered(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 2**30)
    record = recorder.feed("okx", "okx", "place")
    recorder.start()
    record([b"pong"] * 1000)
    recorder.stop()
    (path,) = record_files(tmp_path)
    assert len([*read_frames(path)]) == 1000


def test_threads_record_each_frame_once(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 2**30)
    records = [recorder.feed(f"e{number}", "okx", "place") for number in range(3)]
    recorder.start()

    def receive(number: int) -> None:
        for frame in range(2000):
            records[number % 3]([b"%d:%d" % (number, frame)])

    threads = [threading.Thread(target=receive, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    recorder.stop()
    frames = [frame for path in record_files(tmp_path) for _, frame in read_frames(path)]
    assert sorted(frames) == sorted(b"%d:%d" % (number, frame) for number in range(6) for frame in range(2000))


_ENDLESS = """
import sys
from pathlib import Path
from marketflow.feeds.recording.recorder import Recorder
recorder = Recorder(Path(sys.argv[1]), 2**30)
record = recorder.feed("binance", "binance", "place")
number = 0
while True:
    for _ in range(100):
        record([b"frame %d" % number])
        number += 1
    recorder.write()
    print(number, flush=True)
"""


def test_kill_leaves_what_was_written_readable(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", _ENDLESS, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        confirmed = [int(process.stdout.readline()) for _ in range(50)][-1]
        process.send_signal(signal.SIGKILL)
    (path,) = record_files(tmp_path)
    frames = [frame for _, frame in read_frames(path)]
    assert len(frames) >= confirmed
    assert frames == [b"frame %d" % number for number in range(len(frames))]


def test_recorder_thread_ends_with_a_stop(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 2**30)
    recorder.start()
    recorder.stop()
    wait_until(lambda: all(thread.name != "recorder" for thread in threading.enumerate()))


def test_venue_feed_records_every_frame_as_received(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 2**30)
    with VenueServer("okx", ["BTCUSDT"]) as server:
        decoder = Decoder(Mode.LIVE, "okx", ["BTCUSDT"], system_clock, 5_000, lambda *_: None)
        rest = RestClient(VENUES["okx"], server.rest_url)
        budget = AttemptBudget(10, 60.0, time.monotonic)
        feed = VenueFeed("okx", VENUES["okx"], ["BTCUSDT"], {}, decoder, 15.0, budget, server.url, rest)
        feed.record = recorder.feed("okx", "okx", feed.place)
        errors: list[Exception] = []
        with feed.batches().subscribe(on_error=errors.append):
            wait_until(server.has_subscriber)
            frames: list[str | bytes] = ["pong", "garbage", b"\xff\n", "x" * (2 * 2**20)]
            server.send(*frames, trade := server.dialect.trade(server.make(1)))
            wait_until(lambda: decoder.ticks == 1)
        assert not errors
    recorder.stop()
    (path,) = record_files(tmp_path)
    received = [*read_frames(path)]
    sent = [frame.encode() if isinstance(frame, str) else frame for frame in (*frames, trade)]
    assert [frame for _, frame in received][-len(sent) :] == sent
    assert b'"event":"subscribe"' in received[0].frame
    times = [at for at, _ in received]
    assert times == sorted(times)
    assert abs(times[0] - system_clock()) < 60_000_000_000


def test_tcp_feed_records_its_lines(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 2**30)
    lines = [b'{"symbol":"BTCUSDT","price":%d}' % number for number in range(1, 101)]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        decoder = Decoder(Mode.LIVE, "exchange1", ["BTCUSDT"], system_clock, 5_000, lambda *_: None)
        feed = TcpFeed("exchange1", "127.0.0.1", port, decoder, 15.0)
        feed.record = recorder.feed("exchange1", "", feed.place)
        with feed.batches().subscribe(on_error=lambda error: None):
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"\n".join(lines) + b"\n")
                wait_until(lambda: decoder.ticks == 100)
    recorder.stop()
    (path,) = record_files(tmp_path)
    assert read_header(path).venue == ""
    assert [frame for _, frame in read_frames(path)] == lines
