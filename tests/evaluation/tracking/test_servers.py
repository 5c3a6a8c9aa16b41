"""A real server of MLflow: models that load back, and what it costs when the server is killed."""

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from evaluation.metrics import accuracy
from evaluation.tracking import track
from evaluation.tracking.record import records
from metamerge import merge
from metamerge.mergers import save_merger
from metamerge.weights import unstack


class Server:
    """``mlflow server`` on loopback over a SQLite file."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        store = ("--backend-store-uri", f"sqlite:///{self.folder}/server.db")
        files = ("--artifacts-destination", str(self.folder / "artifacts"))
        place = ("--host", "127.0.0.1", "--port", str(self.port), "--workers", "1")
        settings = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *store, *files, *place],
                cwd=self.folder,
                env=settings,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        for _ in range(600):
            with suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return
            assert self.process.poll() is None, (self.folder / "server.log").read_text()
            time.sleep(0.2)
        raise AssertionError("the server does not answer")

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="session")
def server(migrated, tmp_path_factory, free_port):
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(migrated, folder / "server.db")
    server = Server(folder, free_port())
    server.start()
    yield server
    server.kill()


@pytest.fixture
def merged(digits_zoo):
    """One unseen family, merged."""
    members = {key: tensor[0] for key, tensor in digits_zoo.unseen.items()}
    return merge(
        unstack(members),
        method="average",
        model=digits_zoo.network().eval(),
        example_inputs=digits_zoo.objective[0][:2],
    )


def test_a_merged_model_loads_back_from_the_registry_and_scores_the_same(
    server, digits_zoo, merged, monkeypatch
):
    import mlflow

    inputs, targets = digits_zoo.split.images("test")
    with track("merge", options={"method": "average"}, uri=server.uri) as run:
        child = run.child("average", metrics={"accuracy": 0.5})
        model = run.network(
            digits_zoo.network(),
            merged.weights,
            inputs[:1],
            about=merged.report,
            program=merged.program.to_json(),
            of=child,
            registered="digits",
            alias="champion",
        )
    assert run.unsent.total() == 0
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    with torch.no_grad():
        own = merged.to_module(digits_zoo.network()).eval()(inputs)
    expected = float(accuracy(own[None], targets)[0])
    for address in (
        f"runs:/{child}/m",
        "models:/digits@champion",
        "models:/digits/1",
        f"models:/{model}",
    ):
        loaded = mlflow.pytorch.load_model(address)
        with torch.no_grad():
            found = loaded(inputs)  # [449, classes], exported with one input
            assert loaded(inputs[:1]).shape == found[:1].shape
        assert float(accuracy(found[None], targets)[0]) == expected
        torch.testing.assert_close(found, own)
    again = merge([f"runs:/{child}/m", "models:/digits@champion"], method="average", align=None)
    assert again.report["verified"] == [True, True]
    assert all(torch.equal(again.weights[k], t) for k, t in merged.weights.items())


def test_the_champion_is_whoever_was_crowned_last(server, digits_zoo, merged, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    doubled = {key: 2 * tensor for key, tensor in merged.weights.items()}
    with track("crowns", options={}, uri=server.uri) as run:
        for weights in (merged.weights, doubled):
            run.network(
                digits_zoo.network(),
                weights,
                digits_zoo.objective[0][:2],
                registered="crowned",
                alias="champion",
            )
    key = next(iter(doubled))
    champion = merge(["models:/crowned@champion"], method="average")
    assert torch.equal(champion.weights[key], doubled[key])
    first = merge(["models:/crowned/1"], method="average")
    assert torch.equal(first.weights[key], merged.weights[key])


def test_a_merger_loads_back_and_merges_the_same(
    server, digits_zoo, trained_merger, tmp_path, monkeypatch
):
    folder = save_merger(trained_merger, tmp_path / "merger", {"seed": 0})
    with track("train", options={}, uri=server.uri) as run:
        run.merger(folder, registered="merger", alias="champion")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    members = unstack({key: tensor[1] for key, tensor in digits_zoo.unseen.items()})
    given = {"method": "gnn", "model": digits_zoo.network().eval()}
    given["example_inputs"] = digits_zoo.objective[0][:2]
    own = merge(members, merger=str(folder), **given).weights
    for address in (f"runs:/{run.id}/m", "models:/merger@champion"):
        found = merge(members, merger=address, **given).weights
        assert all(torch.equal(found[key], own[key]) for key in own)


def test_the_system_is_watched_where_that_is_wanted(server, monkeypatch):
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    from mlflow import MlflowClient

    with track("watched", options={}, uri=server.uri) as run:
        time.sleep(1.5)
    found = MlflowClient(server.uri).get_run(run.id).data.metrics
    assert "system/cpu_utilization_percentage" in found


def test_a_training_goes_on_when_its_server_is_killed_and_is_uploaded_later(
    server, tmp_path, start
):
    """Last in this file: it kills the server, and starts it again."""
    script = f"""
import sys, torch
from evaluation.tracking import track
torch.manual_seed(0)
inputs, targets = torch.randn(64, 4), torch.randint(3, (64,))
network = torch.nn.Linear(4, 3)
optimizer = torch.optim.SGD(network.parameters(), 0.1)
with track("train", options={{"lr": 0.1}}, uri={server.uri!r}, record="out.offline") as run:
    print(run.id, flush=True)
    for step in range(20):
        loss = torch.nn.functional.cross_entropy(network(inputs), targets)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        run.metrics({{"loss": loss}}, step=step)
        if step == 9:
            print("half", flush=True); sys.stdin.readline()
    run.network(network, network.state_dict(), inputs)
    torch.save(network.state_dict(), "weights.pt")
"""
    process = start(script, tmp_path)
    run_id = process.stdout.readline().strip()
    assert process.stdout.readline().strip() == "half"
    server.kill()
    _, stderr = process.communicate("on\n", timeout=200)
    assert process.returncode == 0, stderr
    assert stderr.count("RuntimeWarning") == 1
    assert "--records out.offline --upload" in stderr
    assert (tmp_path / "weights.pt").exists()
    (record,) = records([tmp_path])
    assert record.events()[-1]["do"] == "end"

    server.start()
    command = [sys.executable, "-m", "evaluation.tracking", "--records", "out.offline", "--upload"]
    paths = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"sent to run {run_id} in {server.uri}" in done.stdout
    from mlflow import MlflowClient

    client = MlflowClient(server.uri)
    ended = client.get_run(run_id)
    assert ended.info.status == "FINISHED"
    curve = client.get_metric_history(run_id, "loss")
    assert sorted(m.step for m in curve) == list(range(20))
    assert [m.timestamp for m in curve] == sorted(m.timestamp for m in curve)
    assert ended.outputs.model_outputs
