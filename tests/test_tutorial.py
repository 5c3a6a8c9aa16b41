"""The tutorial does what it says: its commands run, one by one, and print what it shows."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^```(sh|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def steps(text):
    """Commands and what they are said to print, in order; several blocks may follow a command."""
    found = []
    for kind, block in FENCE.findall(text):
        if kind == "sh":
            found.append((block, []))
        else:
            found[-1][1].extend(block.splitlines())
    return found


def plain(line):
    """A line without figures, frames and repeated spaces."""
    return re.sub(r"\s+", " ", re.sub(r"[-+]?\d+(\.\d+)?", "#", re.sub("[│*]", " ", line))).strip()


def run(command, folder):
    told = {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    told |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    kept = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env={**kept, **told},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.timeout(600)
def test_the_commands_of_the_tutorial_run_and_print_what_it_shows(tmp_path):
    text = (CHECKOUT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    for command, shown in steps(text):
        done = run(command, tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
        printed = {plain(line) for line in done.stdout.splitlines()}
        missing = [line for line in shown if line != "..." and plain(line) not in printed]
        assert missing == [], f"{command}\n{done.stdout}"
    assert (tmp_path / "runs" / "compare" / "report.html").stat().st_size > 10_000


def test_figures_frames_and_spaces_do_not_count():
    assert plain("│ gnn  │ none │ 85.0 ± 2.1 │ -3.4 [-5.0, +1.2] * │") == "gnn none # ± # # [#, #]"
