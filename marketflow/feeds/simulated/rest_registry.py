"""What answers by REST for each venue."""

from marketflow.feeds.simulated.binance_rest import BinanceRest
from marketflow.feeds.simulated.bybit_rest import BybitRest
from marketflow.feeds.simulated.coinbase_rest import CoinbaseRest
from marketflow.feeds.simulated.kraken_rest import KrakenRest
from marketflow.feeds.simulated.okx_rest import OkxRest
from marketflow.feeds.simulated.rest_side import VenueRest

RESTS: dict[str, type[VenueRest]] = {
    "binance": BinanceRest,
    "coinbase": CoinbaseRest,
    "kraken": KrakenRest,
    "okx": OkxRest,
    "bybit": BybitRest,
}
