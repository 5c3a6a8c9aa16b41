"""Whether a process is gone, and the runs of those that are."""

import os
import signal
import subprocess
import sys

import pytest

from evaluation.tracking import track
from evaluation.tracking.processes import HOST, PID, STARTED, is_gone, process_tags


@pytest.fixture
def sleeper():
    """A process that only waits."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def test_a_process_is_there_until_it_is_killed(sleeper):
    tags = process_tags(sleeper.pid)
    assert not is_gone(tags)
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    assert is_gone(tags)  # though its parent has not taken note
    sleeper.wait()
    assert is_gone(tags)


def test_a_number_that_was_given_to_another_process_does_not_stand_for_the_first():
    own = process_tags()
    boot = own[STARTED].rpartition(" ")[0]
    assert not is_gone(own)
    assert is_gone({**own, STARTED: f"{boot} 1"})


def test_a_process_from_before_the_machine_was_started_again_is_gone():
    own = process_tags()
    _, boot, *rest = own[STARTED].split()
    assert is_gone({**own, STARTED: " ".join(["boot", "0" * len(boot), *rest])})


@pytest.mark.parametrize("what", ["host", "namespace", "nothing known"])
def test_a_process_that_cannot_be_seen_from_here_is_not_gone(sleeper, what):
    tags = process_tags(sleeper.pid)
    sleeper.kill()
    sleeper.wait()
    if what == "host":
        tags[HOST] = "another"
    elif what == "namespace":
        parts = tags[STARTED].split()
        tags[STARTED] = " ".join([*parts[:3], "1", *parts[4:]])
    else:
        tags = {}
    assert not is_gone(tags)


def test_the_next_start_marks_runs_whose_process_was_killed_and_no_others(
    store, client, tmp_path, start, sleeper
):
    script = f"""
import time
from evaluation.tracking import track
with track("killed", options={{}}, uri={store!r}) as run:
    print(run.id, flush=True)
    time.sleep(600)
"""
    process = start(script, tmp_path)
    killed = process.stdout.readline().strip()
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=200)
    assert client.get_run(killed).info.status == "RUNNING"

    experiment = client.get_run(killed).info.experiment_id
    tags = client.get_run(killed).data.tags
    process_of = {key: tags[key] for key in (HOST, PID, STARTED)}
    there = client.create_run(experiment, tags=process_tags(sleeper.pid)).info.run_id
    elsewhere = client.create_run(experiment, tags={**process_of, HOST: "other"}).info.run_id
    foreign = client.create_run(experiment, tags={}).info.run_id
    with track("next", options={}, uri=store, experiment="another") as run:
        pass
    status = {one: client.get_run(one).info.status for one in (killed, there, elsewhere, foreign)}
    assert status == {
        killed: "KILLED",
        there: "RUNNING",
        elsewhere: "RUNNING",
        foreign: "RUNNING",
    }
    assert "process was gone" in client.get_run(killed).data.tags["reconciled"]
    with track("killed", options={}, uri=store, resume=killed):
        assert client.get_run(killed).info.status == "RUNNING"
        with track("beside", options={}, uri=store, experiment="another"):
            assert client.get_run(killed).info.status == "RUNNING"
    assert client.get_run(killed).info.status == "FINISHED"
    assert "reconciled" not in client.get_run(killed).data.tags
    assert client.get_run(run.id).info.status == "FINISHED"
