"""What a reload of the settings says and changes."""

import msgspec

from marketflow.alerts.alert_model import PriceRule, configured_id
from marketflow.settings import ExchangeSettings, HttpSettings, Settings
from marketflow.settings.reloading import Names, changes_between, with_changes

A = ExchangeSettings(name="a", address="127.0.0.1:1")
B = ExchangeSettings(name="b", address="127.0.0.1:2")
C = ExchangeSettings(name="c", venue="binance", symbols={"BTCUSDT": ""})
NOTHING = Names((), (), ())
BEFORE = Settings(symbols=("BTCUSDT", "ETHUSDT"), exchanges=(A, B, C))


def test_same_settings_change_nothing() -> None:
    changes = changes_between(BEFORE, BEFORE)
    assert changes.unchanged == Names(("a", "b", "c"), ("BTCUSDT", "ETHUSDT"), ())
    assert (changes.added, changes.removed, changes.changed, changes.needs_restart) == (NOTHING, NOTHING, NOTHING, ())


def test_added_symbol_changes_only_exchanges_that_take_all_symbols() -> None:
    changes = changes_between(BEFORE, msgspec.structs.replace(BEFORE, symbols=("BTCUSDT", "XRPUSDT", "ETHUSDT")))
    assert changes.added == Names((), ("XRPUSDT",), ())
    assert changes.changed == Names(("a", "b"), (), ())
    assert changes.unchanged == Names(("c",), ("BTCUSDT", "ETHUSDT"), ())


def test_alerts_are_compared_by_name_or_content() -> None:
    crash, rise = PriceRule(name="crash", symbol="BTCUSDT", level=1.0), PriceRule(symbol="BTCUSDT", level=2.0)
    before = msgspec.structs.replace(BEFORE, alerts=(crash, rise))
    deeper = msgspec.structs.replace(crash, level=0.5)
    changes = changes_between(before, msgspec.structs.replace(before, alerts=(deeper,)))
    assert (changes.changed.alerts, changes.added.alerts) == (("crash",), ())
    assert changes.removed.alerts == (configured_id(rise),)
    assert with_changes(BEFORE, before).alerts == (crash, rise)


def test_exchanges_are_added_removed_and_moved() -> None:
    moved = msgspec.structs.replace(B, address="127.0.0.1:9")
    added = ExchangeSettings(name="d", address="127.0.0.1:3")
    changes = changes_between(BEFORE, msgspec.structs.replace(BEFORE, exchanges=(added, moved, C)))
    assert (changes.added.exchanges, changes.removed.exchanges) == (("d",), ("a",))
    assert (changes.changed.exchanges, changes.unchanged.exchanges) == (("b",), ("c",))


def test_other_keys_need_a_restart_and_keep_their_values() -> None:
    after = msgspec.structs.replace(BEFORE, exchanges=(A,), http=HttpSettings(port=9), history="48h")
    assert changes_between(BEFORE, after).needs_restart == ("history", "http.port")
    effective = with_changes(BEFORE, after)
    assert effective == msgspec.structs.replace(BEFORE, exchanges=(A,))
    assert changes_between(effective, after).needs_restart == ("history", "http.port")
