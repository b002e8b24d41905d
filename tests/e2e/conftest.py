"""The run that the end-to-end tests look at."""

from __future__ import annotations

import pytest

from checkout import Checkout, smoke_run


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A finished run of the smoke configuration. Leave it as it is."""
    return smoke_run(tmp_path_factory.getbasetemp())
