"""Runs without a store: what is kept, and what a store has of it afterwards."""

import json
import shutil
import signal
import warnings
from pathlib import Path

import pytest

from evaluation.tracking import Dataset, track
from evaluation.tracking.__main__ import TrackingOptions, report
from evaluation.tracking.record import Record, records
from evaluation.tracking.store import Store
from evaluation.tracking.uploading import upload
from metamerge.errors import MetaMergeError

NOWHERE = "http://127.0.0.1:9"


def work(folder: Path, **settings) -> str:
    """A run whose store does not answer; its id."""
    with (
        warnings.catch_warnings(action="ignore"),
        track(
            "train",
            options={"lr": 0.1, "net": {"width": 8}},
            uri=NOWHERE,
            tags={"kind": "demo"},
            inputs=[Dataset("digits", "abc123", "sklearn", profile={"rows": 1797})],
            record=folder,
            **settings,
        ) as run,
    ):
        for step in range(3):
            run.metrics({"loss": 3.0 - step}, step=step)
        run.text("hello", "notes/a.txt")
        run.child("ties", options={"density": 0.2}, metrics={"accuracy": 0.5}, seconds=2)
    return run.id


@pytest.fixture
def record(tmp_path):
    return Record(tmp_path / "offline" / work(tmp_path / "offline"))


@pytest.fixture
def open_store(store):
    return Store(store, "metamerge")


def contents(client, runs_of) -> list:
    """Everything in the store that an upload has to give, without ids."""
    found = []
    for run in runs_of(client):
        curve = client.get_metric_history(run.info.run_id, "loss")
        found.append(
            {
                "name": run.info.run_name,
                "status": run.info.status,
                "times": (run.info.start_time, run.info.end_time),
                "params": run.data.params,
                "curve": sorted((m.step, m.value, m.timestamp) for m in curve),
                "accuracy": run.data.metrics.get("accuracy"),
                "inputs": [one.dataset.digest for one in run.inputs.dataset_inputs],
                "files": [one.path for one in client.list_artifacts(run.info.run_id, "notes")],
                "below": "mlflow.parentRunId" in run.data.tags,
            }
        )
    return sorted(found, key=lambda one: one["name"])


def test_an_upload_gives_the_store_everything_with_its_times(record, open_store, client, runs_of):
    at = {one["do"]: one["at"] for one in record.events()}
    losses = [one["at"] for one in record.events() if one["do"] == "metrics"]
    run, sent = upload(record, open_store)
    assert sent == len(record.events())
    ties, train = contents(client, runs_of)
    assert train == {
        "name": "train",
        "status": "FINISHED",
        "times": (at["start"], at["end"]),
        "params": {"lr": "0.1", "net.width": "8"},
        "curve": [(step, 3.0 - step, when) for step, when in enumerate(losses)],
        "accuracy": None,
        "inputs": ["abc123"],
        "files": ["notes/a.txt"],
        "below": False,
    }
    assert (ties["name"], ties["accuracy"], ties["below"]) == ("ties", 0.5, True)
    assert ties["times"] == (at["child"] - 2000, at["child"])
    assert ties["inputs"] == ["abc123"]
    assert client.get_run(run).data.tags["kind"] == "demo"


def test_a_second_upload_does_nothing(record, open_store, client, runs_of):
    run, _ = upload(record, open_store)
    before = contents(client, runs_of)
    assert upload(record, open_store) == (run, 0)
    assert contents(client, runs_of) == before
    (record.folder / "uploaded.json").unlink()  # even if it forgets what it has done
    assert upload(record, open_store) == (run, len(record.events()))
    assert contents(client, runs_of) == before


@pytest.mark.parametrize("noted", [True, False])
def test_an_upload_that_is_cut_off_anywhere_goes_on(
    record, store, client, runs_of, monkeypatch, noted
):
    """Cut off behind every event; or before that was noted, so that it is sent again."""
    mark = record.mark

    def cut(events, run):
        if noted or cuts[events - 1]:
            mark(events, run)
        if cuts[events - 1]:
            return
        cuts[events - 1] = True
        raise ConnectionError("cut off")

    cuts = [False] * len(record.events())
    monkeypatch.setattr(record, "mark", cut)
    for _ in cuts:
        with pytest.raises(ConnectionError):
            upload(record, Store(store, "metamerge"))
    upload(record, Store(store, "metamerge"))
    ties, train = contents(client, runs_of)
    assert [value for _, value, _ in train["curve"]] == [3.0, 2.0, 1.0]
    assert (train["status"], ties["status"]) == ("FINISHED", "FINISHED")
    assert (train["inputs"], ties["inputs"]) == (["abc123"], ["abc123"])


