"""Alerts over HTTP: rules, events, and the stream of events."""
