"""Stopping in good order."""
