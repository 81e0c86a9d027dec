"""One WebSocket connection to a venue: its frames, its subscriptions, and the candles of its trades."""
