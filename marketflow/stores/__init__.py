"""Redis, PostgreSQL, and the embedded servers of both."""
