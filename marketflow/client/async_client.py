"""The client for programs with an event loop."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from datetime import datetime
from typing import Self, TypeVar

import httpx
from websockets.asyncio.client import ClientConnection, connect

from marketflow.client import api_queries
from marketflow.client.api_queries import Query, RequestFailed, pause_before_retry
from marketflow.client.market_data import AveragePrice, CandleList, ExtremePrice, LiveCandle, Price, ReferencePrice
from marketflow.client.price_stream import LOST, SILENCE_SECONDS, CandleFollower, PriceFollower

_Answer = TypeVar("_Answer")


class AsyncClient:
    """Queries a running MarketFlow over HTTP, and follows its prices over a WebSocket.

    All methods raise `RequestFailed` where the server refuses, and `httpx.TransportError` where it cannot be reached.
    Where it is busy or not ready (429, 503) a query is repeated, after the pause that it asks for.

    Args:
        base_url: where it answers.
        timeout: seconds that a query may take.
        retries: how often a query is repeated at most.
    """

    def __init__(self, base_url: str = "http://127.0.0.1:8080", timeout: float = 10.0, retries: int = 2) -> None:
        self._base_url = base_url
        self._retries = retries
        self._http = httpx.AsyncClient(base_url=base_url, timeout=timeout)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close its connections."""
        await self._http.aclose()

    async def latest(self, symbol: str, exchange: str | None = None) -> Price:
        """Return the newest price of a symbol, on one exchange or over all."""
        return await self._get(api_queries.latest(symbol, exchange))

    async def reference(self, symbol: str) -> ReferencePrice:
        """Return the median of the newest prices of all exchanges."""
        return await self._get(api_queries.reference(symbol))

    async def highest(self, symbol: str, exchange: str | None = None, period: str | None = None) -> ExtremePrice:
        """Return the highest price of a period such as `1m30s`; of all on record without one."""
        return await self._get(api_queries.extreme("highest", symbol, exchange, period))

    async def lowest(self, symbol: str, exchange: str | None = None, period: str | None = None) -> ExtremePrice:
        """Return the lowest price of a period such as `1m30s`; of all on record without one."""
        return await self._get(api_queries.extreme("lowest", symbol, exchange, period))

    async def average(self, symbol: str, exchange: str | None = None, period: str | None = None) -> AveragePrice:
        """Return the mean of all ticks of a period such as `1m30s`; of all on record without one."""
        return await self._get(api_queries.average(symbol, exchange, period))

    async def candles(
        self,
        symbol: str,
        exchange: str | None = None,
        interval: str = "1m",
        since: datetime | str | None = None,
        until: datetime | str | None = None,
        limit: int | None = None,
    ) -> CandleList:
        """Return candles, the oldest first.

        Args:
            symbol: whose.
            exchange: on which exchange; `reference` for the median over all, None for all merged.
            interval: length of a candle, such as `1h`.
            since: they open at this time or later, an aware datetime or a text such as `-24h`; None: the last ones.
            until: they open before this time; None: now.
            limit: how many at most; the server's default is 500.
        """
        return CandleList(
            (await self._get(api_queries.candles(symbol, exchange, interval, since, until, limit))).candles
        )

    async def prices(self, symbols: Iterable[str] = (), exchanges: Iterable[str] = ()) -> AsyncIterator[Price]:
        """Yield the newest price of each series, and each newer one as it comes, without end.

        A connection that is lost is made again; the newest price of each series is then yielded if it is another one. A
        consumer that is slow gets the newest price of each series, not all of them.

        Args:
            symbols: whose; all by default.
            exchanges: on which exchanges; all by default.
        """
        url = api_queries.stream_url(self._base_url, symbols, exchanges)
        follower = PriceFollower()
        while True:
            try:
                async with connect(url) as connection:
                    while True:
                        for price in follower.new_prices(await self._next(connection)):
                            yield price
            except LOST as error:
                await asyncio.sleep(follower.pause(error))

    async def stream_candles(
        self, symbols: Iterable[str] = (), exchanges: Iterable[str] = (), intervals: Iterable[str] = ("1m",)
    ) -> AsyncIterator[LiveCandle]:
        """Yield each candle that has changed, the running ones first, without end.

        A closed candle comes once, and again only if it was corrected. A connection that is lost is made again, and
        the candles that closed meanwhile are queried (the last 1,000 of each series). A consumer that is slow gets the
        newest version of each candle.

        Args:
            symbols: whose; all by default.
            exchanges: on which exchanges; `reference` is the median over all; all of them merged by default.
            intervals: lengths of candles, such as `1h`.
        """
        url = api_queries.stream_url(self._base_url, symbols, exchanges, intervals)
        follower = CandleFollower()
        while True:
            try:
                async with connect(url) as connection:
                    while True:
                        gaps, candles = follower.take(await self._next(connection))
                        for gap in gaps:
                            answered = await self.candles(*gap, api_queries.MOST_CANDLES)
                            for candle in follower.filled(gap, answered):
                                yield candle
                        for candle in follower.fresh(candles):
                            yield candle
            except LOST as error:
                await asyncio.sleep(follower.pause(error))

    async def _next(self, connection: ClientConnection) -> str | bytes:
        async with asyncio.timeout(SILENCE_SECONDS):
            return await connection.recv()

    async def _get(self, query: Query[_Answer]) -> _Answer:
        for attempt in range(self._retries + 1):
            try:
                return api_queries.decode(query, await self._http.get(query.path, params=query.parameters))
            except RequestFailed as error:
                if attempt == self._retries or (seconds := pause_before_retry(error)) is None:
                    raise
                await asyncio.sleep(seconds)
        raise AssertionError("the last attempt returns or raises")
