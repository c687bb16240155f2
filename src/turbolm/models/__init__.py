"""Hugging Face causal language models: building, initial weights, attention for packed rows, isolation checks."""
