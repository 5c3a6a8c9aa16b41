"""What the tests of data sets share: a machine without files and without a network."""

from dataclasses import replace
from urllib.error import URLError

import pytest
import sklearn.datasets

from zoo.tasks import cifar, idx


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """Hide every usual place of data sets and the network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(cifar.VARIABLE, raising=False)
    for name, source in idx.SOURCES.items():
        monkeypatch.delenv(source.variable, raising=False)
        monkeypatch.setitem(idx.SOURCES, name, replace(source, system=None))

    def fail(*args, **kwargs):
        raise URLError("no network here")

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fail)
    return tmp_path
