"""Settings of all tests: they assert no times, and a busy machine is no failure."""

from collections.abc import Iterator

import pytest
from hypothesis import settings

from tightrope.estimators.measured import fitted

settings.register_profile("tightrope", deadline=None)
settings.load_profile("tightrope")


@pytest.fixture(scope="session", autouse=True)
def _however_noisy() -> Iterator[None]:
    """Tables are filled on any machine; users' are not (`fitted.quiet`)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitted, "MOST_NOISE", float("inf"))
        yield
