"""Exchanges as Observables: over TCP, or generated."""
