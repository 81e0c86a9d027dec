"""The cache in Redis: keys, codec, writer and readers."""
