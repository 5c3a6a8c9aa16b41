"""Tasks, cut into their parts, that several rooms of the zoo are tested on."""

import pytest

from zoo.parts import split_task
from zoo.tasks import load_task


@pytest.fixture(scope="session")
def digits():
    return split_task(load_task("digits"), objective=400)


@pytest.fixture(scope="session")
def diabetes():
    return split_task(load_task("diabetes"), objective=80)
