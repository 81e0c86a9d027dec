"""The page at /: live prices and candles, by the other operations of the API."""

from marketflow.api.openapi.operation import Operation, Tag
from marketflow.api.routes.static_files import PAGE, page

_MARKET = Tag("market", "The page with live prices and candles.")


def market_operations() -> list[Operation]:
    """The operations of this module."""
    market = Operation(
        id="market",
        path="/",
        endpoint=page("market/index.html"),
        tag=_MARKET,
        summary="Page with live prices and candles",
        description="Prices, candles, and health of the feeds. It works without internet access.",
        answer=PAGE,
    )
    return [market]
