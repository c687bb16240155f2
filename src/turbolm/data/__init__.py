"""From source text to global batches: sources, token store, packing, order, collation and loading. Torch-free."""
