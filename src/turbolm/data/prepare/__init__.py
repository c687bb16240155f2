"""Text to token store: read sources, train or copy the tokenizer, tokenize in parallel, write shards."""
