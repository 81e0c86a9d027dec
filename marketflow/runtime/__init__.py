"""Builds the processes from the settings: the composition root, the engine, health."""
