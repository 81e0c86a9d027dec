"""The venues that there are, by the name that settings and the command line use."""

from marketflow.feeds.venues.binance import Binance
from marketflow.feeds.venues.bybit import Bybit
from marketflow.feeds.venues.coinbase import Coinbase
from marketflow.feeds.venues.kraken import Kraken
from marketflow.feeds.venues.okx import Okx
from marketflow.feeds.venues.venue import Venue

VENUES: dict[str, Venue] = {venue.name: venue for venue in (Binance(), Coinbase(), Kraken(), Okx(), Bybit())}
