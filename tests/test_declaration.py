"""What users give for what a signature asks for."""

from collections.abc import Sequence

import pytest
import torch

from metamerge.declaration import RESOURCES, Record, bind, read_declaration
from metamerge.errors import ConfigError
from metamerge.registry import get_method
from metamerge.weights import Weights


def blend(weights: Sequence[Weights], *, base, batches=None, density=0.2, sign: str) -> Weights:
    """Blend members into their base."""
    return weights[0]


BLEND = Record(**read_declaration(blend, None, kind="merge method", positional=["weights"]))


def test_bind_passes_what_the_method_asks_for_and_nothing_else():
    base = {"w": torch.ones(1)}
    given = {"base": base, "batches": None, "layout": object(), "merger": object()}
    bound = bind(BLEND, given, {"sign": "majority"})
    assert bound == {"base": base, "sign": "majority"}
    assert bound["base"] is base


def test_bind_passes_resources_that_are_optional_where_they_are_there():
    given = {"base": {}, "batches": [1]}
    assert bind(BLEND, given, {"sign": "x", "density": 1}) == {
        **given,
        "sign": "x",
        "density": 1,
    }


@pytest.mark.parametrize(
    ("method", "resources", "told"),
    [
        ("rank_average", {"layout": 1}, "rank_average needs 'batches': pass batches="),
        ("rank_average", {"batches": 1, "layout": None}, "needs 'layout': pass model="),
        ("autoencoder", {"layout": 1}, "trainers/merger.py` and pass merger=<folder>"),
    ],
)
def test_a_missing_resource_is_named_with_the_way_to_give_it(method, resources, told):
    with pytest.raises(ConfigError, match=told):
        bind(get_method(method), resources, {})


def test_an_unknown_option_is_refused_with_a_suggestion_and_the_options():
    told = r"cluster has no option 'cluster'\. Did you mean 'clusters'\? .*clusters=2, keep='all'"
    with pytest.raises(ConfigError, match=told):
        bind(get_method("cluster"), {}, {"cluster": 3})
    with pytest.raises(ConfigError, match=r"average has no option 'power'\. It takes no options"):
        bind(get_method("average"), {}, {"power": 3})


def test_a_missing_option_is_named():
    with pytest.raises(ConfigError, match="weighted_average needs the option 'coefficients'"):
        bind(get_method("weighted_average"), {}, {})


def test_an_option_may_be_none():
    assert bind(BLEND, {"base": {}}, {"sign": None}) == {"base": {}, "sign": None}


def test_every_resource_has_a_way_to_be_given():
    assert RESOURCES.keys() == {
        *("base", "layout", "batches", "labels", "generator", "merger", "report")
    }
    assert all("pass " in way for way in RESOURCES.values())
