"""A store of a test's own, processes that use it, and what is found in it afterwards."""

import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from evaluation.tracking import track

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session")
def migrated(tmp_path_factory):
    """A database whose schema is in place, made once because that takes a second or two."""
    file = tmp_path_factory.mktemp("template") / "template.db"
    with track("template", options={}, uri=f"sqlite:///{file}"):
        pass
    with sqlite3.connect(file) as database:
        for table in ("tags", "params", "metrics", "latest_metrics", "runs"):
            database.execute(f"DELETE FROM {table}")
        database.execute("DELETE FROM experiments WHERE experiment_id != 0")
    database.close()
    return file


@pytest.fixture
def store(migrated, tmp_path):
    """Address of a database of the test's own."""
    shutil.copy(migrated, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture
def client(store):
    from mlflow import MlflowClient

    return MlflowClient(store)


@pytest.fixture(scope="session")
def start():
    """Runs a script in a process of its own, which finds the checkout and works in a folder."""

    def start(script: str, folder: Path, **environment: str) -> subprocess.Popen:
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        settings = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | environment
        if "MLFLOW_TRACKING_URI" not in environment:
            settings.pop("MLFLOW_TRACKING_URI", None)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, "-c", script], cwd=folder, env=settings, **pipes)

    return start


@pytest.fixture(scope="session")
def runs_of():
    """Runs of an experiment, oldest first."""

    def runs_of(client, filter_string="", experiment="metamerge"):
        own = client.get_experiment_by_name(experiment).experiment_id
        return client.search_runs([own], filter_string, order_by=["attributes.start_time"])

    return runs_of


@pytest.fixture(scope="session")
def free_port():
    """Finds ports of loopback that nobody listens on."""

    def free_port() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return probe.getsockname()[1]

    return free_port
