"""The stream of prices and candles: one broadcaster per process, subscribers over server-sent events and WebSockets."""