def test_a_killed_run_is_uploaded_as_killed_up_to_its_last_whole_line(
    tmp_path, open_store, client, start
):
    script = f"""
import os, signal, warnings
from evaluation.tracking import track
warnings.simplefilter("ignore")
with track("killed", options={{}}, uri={NOWHERE!r}, record="offline") as run:
    for step in range(5):
        run.metrics({{"loss": 1.0}}, step=step)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    process = start(script, tmp_path)
    process.communicate(timeout=200)
    assert process.returncode == -signal.SIGKILL
    (record,) = records([tmp_path])
    lines = record.folder / "events.jsonl"
    lines.write_bytes(lines.read_bytes()[:-20])
    last = record.events()[-1]
    run, _ = upload(record, open_store)
    killed = client.get_run(run)
    assert killed.info.status == "KILLED"
    assert killed.info.end_time == last["at"]
    assert [m.step for m in client.get_metric_history(run, "loss")] == [0, 1, 2, 3]
    assert upload(record, open_store) == (run, 0)


def test_a_run_that_still_writes_is_uploaded_as_running_and_then_to_its_end(
    tmp_path, open_store, client
):
    with (
        warnings.catch_warnings(action="ignore"),
        track("train", options={}, uri=NOWHERE, record=tmp_path) as run,
    ):
        run.metrics({"loss": 2.0}, step=0)
        (record,) = records([tmp_path])
        first, _ = upload(record, open_store)
        assert client.get_run(first).info.status == "RUNNING"
        run.metrics({"loss": 1.0}, step=1)
    assert upload(record, open_store) == (first, 2)
    assert client.get_run(first).info.status == "FINISHED"
    assert [m.value for m in client.get_metric_history(first, "loss")] == [2.0, 1.0]


def test_a_run_is_one_run_though_its_store_came_late(store, client, tmp_path, runs_of):
    folder = tmp_path / "offline"
    first = work(folder)
    again = work(folder, resume=first)
    assert again == first
    assert len(list(records([folder]))) == 1
    with track("train", options={"lr": 0.1}, uri=store, record=folder, resume=first) as run:
        for step in range(5):
            run.metrics({"loss": 3.0 - step}, step=step)
    train = client.get_run(run.id)
    assert [found.info.run_name for found in runs_of(client)].count("train") == 1
    assert train.info.status == "FINISHED"
    steps = [m.step for m in client.get_metric_history(run.id, "loss")]
    assert sorted(steps) == [0, 1, 2, 3, 4]


def test_what_the_store_refuses_does_not_hold_up_the_rest(record, open_store, client):
    lines = (record.folder / "events.jsonl").read_text().splitlines()
    odd = {"do": "tags", "id": "event-1", "at": 1, "values": {"": "a tag needs a name"}}
    (record.folder / "events.jsonl").write_text(
        "\n".join([*lines[:-1], json.dumps(odd), lines[-1]])
    )
    with pytest.warns(RuntimeWarning, match="tags not logged"):
        run, _ = upload(record, open_store)
    assert client.get_run(run).info.status == "FINISHED"


def test_the_command_lists_and_uploads_and_says_when_no_store_answers(record, store, capsys):
    folder = str(record.folder.parent)
    report(TrackingOptions(records=(folder,)))
    told = capsys.readouterr().out
    waiting = len(record.events())
    assert f"train: {record.folder}: {waiting} events to upload to {NOWHERE}" in told
    with pytest.raises(MetaMergeError, match=f"{waiting} events wait; name a store"):
        report(TrackingOptions(records=(folder,), upload=True))
    report(TrackingOptions(records=(folder,), upload=True, uri=store))
    assert f"{waiting} events sent to run" in capsys.readouterr().out
    report(TrackingOptions(records=(folder,), upload=True, uri=store))
    assert " 0 events sent to run" in capsys.readouterr().out


def test_records_are_whole_in_another_place(record, store, client, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.move(record.folder.parent, moved)
    (found,) = records([moved])
    run, _ = upload(found, Store(store, "metamerge"))
    assert [one.path for one in client.list_artifacts(run, "notes")] == ["notes/a.txt"]


def test_a_record_that_cannot_be_written_costs_a_warning_and_no_work(tmp_path):
    (tmp_path / "offline").write_text("a file where the folder should be")
    done = 0
    told = pytest.warns(RuntimeWarning, match="lost: it could not be kept either")
    with told, track("train", options={}, uri=NOWHERE, record=tmp_path / "offline") as run:
        for step in range(3):
            run.metrics({"loss": 1.0}, step=step)
            done += 1
    assert done == 3
