"""First migrations that many processes want at once, and addresses of databases."""

import os
import pwd
import shutil
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from evaluation.tracking.databases import sqlite_address, sqlite_file, store_address

POSTGRESQL = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
FOUR = """
import multiprocessing, sys
import mlflow.db
from evaluation.tracking import track
def work(barrier):
    barrier.wait()
    with track("fresh", options={"a": 1}) as run:
        run.metrics({"loss": 1.0}, step=0)
        run.child("child", metrics={"loss": 0.5})
    sys.exit(run.unsent.total())
context = multiprocessing.get_context("fork")
barrier = context.Barrier(4)
processes = [context.Process(target=work, args=(barrier,)) for _ in range(4)]
[process.start() for process in processes]
[process.join() for process in processes]
sys.exit(sum(process.exitcode for process in processes))
"""


@pytest.fixture(scope="session")
def postgresql(free_port):
    """Address of an empty database; the server runs as the user postgres, who has to own it."""
    if not POSTGRESQL or find_spec("psycopg") is None:
        message = "Debian's package postgresql, or Python's psycopg, is not installed"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    folder, port = Path(tempfile.mkdtemp(prefix="postgresql-")), free_port()
    root = os.geteuid() == 0
    if root:
        shutil.chown(folder, "postgres", "postgres")
    owner = pwd.getpwnam("postgres") if root else None
    identity = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []} if root else {}

    def run(program: str, *arguments: str) -> None:
        command = [str(POSTGRESQL[-1] / program), *arguments]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, **identity)
        assert done.returncode == 0, done.stdout + done.stderr

    data = str(folder / "data")
    run("initdb", "-D", data, "-U", "metamerge", "--auth", "trust", "--no-sync")
    settings = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"
    run("pg_ctl", "-D", data, "-w", "-o", settings, "-l", str(folder / "log"), "start")
    yield f"postgresql://metamerge@127.0.0.1:{port}/postgres"
    run("pg_ctl", "-D", data, "-m", "immediate", "stop")
    shutil.rmtree(folder)


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_four_processes_start_at_once_on_a_fresh_database_in_silence(
    kind, tmp_path, start, runs_of, request
):
    from mlflow import MlflowClient

    fresh = f"sqlite:///{tmp_path}/mlflow.db"  # which is the default there
    uri = fresh if kind == "sqlite" else request.getfixturevalue("postgresql")
    given = {} if kind == "sqlite" else {"MLFLOW_TRACKING_URI": uri}
    process = start(FOUR, tmp_path, **given)
    stdout, stderr = process.communicate(timeout=250)
    assert (process.returncode, stdout, stderr) == (0, "", "")
    found = runs_of(MlflowClient(uri))
    assert sorted(run.info.run_name for run in found) == ["child"] * 4 + ["fresh"] * 4
    assert {run.info.status for run in found} == {"FINISHED"}
    assert not (tmp_path / "mlflow.db.new").exists()


def test_addresses_of_sqlite_files_are_the_same_from_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    here = f"sqlite:///{tmp_path}/mlflow.db"
    assert store_address(None) == store_address("sqlite:///mlflow.db") == here
    assert store_address("http://127.0.0.1:5000") == "http://127.0.0.1:5000"
    assert store_address("sqlite:///:memory:") == "sqlite:///:memory:"
    odd = tmp_path / "50% sure?.db"
    assert sqlite_file(sqlite_address(odd)) == odd
