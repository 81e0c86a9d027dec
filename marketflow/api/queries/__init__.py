"""Queries of the stores, and the parameters of requests."""
