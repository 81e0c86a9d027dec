"""Division of the CPU of a process among its feeds, and between them and the event loop."""
