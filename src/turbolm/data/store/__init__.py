"""The token store: memory-mapped shards and their manifest."""
