"""Processes share the families of a step in the benchmark of training mergers."""

import subprocess
import sys

import pytest
import torch

from evaluation.benchmarks.memory import peak
from evaluation.benchmarks.merger_training import BenchmarkOptions, measured
from metamerge.errors import ConfigError


def test_only_steps_that_every_process_has_a_part_of_are_measured():
    sizes = {"members": 2, "widths": (8,), "probes": 4, "images": 4, "repeats": 1}
    options = BenchmarkOptions(families=(1, 2, 3, 4), **sizes)
    found = measured(options, "cpu", processes=2, threads=1)
    assert list(found.rates) == [2, 4]
    assert min(found.rates.values()) > 0


def test_parts_of_a_step_take_less_memory():
    sizes = {"members": 4, "channels": (8, 8), "probes": 256, "images": 16, "repeats": 1}
    options = BenchmarkOptions(families=(8,), **sizes)
    whole, parts = (measured(options, "cpu", 1, 1, parts=count).gigabytes for count in (1, 8))
    assert parts < 0.7 * whole


@pytest.mark.parametrize("wrong", [{"parts": (2, 0)}, {"repeats": 0}, {"channels": (8, -1)}])
def test_numbers_of_which_there_is_nothing_to_measure_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} must be a whole number"):
        BenchmarkOptions(**wrong)


def test_memory_of_a_process_is_its_own_whatever_its_parent_holds():
    held = torch.ones(2**27)  # 512 MiB
    code = "from evaluation.benchmarks.memory import peak; bytearray(2**26); print(peak())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 2**26 < int(done.stdout) < 2**28
    assert peak() > held.nbytes
