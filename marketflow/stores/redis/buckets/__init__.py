"""The buckets of the keys: their masters on a Redis Cluster, their writers and readers, and their announcements."""
