"""Hugging Face causal language models: building, initial weights, attention for packed sequences, isolation checks."""
