"""`marketflow watch`: the newest prices of any running MarketFlow, as a table on a terminal or as lines in a pipe.

`stream_client` reads the stream and reconnects, `client_state` applies its events, and `table`, `screen` and `lines`
show the result. On a screen `keyboard` reads keys, which change the `view`, and `candle_table` shows candles.
"""

from marketflow.cli.watch.run_watch import Watch, url_of, watch

__all__ = ["Watch", "url_of", "watch"]
