"""Tracked runs against real stores: a SQLite file, a dead port and a server that only fails."""

import http.server
import shutil
import signal
import sqlite3
import threading
import time
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation.tracking import databases, track


def test_children_are_found_below_their_parent_by_shared_metrics(store, client, runs_of):
    with track("compare", options={"seed": 0}, uri=store, tags={"kind": "demo"}) as run:
        for method, accuracy in {"average": 0.25, "ties": 0.5, "gnn": 0.75}.items():
            run.child(
                method,
                options={"method": {"name": method}},
                metrics={"accuracy": accuracy, "seconds": 1},
                tags={"control": method == "average"},
            )
    (parent,) = runs_of(client, "params.seed = '0' AND tags.kind = 'demo'")
    assert parent.info.run_id == run.id
    assert parent.info.run_name == "compare"
    good = runs_of(client, f"tags.mlflow.parentRunId = '{run.id}' AND metrics.accuracy >= 0.5")
    assert {child.info.run_name for child in good} == {"ties", "gnn"}
    assert {child.data.params["method.name"] for child in good} == {"ties", "gnn"}
    assert {child.data.params["child"] for child in good} == {"02 ties", "03 gnn"}
    assert {child.info.status for child in good} == {"FINISHED"}
    assert {child.data.tags["control"] for child in good} == {"False"}


def test_thirty_children_cost_less_than_two_seconds_of_computing(store, client):
    results = {f"metric_{i}": float(i) for i in range(30)}
    with track("compare", options={}, uri=store) as run:
        begin = time.process_time()  # the disk is shared with whatever else runs
        children = [run.child(f"child {i}", options=results, metrics=results) for i in range(30)]
        seconds = time.process_time() - begin
    assert len(set(children) - {None}) == 30
    assert seconds < 2


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("width 3 of 'conv1' is odd"), "FAILED"),
        (SystemExit("no data"), "FAILED"),
        (SystemExit(0), "FINISHED"),
        (SystemExit(143), "KILLED"),
        (KeyboardInterrupt(), "KILLED"),
    ],
)
def test_a_run_ends_as_its_body_does(store, client, error, status):
    started = []

    def body():
        with track("body", options={}, uri=store) as run:
            started.append(run.id)
            assert client.get_run(run.id).info.status == "RUNNING"
            raise error

    with pytest.raises(type(error)):
        body()
    ended = client.get_run(started[0])
    assert ended.info.status == status
    assert ended.info.end_time is not None
    text = f"{type(error).__name__}: {error}" if status == "FAILED" else None
    assert ended.data.tags.get("error") == text


def test_sigterm_ends_the_run_as_killed_after_the_body_cleaned_up(store, client, tmp_path, start):
    script = f"""
import time
from pathlib import Path
from evaluation.tracking import track
with track("long", options={{}}, uri={store!r}) as run:
    try:
        run.metrics({{"loss": 1.0}}, step=0)
        print(run.id, flush=True)
        time.sleep(60)
    finally:
        run.metrics({{"loss": 0.5}}, step=1)
        Path("saved").touch()
"""
    process = start(script, tmp_path)
    run_id = process.stdout.readline().strip()
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 143, stderr
    assert stderr == ""
    assert client.get_run(run_id).info.status == "KILLED"
    assert client.get_run(run_id).data.metrics == {"loss": 0.5}
    assert (tmp_path / "saved").exists()


