"""What the frames of each venue come to; shapes as the venues send them."""

from collections.abc import Callable

import msgspec
import pytest

from marketflow.feeds.simulated.dialects import DIALECTS, parsed
from marketflow.feeds.simulated.rest_registry import RESTS
from marketflow.feeds.simulated.trade_book import TradeBook
from marketflow.feeds.venues.binance import Binance
from marketflow.feeds.venues.kraken import Kraken
from marketflow.feeds.venues.okx import Okx
from marketflow.feeds.venues.registry import VENUES
from marketflow.feeds.venues.venue import (
    Acknowledged,
    Alive,
    Closing,
    Event,
    Refused,
    Rejected,
    Status,
    Trade,
)
from marketflow.settings.schema import VENUES as CONFIGURABLE

AT = 1_790_667_453_786  # 2026-09-29T07:37:33.786Z


def test_every_venue_can_be_configured_and_simulated() -> None:
    assert VENUES.keys() == set(CONFIGURABLE) == DIALECTS.keys()


@pytest.mark.parametrize("venue", VENUES)
def test_trade_of_the_simulated_venue_is_decoded_exactly(venue: str) -> None:
    dialect = DIALECTS[venue]
    trade = Trade(dialect.native("BTCUSDT"), 84034.9, 0.00044625, AT, 109473031, "buy")
    (decoded,) = VENUES[venue].decode(dialect.trade(trade).encode())
    assert isinstance(decoded, Trade)
    assert (decoded.symbol, decoded.price, decoded.quantity, decoded.side) == (trade.symbol, 84034.9, 0.00044625, "buy")
    assert (decoded.at, decoded.count) == (AT, 1)
    assert decoded.id is not None
    assert decoded.id % 10**9 == 109473031


@pytest.mark.parametrize("venue", VENUES)
def test_instruments_give_the_names_of_the_venue(venue: str) -> None:
    listed = [DIALECTS[venue].listed(symbol) for symbol in ("BTCUSDT", "BTCUSD", "DOGEUSDT")]
    body = RESTS[venue](listed, TradeBook([])).answer(VENUES[venue].instruments_path).body
    found = {f"{each.base}{each.quote}": each.symbol for each in VENUES[venue].instruments(body)}
    assert found == {ours: DIALECTS[venue].native(ours) for ours in ("BTCUSDT", "BTCUSD", "DOGEUSDT")}


@pytest.mark.parametrize("venue", VENUES)
def test_subscriptions_name_every_symbol_once(venue: str) -> None:
    symbols = [DIALECTS[venue].native(f"S{number}USDT") for number in range(250)]
    frames = VENUES[venue].subscribe(symbols)
    assert [each for frame in frames for each in DIALECTS[venue].requested(parsed(frame))] == symbols


def test_bybit_takes_ten_symbols_a_frame() -> None:
    frames = VENUES["bybit"].subscribe([f"S{number}USDT" for number in range(25)])
    assert [len(parsed(frame)["args"]) for frame in frames] == [10, 10, 5]


HOSTILE = [b"", b"[]", b"42", b"null", b'"x"', b"{", b"\xff\xfe", b"\x00" * 100, b'{"e":{}}', b"[" * 5000, b"{}"]


@pytest.mark.parametrize("frame", HOSTILE, ids=lambda frame: repr(frame[:8]))
@pytest.mark.parametrize("venue", VENUES)
def test_hostile_frame_costs_itself_alone(venue: str, frame: bytes) -> None:
    (event,) = VENUES[venue].decode(frame)
    assert isinstance(event, Rejected)


def test_bad_trade_of_an_array_leaves_the_others() -> None:
    def row(price: str) -> str:
        return (
            f'{{"symbol":"BTC/USD","side":"buy","price":{price},"qty":1e-8,"trade_id":1,'
            '"timestamp":"2026-09-29T07:37:33.786450Z"}'
        )

    prices = ("84035.0", '"NaN"', "null", '""', '"1e-8"', "1E+3", "[]", '"Infinity"')
    frame = '{"channel":"trade","type":"update","data":[' + ",".join(map(row, prices)) + "]}"
    events = Kraken().decode(frame.encode())
    assert [each.price for each in events if isinstance(each, Trade)] == [84035.0, 1e-8, 1000.0]
    reasons = [each.reason for each in events if isinstance(each, Rejected)]
    assert reasons == ["bad_price", "malformed", "bad_price", "malformed", "bad_price"]


