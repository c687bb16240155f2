"""Evaluate trained models with lm-evaluation-harness."""
