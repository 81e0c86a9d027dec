"""Files of recorded frames: what was written is read, up to where a file ends."""

from pathlib import Path

import pytest
import zstandard

from marketflow.feeds.recording.record_files import (
    Header,
    NoRecord,
    RecordedFrame,
    RecordFile,
    line_of,
    missing_line,
    read_frames,
    read_header,
    record_files,
)

AT = 1_790_667_453_786_450_123

FRAMES = [
    RecordedFrame(AT, b'{"e":"trade","p":"84034.90000000"}'),
    RecordedFrame(AT + 1, b""),
    RecordedFrame(AT + 2, b"\x00\xff\xfe=!"),
    RecordedFrame(AT + 3, b'{\n "two": "lines"\n}\r\n'),
    RecordedFrame(AT + 4, "ü€".encode() * 1000),
    RecordedFrame(AT + 5, b"=7"),
]


def header(began: int = AT, exchange: str = "binance") -> Header:
    return Header(exchange=exchange, venue="binance", place="wss://example.com/ws", began=began)


def written(folder: Path, frames: list[RecordedFrame] = FRAMES) -> Path:
    file = RecordFile(folder, header())
    for frame in frames:
        file.write([line_of(*frame)])
    file.close()
    return file.path


def test_frames_are_read_as_written(tmp_path: Path) -> None:
    path = written(tmp_path / "new" / "folder")
    assert path.name == "binance-20260929T073733Z.frames.zst"
    assert read_header(path) == header()
    assert [*read_frames(path)] == FRAMES


def test_file_cut_at_any_byte_is_read_up_to_there(tmp_path: Path) -> None:
    path = written(tmp_path)
    whole, seen = path.read_bytes(), set()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        found = [*read_frames(path)]
        assert found == FRAMES[: len(found)]
        seen.add(len(found))
    assert seen == {*range(len(FRAMES) + 1)}


def test_damaged_file_is_read_up_to_the_damage(tmp_path: Path) -> None:
    path = written(tmp_path, [RecordedFrame(AT + number, bytes([number % 251]) * 7) for number in range(500)])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + b"\x00" * (len(whole) // 2))
    found = [*read_frames(path)]
    assert 100 < len(found) < 500


def test_places_of_missing_frames_are_passed_over(tmp_path: Path) -> None:
    file = RecordFile(tmp_path, header())
    file.write([line_of(*FRAMES[0]), missing_line(AT, 12), line_of(*FRAMES[2])])
    file.close()
    assert [*read_frames(file.path)] == [FRAMES[0], FRAMES[2]]


@pytest.mark.parametrize(
    "content", [b"", b"garbage", zstandard.compress(b"[]\n"), zstandard.compress(b'{"format":"x"}\n')]
)
def test_file_without_a_header_is_no_record(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.frames.zst"
    path.write_bytes(content)
    with pytest.raises(NoRecord, match="is no record of frames"):
        read_header(path)


def test_other_format_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.frames.zst"
    path.write_bytes(
        zstandard.compress(b'{"format":"marketflow-frames-9","exchange":"a","venue":"","place":"","began":1}\n')
    )
    with pytest.raises(NoRecord, match="marketflow-frames-9"):
        read_header(path)


def test_names_are_unique_and_listed_oldest_first(tmp_path: Path) -> None:
    later = RecordFile(tmp_path, header(AT + 10**9, "a"))
    same = [RecordFile(tmp_path, header()) for _ in range(3)]
    (tmp_path / "notes.txt").touch()
    (tmp_path / "other.frames.zst").touch()
    assert record_files(tmp_path) == [*(file.path for file in same), later.path]
    for file in (later, *same):
        file.close()
    assert same[2].path.name == "binance-20260929T073733Z.2.frames.zst"
