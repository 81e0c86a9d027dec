"""Puts the processes together from the settings: the composition root, the engine, health."""
