"""Tests of memory that stays with the process."""

import resource
import subprocess
import sys

import pytest

from zoo.memory import keep_freed_memory

STEPS = """
import resource, sys, torch
from zoo.memory import keep_freed_memory

def step():
    x = torch.ones(10_000_000)  # above the 32 MB up to which glibc adapts by itself
    y = x + 1
    return (x * y).sum()

if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(10):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc alone is told")
def test_pages_are_cleared_in_the_first_steps_rather_than_in_every_one():
    keep, leave = (
        int(subprocess.check_output([sys.executable, "-c", STEPS, told]))
        for told in ("keep", "leave")
    )
    pages_of_a_step = 3 * 40_000_000 // resource.getpagesize()
    assert keep < 2 * pages_of_a_step  # a block may still find its place
    assert leave > 10 * pages_of_a_step


def test_the_environment_has_the_last_word(monkeypatch):
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1000")
    assert not keep_freed_memory()
