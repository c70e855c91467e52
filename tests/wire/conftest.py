"""Property tests run on slow and busy machines: an example may take its time."""

from hypothesis import settings

settings.register_profile("shoal", deadline=None)
settings.load_profile("shoal")