def test_the_sigterm_handler_is_given_back_and_a_foreign_one_is_kept(store):
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with track("own", options={}, uri=store):
        assert callable(signal.getsignal(signal.SIGTERM))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    def foreign(number, frame):
        raise AssertionError("never sent")

    signal.signal(signal.SIGTERM, foreign)
    try:
        with track("guest", options={}, uri=store):
            assert signal.getsignal(signal.SIGTERM) is foreign
        assert signal.getsignal(signal.SIGTERM) is foreign
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_a_resumed_run_goes_on_where_its_curves_ended(store, client, runs_of):
    with suppress(RuntimeError), track("train", options={"lr": 0.1}, uri=store) as first:
        for step in range(4):
            first.metrics({"loss": 10.0 - step, "step": step}, step=step)
        first.metrics({"accuracy": 0.5})
        raise RuntimeError("power cut")
    assert client.get_run(first.id).data.tags["error"] == "RuntimeError: power cut"
    options = {"lr": 0.2, "epochs": 6}
    with track("train", options=options, uri=store, resume=first.id) as second:
        assert second.id == first.id
        assert client.get_run(first.id).info.status == "RUNNING"
        for step in range(2, 6):  # the last checkpoint was older than the last metric
            second.metrics({"loss": -1.0, "step": step, "late": step}, step=step)
        second.metrics({"accuracy": 0.75})
    curve = [(m.step, m.value) for m in client.get_metric_history(first.id, "loss")]
    assert sorted(curve) == [(0, 10), (1, 9), (2, 8), (3, 7), (4, -1), (5, -1)]
    assert [m.step for m in client.get_metric_history(first.id, "late")] == [2, 3, 4, 5]
    run = client.get_run(first.id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["accuracy"] == 0.75
    assert run.data.params == {"lr": "0.1", "epochs": "6"}
    assert run.data.tags["changed.lr"] == "0.2"
    assert "error" not in run.data.tags
    assert len(runs_of(client)) == 1


@pytest.mark.parametrize("missing", ["0" * 32, 'it\'s not "an" id', "deleted"])
def test_resuming_a_run_that_is_gone_starts_a_new_one(store, client, missing):
    if missing == "deleted":
        with track("first", options={}, uri=store) as first:
            missing = first.id
        client.delete_run(missing)
    resumed = track("again", options={}, uri=store, resume=missing)
    with pytest.warns(RuntimeWarning, match="no run .* to resume"), resumed as run:
        run.metrics({"loss": 1.0}, step=0)
    assert run.id != missing
    assert client.get_run(run.id).info.status == "FINISHED"
    assert client.get_run(run.id).data.metrics == {"loss": 1.0}


def test_scalars_are_converted_and_what_is_not_finite_is_flagged(store, client):
    values = {
        "tensor": torch.tensor(0.5, requires_grad=True),
        "one": torch.tensor([2]),
        "half": torch.tensor(0.25, dtype=torch.bfloat16),
        "numpy": np.float32(1.5),
        "array": np.array([[3.0]]),
        "flag": True,
        "nan": float("nan"),
        "inf": torch.tensor(float("-inf")),
        "huge": 10**400,
        "nested": {"worst": 1},
    }
    with track("numbers", options={}, uri=store) as run:
        run.metrics(values, step=3)
        with pytest.warns(RuntimeWarning, match="'vector' not logged: Tensor is not one number"):
            run.metrics({"vector": torch.ones(3), "kept": 1})
    logged = client.get_run(run.id).data.metrics
    assert logged == {
        "tensor": 0.5,
        "one": 2.0,
        "half": 0.25,
        "numpy": 1.5,
        "array": 3.0,
        "flag": 1.0,
        "nan_nonfinite": 1.0,
        "inf_nonfinite": 1.0,
        "huge_nonfinite": 1.0,
        "nested.worst": 1.0,
        "kept": 1.0,
    }
    assert client.get_metric_history(run.id, "nan_nonfinite")[0].step == 3
    assert run.unsent.total() == 0


def test_names_with_quotes_and_unicode_work_everywhere(migrated, tmp_path, runs_of):
    from mlflow import MlflowClient

    folder = tmp_path / 'o\'Neil "größe" 类'
    folder.mkdir()
    shutil.copy(migrated, folder / "mlflow.db")
    store = f"sqlite:///{folder / 'mlflow.db'}"
    odd = 'it\'s "ünïcode"; DROP TABLE runs'
    with track(odd, options={odd: odd}, experiment=odd, uri=store, tags={odd: odd}) as run:
        run.metrics({odd: 1.0, 'acc"': 2.0, "acc'": 3.0, "../top": 4.0})
        run.text("grün", 'it\'s "grün".txt')
        child = run.child(odd, options={odd: odd}, metrics={odd: 1.0}, tags={odd: odd})
    client = MlflowClient(store)
    below, above = runs_of(client, experiment=odd)[::-1]
    assert {below.info.run_id, above.info.run_id} == {child, run.id}
    key = "it_s _ünïcode__ DROP TABLE runs"
    for found in (client.get_run(run.id), client.get_run(child)):
        assert found.info.run_name == odd
        assert found.data.params[key] == odd
        assert found.data.tags[key] == odd
        assert found.data.metrics[key] == 1.0
    metrics = client.get_run(run.id).data.metrics
    assert (metrics["acc_"], metrics["acc__"], metrics["top"]) == (2.0, 3.0, 4.0)
    local = client.download_artifacts(run.id, 'it\'s "grün".txt', str(tmp_path))
    assert Path(local).read_text() == "grün"
    assert sorted(path.name for path in folder.iterdir()) == [
        "mlflow.db",
        "mlflow.db.lock",
        "mlruns",
    ]


def test_long_options_are_kept_whole_as_artifacts(store, client, tmp_path):
    with track("long", options={"short": 1, "keys/all": "x" * 7000}, uri=store) as run:
        pass
    with track("long", options={"keys/all": "x" * 7001}, uri=store, resume=run.id):
        pass
    value = client.get_run(run.id).data.params["keys/all"]
    assert value.startswith("x" * 5000)
    assert len(value) <= 6000
    filename = value.split("artifact ")[1].rstrip(")")
    local = client.download_artifacts(run.id, filename, str(tmp_path))
    assert Path(local).read_text() == "x" * 7000
    assert "changed.keys/all" in client.get_run(run.id).data.tags


def test_three_hundred_options_arrive(store, client):
    with track("wide", options={"table": {i: i for i in range(300)}}, uri=store) as run:
        pass
    assert client.get_run(run.id).data.params == {f"table.{i}": str(i) for i in range(300)}


def test_artifacts_arrive_and_a_missing_file_costs_only_itself(store, client, tmp_path):
    figure_module = pytest.importorskip("matplotlib.figure")
    figure = figure_module.Figure()
    figure.subplots().plot([1, 2])
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "a.csv").write_text("1,2")
    with track("files", options={}, uri=store) as run:
        run.artifact(tmp_path / "plots")
        run.artifact(tmp_path / "plots" / "a.csv")
        run.figure(figure, "curve.png")
        run.text("done", "notes/readme.txt")
        with pytest.warns(RuntimeWarning, match="artifact not logged"):
            run.artifact(tmp_path / "missing.csv")
        with pytest.warns(RuntimeWarning, match="artifact not logged"):
            run.text("no", "../outside.txt")
        run.metrics({"loss": 1.0})
    names = {found.path for found in client.list_artifacts(run.id)}
    assert names == {"plots", "a.csv", "curve.png", "notes"}
    assert [found.path for found in client.list_artifacts(run.id, "plots")] == ["plots/a.csv"]
    assert client.get_run(run.id).data.metrics == {"loss": 1.0}
    assert run.unsent == {"artifact": 2}
    assert not (tmp_path / "outside.txt").exists()


