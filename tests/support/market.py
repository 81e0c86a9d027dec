"""A minute and series that tests of several packages use."""

from marketflow.model import Mode, Series

MINUTE = 1_763_690_040_000
"""The start of a minute, Unix ms: 2025-11-21T01:54:00Z."""

BTC = Series(Mode.LIVE, "exchange1", "BTCUSDT")
ETH = Series(Mode.LIVE, "exchange2", "ETHUSDT")
