"""Writes by master: a late one delays none of the others, and nothing that is for it is lost or overtaken."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest

from marketflow.errors import Unavailable
from marketflow.stores.redis.buckets.writes_by_master import WritesByMaster
from marketflow.stores.redis.writer import RedisWriter
from tests.support.servers import wait_until


class Bucket:
    """What a bucket is given; it answers once it may."""

    def __init__(self, master: str) -> None:
        self.master = master
        self.written: list[dict[str, int]] = []
        self.answers = threading.Event()
        self.answers.set()
        self.error: Exception | None = None


def put(part: RedisWriter, content: dict[str, int]) -> bool:
    bucket = cast("Bucket", part)
    bucket.written.append(content)
    assert bucket.answers.wait(10)
    if bucket.error is not None:
        raise bucket.error
    return True


def put_other(part: RedisWriter, content: dict[str, int]) -> None:
    put(part, content)


@pytest.fixture
def writes() -> Iterator[WritesByMaster]:
    with ThreadPoolExecutor(4) as threads:  # which on a busy machine begin late
        yield WritesByMaster(threads, lambda part: cast("Any", part).master, wait_seconds=0.3)


@pytest.fixture
def buckets() -> Iterator[list[Bucket]]:
    """Two on one master, one on another."""
    made = [Bucket("first"), Bucket("first"), Bucket("second")]
    yield made
    for bucket in made:
        bucket.answers.set()


def to(*given: tuple[Bucket, dict[str, int]]) -> Any:
    return dict(given)


def test_writes_to_all_masters_are_confirmed(writes: WritesByMaster, buckets: list[Bucket]) -> None:
    one, two, three = buckets
    assert writes.write(put, to((one, {"a": 1}), (two, {"b": 1}), (three, {"c": 1})))
    assert [bucket.written for bucket in buckets] == [[{"a": 1}], [{"b": 1}], [{"c": 1}]]


def test_late_master_delays_no_other(writes: WritesByMaster, buckets: list[Bucket]) -> None:
    one, _, three = buckets
    three.answers.clear()
    for number in range(5):
        assert not writes.write(put, to((one, {"a": number}), (three, {"c": number, f"c{number}": number})))
    assert one.written == [{"a": number} for number in range(5)]
    assert three.written == [{"c": 0, "c0": 0}]
    three.answers.set()
    wait_until(lambda: len(three.written) == 2)
    assert three.written[1] == {"c": 4, "c1": 1, "c2": 2, "c3": 3, "c4": 4}
    wait_until(lambda: writes.write(put, to((three, {"c": 5}))))
    assert three.written[-1] == {"c": 5}


def test_two_late_writes_of_a_bucket_lose_nothing_that_follows(writes: WritesByMaster, buckets: list[Bucket]) -> None:
    """As two partitions of a refill: what follows the first one is not lost when the second one is late as well."""
    three = buckets[2]
    three.answers.clear()
    many = {f"m{number}": number for number in range(10_000)}
    longer = threading.Thread(target=writes.write, args=(put, to((three, many))))
    longer.start()
    wait_until(lambda: len(three.written) == 1)
    assert not writes.write(put, to((three, {"c": 1})))
    assert not writes.write(put, to((three, {"d": 1})))
    assert longer.is_alive()
    longer.join()
    three.answers.set()
    writes.wait_for_late()
    assert three.written == [many, {"c": 1}, {"d": 1}]


def test_write_of_many_items_is_waited_for_longer(writes: WritesByMaster, buckets: list[Bucket]) -> None:
    three = buckets[2]
    three.answers.clear()
    threading.Timer(0.5, three.answers.set).start()
    assert writes.write(put, to((three, {f"c{number}": number for number in range(5000)})))


def test_late_write_delays_none_of_another_kind(writes: WritesByMaster, buckets: list[Bucket]) -> None:
    three = buckets[2]
    three.answers.clear()
    assert not writes.write(put, to((three, {"c": 1})))
    assert not writes.write(put_other, to((three, {"c": 2})))
    assert three.written == [{"c": 1}, {"c": 2}]


def test_failed_bucket_lets_others_of_its_master_be_written(writes: WritesByMaster, buckets: list[Bucket]) -> None:
    one, two, three = buckets
    one.error = Unavailable("down")
    with pytest.raises(Unavailable, match="down"):
        writes.write(put, to((one, {"a": 1}), (two, {"b": 1}), (three, {"c": 1})))
    assert two.written == [{"b": 1}]
    wait_until(lambda: three.written == [{"c": 1}])


def test_error_of_late_write_is_raised_by_next(writes: WritesByMaster, buckets: list[Bucket]) -> None:
    one, _, three = buckets
    three.answers.clear()
    three.error = Unavailable("frozen")
    assert not writes.write(put, to((three, {"c": 1})))
    three.answers.set()
    writes.wait_for_late()
    with pytest.raises(Unavailable, match="frozen"):
        writes.write(put, to((one, {"a": 1})))
    assert writes.write(put, to((one, {"a": 2})))


def test_end_waits_for_late_writes(writes: WritesByMaster, buckets: list[Bucket]) -> None:
    three = buckets[2]
    three.answers.clear()
    for number in range(3):
        writes.write(put, to((three, {f"c{number}": number})))
    threading.Timer(0.5, three.answers.set).start()
    writes.wait_for_late()
    assert three.written == [{"c0": 0}, {"c1": 1, "c2": 2}]
