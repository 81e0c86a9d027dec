"""How much of the last minutes Redis and the memory of the ingest process hold."""

RECENT_MS = 6 * 60_000
"""How far back slices are kept at least, so that the edge of a period can lie inside a minute."""

MINUTES_KEPT_MS = 24 * 60 * 60_000
"""How long the cache keeps closed minutes."""

SLICES_HELD = 250_000
"""How many slices a process holds, 70 to 100 MB; the whole window of fifty series at ten slices a second."""
