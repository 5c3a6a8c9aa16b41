"""What ensembles declare by their signatures."""

import pytest
from torch import nn

from metamerge.declaration import REQUIRED
from metamerge.ensembles import get_ensemble, list_ensembles, stacking
from metamerge.ensembles.kinds import consensus
from metamerge.errors import ConfigError


def test_a_record_says_what_the_signature_says():
    kind = get_ensemble("gated_consensus")
    assert (kind.resources, kind.required) == ({"report"}, frozenset())
    assert dict(kind.options) == {"neighbours": None, "sharpness": 4.0, "similar": "inputs"}
    assert get_ensemble("stacking").function is stacking
    assert get_ensemble("stacking").resources == {"generator", "report"}


def test_what_is_fitted_and_what_puts_out_numbers_is_told():
    kinds = [get_ensemble(name) for name in list_ensembles()]
    made_of_nothing = {kind.name for kind in kinds if not kind.fitted}
    assert made_of_nothing == {"soft_vote", "majority_vote", "mean"}
    assert {kind.name for kind in kinds if kind.numbers} == {
        "mean",
        "weighted_mean",
        "stacked_mean",
    }


def test_no_kind_has_an_option_that_one_must_give():
    for name in list_ensembles():
        assert REQUIRED not in get_ensemble(name).options.values()


def test_an_unknown_kind_is_refused_with_a_suggestion():
    told = r"kind: got 'staking'\. Did you mean 'stacking'\? Expected one of 'convolutional_cons"
    with pytest.raises(ConfigError, match=told):
        get_ensemble("staking")


def test_a_fit_without_labels_is_refused():
    def blind(seen) -> nn.Module:
        """Look at outputs alone."""

    with pytest.raises(ConfigError, match="takes what members say, labels as positional"):
        consensus()(blind)
    assert "blind" not in list_ensembles()


def test_a_taken_name_is_refused():
    def other() -> nn.Module:
        """Do otherwise."""

    with pytest.raises(ConfigError, match="there is a kind of ensemble 'mean' already"):
        consensus(name="mean", fitted=False)(other)
