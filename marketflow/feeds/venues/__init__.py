"""Real venues over WebSocket: one module a venue, which holds only what differs; `websocket_feed` holds the rest.

A venue is added by a module with the members of `venue.Venue`, a module in `rest/` with its calls (`venue.RestCalls`),
a line in `registry.VENUES`, its frames in tests/feeds/venues, and its pages in tests/support/venue_pages.py.
"""
