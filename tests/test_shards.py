"""Shards: which series belong together to one ingest process."""

from marketflow.model import Mode, Series
from marketflow.settings.shards import LEAD, ShardMap

SYMBOLS = [f"SYM{number}" for number in range(100)]


def test_each_symbol_is_in_one_shard_in_both_modes() -> None:
    shards = ShardMap({"exchange1": 4, "exchange2": 1})
    assert shards.names == ("exchange1/1of4", "exchange1/2of4", "exchange1/3of4", "exchange1/4of4", "exchange2")
    parts = [shards.symbols("exchange1", {name}, SYMBOLS) for name in shards.names[:4]]
    assert all(parts)
    assert sorted(symbol for part in parts for symbol in part) == sorted(SYMBOLS)
    for name, part in zip(shards.names, parts, strict=False):
        assert {shards.of(Series(mode, "exchange1", symbol)) for mode in Mode for symbol in part} == {name}
    assert shards.of(Series(Mode.LIVE, "exchange2", "BTCUSDT")) == "exchange2"


def test_series_of_no_configured_exchange_belong_to_the_lead() -> None:
    shards = ShardMap({"exchange1": 1})
    gone = Series(Mode.LIVE, "exchange9", "BTCUSDT")
    assert shards.of(gone) == LEAD
    assert shards.joined(ShardMap({"exchange9": 1, "exchange1": 5})).of(gone) == "exchange9"
    assert (
        shards.joined(ShardMap({"exchange9": 1, "exchange1": 5})).of(gone._replace(exchange="exchange1")) == "exchange1"
    )
