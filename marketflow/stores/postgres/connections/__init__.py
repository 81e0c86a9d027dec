"""Connections to PostgreSQL, and the settings of their sessions."""
