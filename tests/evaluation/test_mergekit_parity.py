import json
import os
import sys

import pytest
import torch

from evaluation.benchmarks import mergekit_environment, mergekit_parity
from evaluation.benchmarks.mergekit_environment import find_python
from evaluation.benchmarks.mergekit_parity import different_cases, equal_cases
from metamerge.errors import ConfigError

PYTHON = os.environ.get("METAMERGE_MERGEKIT_PYTHON", "")


@pytest.fixture(scope="module")
def families():
    return mergekit_parity.random_families(torch.Generator().manual_seed(0))


@pytest.mark.parametrize("case", [*equal_cases("random"), *different_cases()], ids=str)
def test_every_case_can_be_merged_and_written_down(families, case):
    fused, seconds = mergekit_parity.ours(case, families[case.family])
    assert seconds > 0
    assert fused.keys() == families[case.family][0].keys()
    assert json.loads(json.dumps(case.parameters)) == case.parameters


def test_reasons_are_given_where_results_differ_and_only_there():
    assert all(case.why for case in different_cases())
    assert not any(case.why for case in equal_cases("random"))


def test_the_difference_is_the_largest_of_all_entries():
    one = {"a": torch.zeros(2), "b": torch.tensor([1.0, 2.0])}
    other = {"a": torch.tensor([0.0, -0.5]), "b": torch.tensor([1.0, 2.25])}
    assert mergekit_parity.difference(one, other) == 0.5


def test_a_python_without_mergekit_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="has no mergekit"):
        find_python(sys.executable, "")
    with pytest.raises(ConfigError, match="has no mergekit"):
        find_python(str(tmp_path / "nothing"), "")


def test_an_environment_that_cannot_be_filled_is_made_anew_the_next_time(tmp_path, monkeypatch):
    def fail(command, **_):
        raise mergekit_environment.subprocess.CalledProcessError(1, command)

    def create(folder, **_):
        (folder / "bin").mkdir(parents=True, exist_ok=True)
        (folder / "bin" / "python").touch()

    monkeypatch.setattr(mergekit_environment.venv, "create", create)
    monkeypatch.setattr(mergekit_environment.subprocess, "run", fail)
    for _ in range(2):
        with pytest.raises(ConfigError, match="could not be installed"):
            find_python("", str(tmp_path))


@pytest.mark.skipif(not PYTHON, reason="METAMERGE_MERGEKIT_PYTHON is not set")
def test_mergekit_gives_the_same(families):
    cases = {f"{i:02d}": case for i, case in enumerate(equal_cases("random"))}
    found, _ = mergekit_parity.theirs(cases, families, PYTHON)
    for name, case in cases.items():
        fused, _ = mergekit_parity.ours(case, families[case.family])
        assert mergekit_parity.difference(fused, found[name]) < mergekit_parity.TOLERANCE, case
