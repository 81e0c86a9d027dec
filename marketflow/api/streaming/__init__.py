"""Prices as they change: one hub in each process, and any number of clients that look at what it knows."""
