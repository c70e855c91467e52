"""Property tests find the same cases in every run, and take the time they need on a busy machine."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("shoal", deadline=None, derandomize=True, database=None)
settings.load_profile("shoal")
