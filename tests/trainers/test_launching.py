"""Processes that were launched together end together, and leave nothing running."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = """
from pathlib import Path
import torch
from trainers.launching import launched

def threads():
    return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]

with launched("here") as accelerator:
    model = accelerator.prepare(torch.nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()
    before = sum("gloo" in name for name in threads())
    del model
    accelerator.free_memory()
after = sum("gloo" in name for name in threads())
print(f"process {accelerator.process_index}: {before} threads of gloo, then {after}", flush=True)
"""


def test_threads_of_the_process_group_end_before_python_does(tmp_path, two_processes):
    (tmp_path / "script.py").write_text(SCRIPT)
    launcher = [str(Path(sys.executable).with_name("accelerate")), "launch"]
    settings = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launcher, *two_processes["launcher"], str(tmp_path / "script.py")],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = sorted(line for line in done.stdout.splitlines() if line.startswith("process"))
    assert [line.split(":")[0] for line in told] == ["process 0", "process 1"]
    for line in told:
        before, after = (int(word) for word in line.split(":")[1].split() if word.isdigit())
        assert before > 0
        assert after == 0
