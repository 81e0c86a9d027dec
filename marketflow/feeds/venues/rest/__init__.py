"""What each venue gives by REST: one module a venue, which holds its requests and the parsers of its answers."""
