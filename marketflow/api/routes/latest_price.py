"""The newest price of a series, as it is served and streamed."""

from typing import Annotated

import msgspec
from msgspec import Meta

from marketflow.api.openapi.operation import Exchange, Symbol
from marketflow.api.rendering import Time

Price = Annotated[float, Meta(gt=0, examples=[67432.14])]


class LatestPrice(msgspec.Struct, frozen=True):
    """The newest tick by event time, whatever its age."""

    symbol: Symbol
    exchange: Annotated[Exchange, Meta(description="The exchange of the price.")]
    price: Price
    timestamp: Annotated[Time, Meta(description="Event time, by the clock of the exchange.")]
