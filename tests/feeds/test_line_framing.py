"""Whole lines out of a byte stream."""

from hypothesis import given
from hypothesis import strategies as st

from marketflow.feeds.line_framing import MAX_LINE_BYTES, Framer, pieces


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


@given(st.lists(st.binary(max_size=20).map(lambda line: line.replace(b"\n", b"")), max_size=10), st.data())
def test_lines_come_whole_however_the_stream_is_cut(lines: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(line + b"\n" for line in lines) + b"unfinished"
    framer = Framer(Counter())
    got = b""
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        part = framer.push(stream[:size])
        assert part == b"" or part.endswith(b"\n")
        got += part
        stream = stream[size:]
    assert got == b"".join(line + b"\n" for line in lines)


def test_endless_line_is_dropped_in_bounded_memory_and_counted_once() -> None:
    too_long = Counter()
    framer = Framer(too_long)
    for _ in range(100):
        assert framer.push(b"x" * 10_000) == b""
        assert len(framer._tail) <= MAX_LINE_BYTES
    assert too_long.count == 1


def test_the_tail_of_a_skipped_line_is_no_line_of_its_own() -> None:
    framer = Framer(Counter())
    framer.push(b"x" * (MAX_LINE_BYTES + 1))
    assert framer.push(b'{"forged":1}\n{"good":1}\n{"ne') == b'{"good":1}\n'
    assert framer.push(b'xt":1}\n') == b'{"next":1}\n'


def test_line_after_a_dropped_line_is_kept() -> None:
    framer = Framer(Counter())
    framer.push(b"x" * (MAX_LINE_BYTES + 1))
    assert framer.push(b"\n") == b""
    assert framer.push(b"good\n") == b"good\n"


def test_a_line_of_just_the_limit_is_kept() -> None:
    framer = Framer(Counter())
    assert framer.push(b"x" * MAX_LINE_BYTES) == b""
    assert framer.push(b"\n") == b"x" * MAX_LINE_BYTES + b"\n"


@given(
    st.lists(
        st.sampled_from([0, 1, 30_000, MAX_LINE_BYTES - 2, MAX_LINE_BYTES - 1, MAX_LINE_BYTES, 200_000]), max_size=8
    )
)
def test_pieces_are_whole_lines_and_bounded(lengths: list[int]) -> None:
    lines = [b"x" * length + b"\n" for length in lengths]
    found = [*pieces(b"".join(lines))]
    assert b"".join(found) == b"".join(lines)
    assert all(piece.endswith(b"\n") for piece in found)
    assert all(len(piece) <= MAX_LINE_BYTES or piece in lines for piece in found)
