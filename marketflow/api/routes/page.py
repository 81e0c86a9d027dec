"""The page at /: the market as it moves, for people. It is made of the other operations, by the browser."""

from marketflow.api.openapi.operation import Operation, Tag
from marketflow.api.routes.static_files import PAGE, page

_MARKET = Tag("market", "The market, to look at.")


def market_operations() -> list[Operation]:
    """The operations of this module."""
    market = Operation(
        id="market",
        path="/",
        endpoint=page("market/index.html"),
        tag=_MARKET,
        summary="A page that shows the market as it moves",
        description="Prices, candles, and how the feeds do. It needs nothing from the internet.",
        answer=PAGE,
    )
    return [market]
