"""Raw frames of feeds, recorded as received, and replayed as a simulated exchange."""
