"""What comes by REST beside the live trades: all trades of a minute, and the venue's own candles."""
