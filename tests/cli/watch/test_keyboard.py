"""Keys from bytes of a terminal, however these are cut."""

import pytest

from marketflow.cli.watch.keyboard import Key, KeyDecoder


@pytest.mark.parametrize(
    ("typed", "keys"),
    [
        (b"q", [Key.QUIT]),
        (b"\x04", [Key.QUIT]),
        (b"xq", [Key.QUIT]),
        (b"\x1b[A\x1bOB\x1b[C\x1bOD", [Key.UP, Key.DOWN, Key.RIGHT, Key.LEFT]),
        (b"\x1b[5~\x1b[6~\x1b[H\x1b[F", [Key.PAGE_UP, Key.PAGE_DOWN, Key.HOME, Key.END]),
        (b"\x1b[1~\x1b[4~", [Key.HOME, Key.END]),
        (b"\r\n", [Key.ENTER, Key.ENTER]),
        (b"sri", [Key.SORT, Key.REVERSE, Key.INTERVAL]),
        (b"\x1bq", [Key.ESCAPE, Key.QUIT]),
        (b"\x1b\x1b[A", [Key.ESCAPE, Key.UP]),
        (b"\x1b[1;5Aj", [Key.DOWN]),
        (b"\x1b[200~s", [Key.SORT]),
        (b"\x1b[<0;12;7Mk", [Key.UP]),
        (b"\xc3\xa9k", [Key.UP]),
    ],
)
def test_typed_bytes_are_keys_however_they_are_cut(typed: bytes, keys: list[Key]) -> None:
    assert KeyDecoder().feed(typed) == keys
    one_by_one = KeyDecoder()
    assert [key for byte in typed for key in one_by_one.feed(bytes([byte]))] == keys
    assert not one_by_one.is_waiting


def test_escape_alone_is_a_key_once_nothing_follows() -> None:
    decoder = KeyDecoder()
    assert (decoder.feed(b"\x1b"), decoder.is_waiting) == ([], True)
    assert (decoder.flush(), decoder.is_waiting) == ([Key.ESCAPE], False)
    assert decoder.feed(b"\x1b[") == decoder.flush() == []
