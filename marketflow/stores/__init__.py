"""The stores: interfaces, and their implementations for Redis and PostgreSQL."""
