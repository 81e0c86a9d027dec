"""`marketflow watch`: the newest prices of any running MarketFlow, in a terminal or line by line.

What comes from the server and what becomes of the connection are messages of one kind (`messages`, read by `stream`);
a `market` is what they add up to, and `table`, `screen` and `lines` show it.
"""

from marketflow.cli.watch.watcher import Watch, url_of, watch

__all__ = ["Watch", "url_of", "watch"]
