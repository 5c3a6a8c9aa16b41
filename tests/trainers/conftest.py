import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from evaluation.metrics import family_logits
from metamerge.alignment import weight_matching
from trainers.families import Families
from zoo.variants import Variants

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ("--config_file", str(ROOT / "accelerate_config.yaml"))


@pytest.fixture(scope="module")
def start(request):
    """The module's SCRIPT in a folder, as a process group of its own: by ``accelerate launch``, or
    without it, which starts sooner, where ``launcher`` is None."""

    def start(folder, *arguments, launcher=CONFIG, **settings):
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
            "COLUMNS": "200",
        }
        for name in ("OMP_NUM_THREADS", "WORLD_SIZE", "ACCELERATE_USE_CPU"):
            environment.pop(name, None)
        program = [sys.executable]
        if launcher is not None:
            program = [Path(sys.executable).with_name("accelerate"), "launch", *launcher]
        return subprocess.Popen(
            [*program, request.module.SCRIPT, *arguments],
            cwd=folder,
            env=environment | settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


@pytest.fixture(scope="module")
def launch(start):
    """``start``, waited for: exit code and what was printed."""

    def launch(folder, *arguments, **settings):
        process = start(folder, *arguments, **settings)
        out, err = process.communicate(timeout=200)
        return SimpleNamespace(code=process.returncode, out=out, err=err)

    return launch


@pytest.fixture(scope="module")
def killed_when(start):
    """``start``, killed with all its processes as soon as something holds."""

    def killed_when(holds, folder, *arguments, **settings):
        process = start(folder, *arguments, **settings)
        try:
            until = time.monotonic() + 200
            while not holds():
                assert process.poll() is None, process.stderr.read()
                assert time.monotonic() < until
                time.sleep(0.005)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    return killed_when


@pytest.fixture(scope="module")
def one_thread():
    """Results are compared bit by bit, and launched processes have one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def command(request):
    """The module's SCRIPT in this process, in a folder: its exit code."""

    script = import_module(f"trainers.{Path(request.module.SCRIPT).stem}")

    def command(monkeypatch, folder, *arguments):
        monkeypatch.chdir(folder)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        monkeypatch.setattr(sys, "argv", [request.module.SCRIPT, *arguments])
        try:
            script.main()
        except SystemExit as stopped:
            return stopped.code
        return 0

    return command


@pytest.fixture(scope="session")
def two_processes():
    """What ``launch`` takes to have two processes on the CPU."""
    launcher = (*CONFIG, "--multi_gpu", "--num_processes", "2")
    return {"launcher": launcher, "ACCELERATE_USE_CPU": "true"}


@pytest.fixture(scope="session")
def make_families(digits_zoo):
    """Make a group of families of the small digits zoo, with some or all of their members."""

    def make(members=4, name="k4", variants=None):
        layout, images = digits_zoo.layout, digits_zoo.objective
        raw = {key: tensor[:, :members] for key, tensor in digits_zoo.train.items()}
        aligned = layout.spec.permute(raw, weight_matching(raw, layout.spec))
        answers = family_logits(layout.program, aligned, images[0]).half()
        return Families(name, layout, images, aligned, answers, variants or Variants())

    return make


@pytest.fixture(scope="session")
def renamed_classes():
    """For 36 families, class of the task -> class of the family."""
    return torch.rand(36, 10, generator=torch.Generator().manual_seed(3)).argsort(-1)
