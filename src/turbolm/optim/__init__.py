"""Optimizers: parameter groups and construction."""