def test_a_deleted_experiment_is_restored(store, client, runs_of):
    with track("before", options={}, uri=store, experiment="sweep"):
        pass
    client.delete_experiment(client.get_experiment_by_name("sweep").experiment_id)
    with (
        pytest.warns(RuntimeWarning, match="'sweep' was deleted; it is restored"),
        track("after", options={}, uri=store, experiment="sweep"),
    ):
        pass
    assert [run.info.run_name for run in runs_of(client, experiment="sweep")] == ["before", "after"]


def test_an_impossible_experiment_name_gives_way_to_another(store, client):
    name = "e" * 600
    with (
        pytest.warns(RuntimeWarning, match="cannot be had; the run goes to 'metamerge 2"),
        track("run", options={}, uri=store, experiment=name) as run,
    ):
        pass
    assert client.get_run(run.id).info.status == "FINISHED"


def work_without_a_store(uri: str, folder: Path) -> tuple[float, list[str]]:
    """Return how long a body with a store that fails took, and what it was told."""
    begin, done = time.perf_counter(), 0
    with (
        warnings.catch_warnings(record=True, action="always") as told,
        track("train", options={"a": 1}, uri=uri, record=folder / "offline") as run,
    ):
        for step in range(100):
            run.metrics({"loss": 1.0}, step=step)
            done += 1
        assert run.child("child", metrics={"loss": 1.0}).startswith("event-")
        run.text("text", "notes.txt")
    assert done == 100
    assert run.id.startswith("event-")
    one_each = dict.fromkeys(("start", "options", "tags", "child", "artifact", "end"), 1)
    assert run.unsent == {**one_each, "metrics": 100}
    (kept,) = (folder / "offline").iterdir()
    lines = (kept / "events.jsonl").read_text().splitlines()
    assert len(lines) == run.unsent.total()
    assert "secret" not in "".join(lines)
    return time.perf_counter() - begin, [str(w.message) for w in told if "tracking" in str(w)]


