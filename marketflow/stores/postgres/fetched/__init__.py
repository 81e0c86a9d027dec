"""Minutes that are fetched from venues, beside those of the pipeline."""
