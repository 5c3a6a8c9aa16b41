"""Addresses of MLflow among checkpoints: what others have logged there, and errors that help."""

import sys
import time

import mlflow
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from metamerge import merge
from metamerge.checkpoints import read_checkpoints
from metamerge.errors import ConfigError, Unreadable, Unsafe


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A run of MLflow's own making: a file, an exported and a pickled network, a version."""
    folder = tmp_path_factory.mktemp("store")
    network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    network[0].weight.data = network[0].weight.data.bfloat16().float()
    save_file(network.state_dict(), folder / "weights.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        with mlflow.start_run() as run:
            mlflow.log_artifact(folder / "weights.safetensors", "files")
            example = torch.zeros(2, 4).numpy()
            asked = {"input_example": example, "pip_requirements": ["torch"]}
            mlflow.pytorch.log_model(network, name="m", registered_model_name="net", **asked)
            mlflow.pytorch.log_model(
                network, name="pickled", serialization_format="pickle", **asked
            )
        mlflow.MlflowClient().set_registered_model_alias("net", "champion", 1)
        mlflow.set_tracking_uri(None)
    return f"sqlite:///{folder}/mlflow.db", run.info.run_id, network.state_dict()


@pytest.mark.parametrize(
    "address", ["runs:/{run}/m", "runs:/{run}/files", "models:/net@champion", "models:/net/1"]
)
def test_what_others_have_logged_is_read(store, address, monkeypatch):
    uri, run, weights = store
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    address = address.format(run=run)
    (found,) = read_checkpoints(address)
    assert found.name == address
    assert found.weights.keys() == weights.keys()
    assert all(torch.equal(found.weights[key], weights[key]) for key in weights)


def test_addresses_stand_beside_other_checkpoints(store, monkeypatch):
    uri, run, weights = store
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    members = [f"runs:/{run}/m", weights]
    fused = merge(members, method="average", align=None)  # of two that are equal: exact
    assert fused.report["members"][0] == members[0]
    assert all(torch.equal(fused.weights[key], weights[key]) for key in weights)


def test_a_pickled_network_is_refused(store, monkeypatch):
    uri, run, _ = store
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(Unsafe, match=f"runs:/{run}/pickled"):
        read_checkpoints(f"runs:/{run}/pickled")


@pytest.mark.parametrize("address", ["runs:/0a1b/m", "models:/nobody@best", "models:/m-12"])
def test_an_address_of_nothing_says_where_it_was_looked_for(store, address, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store[0])
    with pytest.raises(Unreadable, match=f"{address}: cannot be had from the store {store[0]}"):
        read_checkpoints(address)


def test_a_store_that_is_down_fails_soon_and_keeps_its_password(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    begin = time.perf_counter()
    with pytest.raises(Unreadable, match="cannot be had") as caught:
        read_checkpoints("runs:/0a1b/m")
    assert time.perf_counter() - begin < 10
    assert "secret" not in str(caught.value)


def test_no_store_is_made_by_looking_for_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(Unreadable, match=r"there is no store at .*MLFLOW_TRACKING_URI"):
        read_checkpoints("models:/net@champion")
    assert list(tmp_path.iterdir()) == []


def test_without_mlflow_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ConfigError, match="pip install mlflow"):
        read_checkpoints("models:/net@champion")
