"""Clients of a running MarketFlow, for programs that use its prices: `Client` and `AsyncClient`.

from marketflow.client import Client

with Client("http://127.0.0.1:8080") as market:
    print(market.latest("BTCUSDT").price)
    for price in market.prices(["BTCUSDT"]):
        print(price.exchange, price.price)
"""

from marketflow.client.api_queries import RequestFailed
from marketflow.client.async_client import AsyncClient
from marketflow.client.market_data import (
    AveragePrice,
    Candle,
    CandleList,
    ExtremePrice,
    LiveCandle,
    Price,
    ReferencePrice,
)
from marketflow.client.sync_client import Client

__all__ = [
    "AsyncClient",
    "AveragePrice",
    "Candle",
    "CandleList",
    "Client",
    "ExtremePrice",
    "LiveCandle",
    "Price",
    "ReferencePrice",
    "RequestFailed",
]
