"""Benchmarks are commands as all others: they tell in a line what is wrong with what they got."""

import sys

import pytest

from evaluation.benchmarks import alignment, subsets, zoo_training


@pytest.mark.parametrize(
    ("module", "arguments", "told"),
    [
        (alignment, ["--task", "digit"], "no task 'digit'"),
        (zoo_training, ["--task", "digit"], "no task 'digit'"),
        (subsets, ["--masks", "rundom"], "masks: got 'rundom'"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(module, arguments, told, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code not in (0, None)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert told in lines[0]
    assert lines[0].startswith(module.__name__)
