"""Logs: one sink, one record a line, as text for a person or as JSON for a machine. Logging never blocks.

The records of the standard library (uvicorn, psycopg, redis, asyncio, warnings) go to the same sink. What is logged can
contain text from an exchange or a client, so control characters are escaped: it can neither forge a line nor control a
terminal. A repeated fault is logged at a limited rate with the number of omitted records (`RateLimit`, `Outage`), so
that an outage of hours does not fill a disk.

A traceback is logged for unexpected exceptions. An expected one is a single line, unless the level is DEBUG.
"""

from marketflow.logs.outage import Outage
from marketflow.logs.rate_limit import RateLimit
from marketflow.logs.sink import flush, setup

__all__ = ["Outage", "RateLimit", "flush", "setup"]
