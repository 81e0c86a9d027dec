"""What each venue gives by REST: one module a venue, which holds its calls and the parsers of its replies."""
