"""Real venues over WebSocket: one module a venue, which holds only what differs; `websocket_feed` holds the rest.

A venue is added by a module with the members of `venue.Venue`, a line in `registry.VENUES`, and its frames in
tests/feeds/venues.
"""
