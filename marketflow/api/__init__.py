"""The HTTP API: routes by subject, each a thin layer over `answers`; see `application` for the whole."""
