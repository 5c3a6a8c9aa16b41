from types import SimpleNamespace

import pytest

from evaluation.contestants import champion
from metamerge.errors import ConfigError


def contestant(accuracy, *zoos):
    validation = {"validation_accuracy": accuracy}
    card = {"zoos": [{"digest": zoo} for zoo in zoos], "validation": validation}
    return SimpleNamespace(card=card)


def test_the_champion_is_whoever_was_best_on_validation_families():
    worse, better = contestant(0.8, "a", "b"), contestant(0.9, "b", "a")
    assert champion([worse, better]) is better
    assert champion([better, worse]) is better


def test_mergers_of_different_zoos_have_no_champion():
    with pytest.raises(ConfigError, match=r"registered: .* different zoos"):
        champion([contestant(0.8, "a"), contestant(0.9, "b")])


def test_a_single_merger_is_the_champion():
    only = contestant(0.1, "a")
    assert champion([only]) is only
