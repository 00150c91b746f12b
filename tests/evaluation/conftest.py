"""A lone process writes its rank and port to the environment; no other test's programs may inherit them."""

import os

import pytest


@pytest.fixture(autouse=True)
def _give_the_environment_back():
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
