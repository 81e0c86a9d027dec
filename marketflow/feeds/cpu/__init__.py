"""Division of the CPU of a process between its feeds and the event loop."""
