"""The buckets of the keys: who has them on a Redis Cluster, what writes and reads them, and what they announce."""
