import socket
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch

from metamerge.errors import ZooError
from zoo.tasks import load_task
from zoo.tasks.housing import FEATURES, ROWS


def fetched(monkeypatch, fetch):
    monkeypatch.setattr("sklearn.datasets.fetch_california_housing", fetch)


def test_the_generated_set_has_the_form_of_the_census_and_says_what_it_is():
    task = load_task("generated-housing")
    assert task.inputs.shape == (20_640, 8)
    assert task.targets.shape == (20_640, 1)
    assert task.regression
    assert task.standardise
    assert "generated" in task.notes[0]
    assert float(task.targets.min()) >= 0.15
    assert float(task.targets.max()) == 5.0
    assert 0.01 < float((task.targets == 5).float().mean()) < 0.1  # the census: 5 %
    assert torch.equal(task.inputs, load_task("generated-housing").inputs)


def test_what_was_fetched_once_is_read_without_a_network(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    bunch = SimpleNamespace(data=rng.normal(size=(ROWS, FEATURES)), target=rng.uniform(size=ROWS))
    fetched(monkeypatch, lambda data_home, **retries: bunch)
    task = load_task("california-housing", tmp_path)
    assert torch.equal(task.inputs, torch.from_numpy(bunch.data).float())
    fetched(monkeypatch, None)
    assert load_task("california-housing", tmp_path).digest == task.digest


def test_without_a_network_the_error_names_the_generated_set(tmp_path, monkeypatch):
    def unknown(*address, **settings):
        raise socket.gaierror("no such host")

    monkeypatch.setattr("socket.getaddrinfo", unknown)
    with pytest.raises(ZooError, match="generated-housing") as refused:
        load_task("california-housing", tmp_path)
    assert isinstance(refused.value.__cause__, URLError)  # scikit-learn did try
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_shape_is_refused(tmp_path):
    np.savez(tmp_path / "housing.npz", inputs=np.zeros((5, 8)), targets=np.zeros(5))
    with pytest.raises(ZooError, match="Remove"):
        load_task("california-housing", tmp_path)
