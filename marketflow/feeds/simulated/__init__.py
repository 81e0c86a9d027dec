"""Venues that are simulated: the generator behind the protocol of a real venue."""
