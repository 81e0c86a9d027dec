"""The newest price of a series, as it is answered and streamed."""

from typing import Annotated

import msgspec
from msgspec import Meta

from marketflow.api.openapi.operation import Exchange, Symbol
from marketflow.api.rendering import Time

Price = Annotated[float, Meta(gt=0, examples=[67432.14])]


class LatestPrice(msgspec.Struct, frozen=True):
    """The newest tick by event time, however old it is."""

    symbol: Symbol
    exchange: Annotated[Exchange, Meta(description="Where the price was paid.")]
    price: Price
    timestamp: Annotated[Time, Meta(description="When, by the clock of the exchange.")]
