"""A trade counts once, whenever and however often the venue sends it, and one that does not come is missing."""

import pytest

from marketflow.feeds.decoder import TradeLine
from marketflow.feeds.venues.trade_ids import EPOCH_TRADES, GRACE_SECONDS, MOST_GAPS, MOST_TEXTS, MissingIds, TradeIds


class Time:
    """Seconds that pass when the test says so; the clock shows 10 s more than they are."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def ids(self) -> TradeIds:
        return TradeIds(monotonic=lambda: self.seconds, clock=lambda: int((10 + self.seconds) * 1e9))


@pytest.fixture
def time() -> Time:
    return Time()


def counted(ids: TradeIds, *trades: int | str | tuple[int, ...], symbol: str = "A") -> list[bool]:
    """Whether each trade counts: its id, its time (1000 if not given), and how many it stands for (1)."""
    whole = [each if isinstance(each, tuple) else (each, 1000) for each in trades]
    return [ids.is_new(symbol, *each) for each in whole]


def new_ids(ids: TradeIds, *numbers: int) -> list[object]:
    """Which count, all at once."""
    return [each.id for each in ids.new_of("A", [TradeLine("A", 1.0, 1000, 1.0, "buy", number) for number in numbers])]


def missing(ids: TradeIds, time: Time) -> list[tuple[int, int]]:
    time.seconds += GRACE_SECONDS
    return [(each.after_id, each.before_id) for each in ids.missing()]


def test_repeated_trade_counts_once(time: Time) -> None:
    ids = time.ids()
    assert counted(ids, 7, 7, 7, 8, 7) == [True, False, False, True, False]
    assert ids.doubles == 3
    time.seconds += 40 * 60
    assert counted(ids, 7) == [False]
    assert ids.doubles_by_symbol() == {"A": 4}


def test_trades_out_of_order_count(time: Time) -> None:
    ids = time.ids()
    assert counted(ids, 9, 7, 8, 7) == [True, True, True, False]
    assert ids.late == 2


def test_batch_is_the_same_as_one_trade_at_a_time() -> None:
    ids = TradeIds()
    assert new_ids(ids, 1, 2, 3) == [1, 2, 3]
    assert new_ids(ids, 4, 5, 5, 9, 7, 2) == [4, 5, 7, 9]
    assert new_ids(ids, 9, 10, 8, 6, 6) == [6, 8, 10]
    assert new_ids(ids, 11, 12) == [11, 12]
    assert new_ids(ids, 11, 12, 13) == [13]
    assert ids.doubles == 2 + 2 + 2


def test_snapshot_replayed_after_a_reconnect_adds_only_the_new() -> None:
    ids = TradeIds()
    new_ids(ids, *range(1, 51))
    assert new_ids(ids, *range(31, 53)) == [51, 52]


def test_memory_is_bounded_for_many_symbols_with_gaps() -> None:
    ids = TradeIds(reports_missing=False)
    for symbol in range(500):
        for first in range(1, 20_000, 40):  # 20 trades, then a gap of 20
            assert all(counted(ids, *range(first, first + 20), symbol=str(symbol)))
    assert len(ids._symbols) == 500
    assert all(len(each.gaps) <= MOST_GAPS for each in ids._symbols.values())


def test_symbols_have_ids_of_their_own(time: Time) -> None:
    ids = time.ids()
    assert counted(ids, 1) + counted(ids, 1, symbol="B") == [True, True]


def test_ids_left_out_are_missing_after_the_grace(time: Time) -> None:
    ids = time.ids()
    counted(ids, (10, 2000), (14, 4000))
    assert ids.missing() == []
    time.seconds = GRACE_SECONDS
    assert ids.missing() == [MissingIds("A", 10, 14, 2000, 4000)]
    assert ids.missing() == []


def test_late_trades_within_the_grace_leave_no_hole(time: Time) -> None:
    ids = time.ids()
    assert counted(ids, 10, 14, 12, 11, 13) == [True] * 5
    assert missing(ids, time) == []


def test_late_trades_divide_a_hole(time: Time) -> None:
    ids = time.ids()
    counted(ids, 10, 16, 13)
    assert missing(ids, time) == [(10, 13), (13, 16)]


def test_trade_counts_even_long_after_its_hole_was_found(time: Time) -> None:
    ids = time.ids()
    counted(ids, 10, 14)
    assert missing(ids, time) == [(10, 14)]
    assert counted(ids, 12, 12) == [True, False]
    assert missing(ids, time) == []


def test_first_trade_of_a_listing_is_no_hole(time: Time) -> None:
    ids = time.ids()
    assert counted(ids, 1, 2) == [True, True]
    assert missing(ids, time) == []
    counted(ids, 5_000_000, symbol="B")
    assert missing(ids, time) == []


def test_report_of_several_trades_covers_their_ids(time: Time) -> None:
    ids = time.ids()
    assert counted(ids, (120, 1000), (123, 1000, 3), (127, 1000, 1)) == [True] * 3
    assert missing(ids, time) == [(123, 127)]
    assert counted(ids, (122, 1000), (126, 1000, 3), (127, 1000)) == [False, True, False]


def test_newest_id_of_a_heartbeat_proves_that_nothing_is_missing(time: Time) -> None:
    ids = time.ids()
    counted(ids, 5)
    assert ids.has("A", 5)
    assert not ids.has("A", 6)
    assert not ids.has("B", 1)


def test_id_named_by_a_heartbeat_is_missing_after_the_grace(time: Time) -> None:
    ids = time.ids()
    ids.note_newest("A", 3)
    counted(ids, (5, 9000))
    ids.note_newest("A", 7)
    time.seconds = 1.0
    ids.note_newest("A", 8)
    assert missing(ids, time) == []
    ids.note_newest("A", 8)
    assert ids.missing() == [MissingIds("A", 5, 8, 9000, 13_000)]
    assert counted(ids, (8, 9100), (7, 9050)) == [True, True]
    assert missing(ids, time) == []


def test_heartbeat_that_overtakes_its_trade_finds_no_hole(time: Time) -> None:
    ids = time.ids()
    counted(ids, 5)
    ids.note_newest("A", 6)
    counted(ids, 6)
    time.seconds = GRACE_SECONDS
    ids.note_newest("A", 6)
    assert missing(ids, time) == []


def test_ids_that_begin_anew_are_taken_after_some_trades(time: Time) -> None:
    ids = time.ids()
    counted(ids, *((100_000 + number, number) for number in range(10)))
    again = counted(ids, *((number, 1_000 + number) for number in range(1, 30)))
    assert again == [False] * (EPOCH_TRADES - 1) + [True] * (30 - EPOCH_TRADES)
    assert ids.epochs == 1
    assert ids.missing() == [MissingIds("A", 0, EPOCH_TRADES, 1_001, 1_000 + EPOCH_TRADES)]


def test_lower_ids_apart_from_each_other_begin_no_epoch(time: Time) -> None:
    ids = time.ids()
    counted(ids, (100_000, 1))
    for number in range(2 * EPOCH_TRADES):
        assert counted(ids, (5, 10_000 + number), (100_001 + number, 10 + number)) == [False, True]
    assert ids.epochs == 0


def test_trades_that_an_earlier_run_counted_are_doubles(time: Time) -> None:
    ids = time.ids()
    ids.count_after({"A": 2000})
    assert counted(ids, (70, 1990), (71, 2000), (72, 2001), (71, 2000), (73, 2002)) == [False, False, True, False, True]
    assert missing(ids, time) == []


def test_nothing_is_complete_beyond_a_hole_that_was_not_read(time: Time) -> None:
    ids = time.ids()
    assert ids.complete_until("A") is None
    counted(ids, (10, 2000), (14, 4000), (15, 5000))
    assert ids.complete_until("A") == 2000
    assert missing(ids, time) == [(10, 14)]
    assert ids.complete_until("A") == 5000


@pytest.mark.parametrize("step", [1, 10**6])
def test_memory_of_a_symbol_is_bounded(time: Time, step: int) -> None:
    ids = time.ids()
    assert all(counted(ids, *((number * step, number) for number in range(1, 20 * MOST_GAPS))))
    assert len(ids._symbols["A"].gaps) <= MOST_GAPS
    assert counted(ids, (3 * step, 3)) == [False]
    assert len(ids.missing()) == (0 if step == 1 else 19 * MOST_GAPS - 2)


def test_missing_ids_that_nobody_reads_are_not_kept() -> None:
    ids = TradeIds(reports_missing=False)
    assert all(counted(ids, *((number * 2, number) for number in range(1, 20 * MOST_GAPS))))
    assert not ids._missing


def test_ids_above_63_bits_are_told_apart(time: Time) -> None:
    ids = time.ids()
    big = 1931506477151671992419320033
    assert counted(ids, big, big + 1, big, str(big + 2), str(big + 1)) == [True, True, False, True, False]
    assert missing(ids, time) == []


def test_ids_that_are_texts_count_once_in_bounded_memory(time: Time) -> None:
    ids = time.ids()
    assert counted(ids, "a-1", "a-2", "a-1", "9" * 5000, "9" * 5000) == [True, True, False, True, False]
    assert all(counted(ids, *(f"b-{number}" for number in range(3 * MOST_TEXTS))))
    assert len(ids._texts["A"][0]) == len(ids._texts["A"][1]) == MOST_TEXTS


def test_one_newer_trade_begins_an_epoch_where_it_could_not_be_had_again() -> None:
    ids = TradeIds(reports_missing=False, epoch_trades=1)
    assert counted(ids, (100, 1000), (1, 2000), (1, 2000), (2, 2001)) == [True, True, False, True]
    ids = TradeIds(reports_missing=False, epoch_trades=1)
    again = [ids.is_new("A", 7, at, is_dated=False) for at in range(EPOCH_TRADES)]
    assert again == [True, *[False] * (EPOCH_TRADES - 1)]
