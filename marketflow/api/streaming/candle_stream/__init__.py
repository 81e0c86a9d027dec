"""Candles in the stream: which ones a subscriber chooses, their newest versions, and how these are made."""
