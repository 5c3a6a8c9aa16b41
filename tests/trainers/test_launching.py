"""Processes that were launched together end together, and leave nothing running.

The processes that are launched run this file: ``main``.
"""

import sys
from pathlib import Path

import torch

from trainers.launching import launched

SCRIPT = str(Path(__file__))


def gloo_threads():
    """Threads of the process group on CPUs, of this process."""
    names = (path.read_text() for path in Path("/proc/self/task").glob("*/comm"))
    return sum("gloo" in name for name in names)


def main():
    with launched("here") as accelerator:
        model = accelerator.prepare(torch.nn.Linear(2, 2))
        model(torch.ones(1, 2)).sum().backward()
        before = gloo_threads()
        del model
        accelerator.free_memory()
    told = f"threads {accelerator.process_index} {before} {gloo_threads()}\n"
    sys.stdout.write(told)  # at once: two processes write


def test_threads_of_the_process_group_end_before_python_does(launch, two_processes, tmp_path):
    done = launch(tmp_path, **two_processes)
    assert done.code == 0, done.err
    told = sorted(line.split()[1:] for line in done.out.splitlines() if line.startswith("threads"))
    assert [process for process, _, _ in told] == ["0", "1"]
    assert all(int(before) > 0 for _, before, _ in told)
    assert [after for _, _, after in told] == ["0", "0"]


if __name__ == "__main__":
    main()
