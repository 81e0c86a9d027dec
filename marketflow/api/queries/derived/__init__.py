"""What is computed of candles: those without ticks, filled; statistics of 24 hours."""
