"""Fixtures of the workflow tests: runs that are made once and looked at often."""

from __future__ import annotations

import pytest

from checkout import Checkout, smoke_config, smoke_run


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A finished run of the smoke configuration. Leave it as it is."""
    return smoke_run(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A working copy in which nothing has run. For dry runs only."""
    return Checkout.make(tmp_path_factory.mktemp("empty") / "atlas")


@pytest.fixture
def config() -> dict:
    """The smoke configuration, to be changed."""
    return smoke_config()
