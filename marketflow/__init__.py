"""MarketFlow: real-time market data, from exchange sockets to Redis, PostgreSQL and HTTP."""

__version__ = "0.1.0"
