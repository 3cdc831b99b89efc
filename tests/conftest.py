"""What all tests share."""

from hypothesis import settings

settings.register_profile("timeless", deadline=None)  # no test depends on timing
settings.load_profile("timeless")