def decoded(venue: str, text: str) -> list[Event]:
    return VENUES[venue].decode(text.encode())


def test_binance_frames_raw_and_wrapped() -> None:
    trade = (
        '{"e":"trade","E":1790649901913,"s":"BTCUSDT","t":6720857582,"p":"83034.29000000","q":"0.00062000",'
        '"T":1790649901913,"m":true,"M":true}'
    )
    expected = Trade("BTCUSDT", 83034.29, 0.00062, 1790649901913, 6720857582, "sell")
    assert decoded("binance", trade) == [expected]
    assert decoded("binance", f'{{"stream":"btcusdt@trade","data":{trade}}}') == [expected]
    assert decoded("binance", '{"result":null,"id":1}') == [Acknowledged((), 1)]
    notice = '{"e":"serverShutdown","E":1770123456789}'
    assert isinstance(decoded("binance", notice)[0], Closing)
    assert isinstance(decoded("binance", f'{{"stream":"!serverShutdown","data":{notice}}}')[0], Closing)
    assert decoded("binance", '{"code":2,"msg":"Invalid request","id":null}') == [Refused("Invalid request")]


def test_coinbase_side_is_that_of_the_taker() -> None:
    match = (
        '{"type":"last_match","trade_id":7,"maker_order_id":"a","taker_order_id":"b","side":"buy","size":"0.00000035",'
        '"price":"77572.86","product_id":"BTC-USD","sequence":135437581270,"time":"2026-09-02T07:44:09.449472Z"}'
    )
    assert decoded("coinbase", match) == [Trade("BTC-USD", 77572.86, 3.5e-07, 1788335049449, 7, "sell")]


def test_coinbase_answers() -> None:
    beat = '{"type":"heartbeat","last_trade_id":%d,"product_id":"BTC-USD","sequence":1,"time":"2026-09-29T07:37:47Z"}'
    assert decoded("coinbase", beat % 9) == [Alive("BTC-USD", 9)]
    assert decoded("coinbase", beat % 0) == [Alive("BTC-USD")]
    error = '{"type":"error","message":"Failed to subscribe","reason":"X-USD is not a valid product"}'
    assert decoded("coinbase", error) == [Refused("X-USD is not a valid product", "X-USD")]
    ticker = '{"type":"ticker","product_id":"HBAR-USD","price":"0"}'
    assert decoded("coinbase", ticker) == [Alive()]
    channels = '[{"name":"heartbeat","product_ids":["A"]},{"name":"matches","product_ids":["B"],"account_ids":null}]'
    assert decoded("coinbase", f'{{"type":"subscriptions","channels":{channels}}}') == [Acknowledged(("B",))]


def test_kraken_answers() -> None:
    status = '{"channel":"status","type":"update","data":[{"system":"online","connection_id":12955725412101258142}]}'
    assert decoded("kraken", status) == [Status("")]
    for system in ("maintenance", "cancel_only", "post_only"):
        assert decoded("kraken", status.replace("online", system)) == [Status(system)]
    for bad in ('{"system":5}', "[]", "7"):
        frame = f'{{"channel":"status","data":[{bad}]}}'
        assert decoded("kraken", frame) == [Rejected("malformed", frame.encode())]
    assert decoded("kraken", '{"channel":"heartbeat"}') == [Alive()]
    error = '{"method":"subscribe","error":"Currency pair not supported XBT/USD","success":false}'
    assert decoded("kraken", error) == [Refused("Currency pair not supported XBT/USD", "XBT/USD")]
    assert decoded("kraken", '{"method":"subscribe","result":{"symbol":"BTC/USD"},"success":true}') == [
        Acknowledged(("BTC/USD",))
    ]


def test_okx_message_stands_for_several_trades() -> None:
    row = '{"instId":"BTC-USDT","tradeId":"123","px":"42219.9","sz":"5","side":"buy","ts":"1630048897897"%s}'
    frame = '{"arg":{"channel":"trades","instId":"BTC-USDT"},"data":[' + row + "]}"
    assert decoded("okx", frame % ',"count":"3"') == [Trade("BTC-USDT", 42219.9, 5.0, 1630048897897, 123, "buy", 3)]
    assert decoded("okx", frame % "") == [Trade("BTC-USDT", 42219.9, 5.0, 1630048897897, 123, "buy", 1)]
    assert decoded("okx", "pong") == [Alive()]
    assert decoded("okx", '{"event":"notice","code":"64008","msg":"soon closed"}') == [Closing("soon closed")]
    refusal = "Wrong URL or channel:trades,instId:NOPE-USDT doesn't exist. Please"
    assert decoded("okx", f'{{"event":"error","code":"60018","msg":"{refusal}"}}') == [
        Refused(f"60018: {refusal}", "NOPE-USDT")
    ]


