"""Settings of all tests."""

from __future__ import annotations

from hypothesis import settings

# The machine that runs them may be busy: how long an example takes says nothing about the code.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
