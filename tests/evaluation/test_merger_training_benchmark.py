"""Processes share the families of a step in the benchmark of training mergers."""

from evaluation.benchmarks.merger_training import BenchmarkOptions, measured


def test_only_steps_that_every_process_has_a_part_of_are_measured():
    sizes = {"members": 2, "widths": (8,), "probes": 4, "images": 4, "repeats": 1}
    options = BenchmarkOptions(families=(1, 2, 3, 4), **sizes)
    rates = measured(options, "cpu", processes=2, threads=1)
    assert list(rates) == [2, 4]
    assert min(rates.values()) > 0