def test_bybit_frame_of_several_trades_keeps_their_order() -> None:
    row = '{"T":1789875217840,"s":"BTCUSDT","S":"%s","v":"0.06","p":"80413.3","i":"2290000001211680%d","BT":false}'
    rows = ",".join([row % ("Sell", 903), row % ("Buy", 919)])
    events = decoded("bybit", f'{{"topic":"publicTrade.BTCUSDT","type":"snapshot","ts":1,"data":[{rows}]}}')
    assert [(each.id, each.side) for each in events if isinstance(each, Trade)] == [
        (2290000001211680903, "sell"),
        (2290000001211680919, "buy"),
    ]
    for pong in ('{"success":true,"ret_msg":"pong","op":"pong"}', '{"success":true,"ret_msg":"pong","op":"ping"}'):
        assert decoded("bybit", pong) == [Alive()]
    assert decoded("bybit", '{"success":false,"ret_msg":"Invalid topic: publicTrade.XY","op":"subscribe"}') == [
        Refused("Invalid topic: publicTrade.XY", "XY")
    ]


def test_error_in_an_answer_of_instruments_is_named() -> None:
    for venue, body in (
        (Binance(), b'{"code":-1121,"msg":"Invalid symbol."}'),
        (Kraken(), b'{"error":["EGeneral:Too many requests"]}'),
        (Okx(), b'{"code":"50011","msg":"Too Many Requests","data":[]}'),
        (VENUES["bybit"], b'{"retCode":10006,"retMsg":"Too many visits!","result":{}}'),
    ):
        with pytest.raises(Exception, match=r"(?i)invalid symbol|too many"):
            venue.instruments(body)


def binance_listing(status: str) -> object:
    return {"symbols": [{"symbol": "AUSDT", "baseAsset": "A", "quoteAsset": "USDT", "status": status}]}


def coinbase_listing(status: str) -> object:
    mode = {} if status in ("online", "delisted") else {status: True}
    product = {"id": "A-USDT", "base_currency": "A", "quote_currency": "USDT"}
    return [product | {"status": "delisted" if status == "delisted" else "online"} | mode]


def kraken_listing(status: str) -> object:
    return {"error": [], "result": {"AUSDT": {"wsname": "A/USDT", "altname": "AUSDT", "status": status}}}


def okx_listing(status: str) -> object:
    return {"code": "0", "data": [{"instId": "A-USDT", "baseCcy": "A", "quoteCcy": "USDT", "state": status}]}


def bybit_listing(status: str) -> object:
    row = {"symbol": "AUSDT", "baseCoin": "A", "quoteCoin": "USDT", "status": status}
    return {"retCode": 0, "result": {"list": [row]}}


STATUSES: dict[str, tuple[Callable[[str], object], list[str], list[str]]] = {
    "binance": (binance_listing, ["TRADING"], ["HALT", "BREAK", "END_OF_DAY", "CANCEL_ONLY"]),
    "coinbase": (
        coinbase_listing,
        ["online", "limit_only"],
        ["delisted", "trading_disabled", "cancel_only", "post_only"],
    ),
    "kraken": (
        kraken_listing,
        ["online", "limit_only", "reduce_only"],
        ["cancel_only", "post_only", "maintenance", "delisted"],
    ),
    "okx": (okx_listing, ["live"], ["suspend", "preopen", "test"]),
    "bybit": (bybit_listing, ["Trading"], ["PreLaunch", "Closed"]),
}
"""By venue: a list of one instrument, the states in which it trades, and those in which it does not."""


@pytest.mark.parametrize("venue", VENUES)
def test_instrument_is_halted_in_the_words_of_the_venue(venue: str) -> None:
    listing, trading, halted = STATUSES[venue]
    for status in trading + halted:
        (found,) = VENUES[venue].instruments(msgspec.json.encode(listing(status)))
        assert (found.base, found.quote, found.halt) == ("A", "USDT", status if status in halted else "")
