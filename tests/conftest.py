"""Settings of all tests."""

from hypothesis import settings

settings.register_profile("tightrope", deadline=None)  # tests assert no times; a busy machine is no failure
settings.load_profile("tightrope")