def test_a_server_that_is_down_costs_one_warning_and_no_work(tmp_path):
    seconds, told = work_without_a_store("http://user:secret@127.0.0.1:9", tmp_path)
    assert seconds < 10
    assert len(told) == 1
    assert "the work goes on and its record is kept" in told[0]
    assert "secret" not in told[0]


class OnlyErrors(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(500)
        self.send_header("Retry-After", "3600")
        self.end_headers()

    def do_POST(self):
        self.do_GET()

    def log_message(self, *args):
        pass


def test_a_server_that_answers_500_costs_one_warning_and_no_work(tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), OnlyErrors) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        seconds, told = work_without_a_store(f"http://127.0.0.1:{server.server_port}", tmp_path)
        server.shutdown()
    assert seconds < 10
    assert len(told) == 1


def test_a_locked_database_costs_one_warning_and_no_work(store, tmp_path, monkeypatch):
    monkeypatch.setattr(databases, "SECONDS", 1)
    owner = sqlite3.connect(tmp_path / "mlflow.db")
    owner.execute("BEGIN EXCLUSIVE")
    try:
        seconds, told = work_without_a_store(store, tmp_path)
    finally:
        owner.close()
    assert seconds < 2 * 1 + 5  # at the start and at the end
    assert len(told) == 1
    assert "locked" in told[0]


@pytest.mark.parametrize("content", [b"this is no database, but a text" * 100, None])
def test_a_file_that_is_no_database_costs_one_warning_and_is_not_touched(tmp_path, content):
    file = tmp_path / "mlflow.db"
    file.mkdir() if content is None else file.write_bytes(content)
    seconds, told = work_without_a_store(f"sqlite:///{file}", tmp_path)
    assert seconds < 10
    assert len(told) == 1
    assert file.is_dir() if content is None else file.read_bytes() == content


def test_a_store_that_fails_on_the_way_gets_everything_when_it_is_back(store, client, tmp_path):
    whole = pytest.warns(RuntimeWarning, match="has got the whole record")
    with whole, track("train", options={}, uri=store, record=tmp_path / "offline") as run:
        run.metrics({"loss": 2.0}, step=0)
        with sqlite3.connect(tmp_path / "mlflow.db") as database:
            database.execute("ALTER TABLE metrics RENAME TO away")
        with pytest.warns(RuntimeWarning, match="metrics not logged, the work goes on"):
            run.metrics({"loss": 1.0}, step=1)
        run.metrics({"loss": 0.5}, step=2)
        with sqlite3.connect(tmp_path / "mlflow.db") as database:
            database.execute("ALTER TABLE away RENAME TO metrics")
        database.close()
    ended = client.get_run(run.id)
    assert ended.info.status == "FINISHED"
    curve = [(m.step, m.value) for m in client.get_metric_history(run.id, "loss")]
    assert sorted(curve) == [(0, 2.0), (1, 1.0), (2, 0.5)]
    assert run.unsent == {"metrics": 2, "end": 1}


def test_a_run_that_is_not_enabled_writes_nothing(tmp_path, start):
    script = """
import sys
from evaluation.tracking import track
with track("rank 1", options={"a": 1}, enabled=False) as run:
    run.metrics({"loss": 1.0}, step=0)
    assert run.child("child") is None and run.id is None
assert "mlflow" not in sys.modules
"""
    process = start(script, tmp_path)
    assert process.communicate(timeout=200) == ("", "")
    assert process.returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_the_address_comes_from_the_environment_when_none_is_given(store, client, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    with track("from environment", options={}) as run:
        pass
    assert client.get_run(run.id).info.run_name == "from environment"
