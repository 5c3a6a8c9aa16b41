from collections.abc import Sequence
from dataclasses import FrozenInstanceError, replace

import pytest

from metamerge import registry
from metamerge.declaration import REQUIRED
from metamerge.errors import ConfigError
from metamerge.registry import get_method, list_methods, merge_method
from metamerge.weights import Weights


@pytest.fixture(autouse=True)
def own_register(monkeypatch):
    """Registrations of a test are gone after it."""
    list_methods()
    own = replace(registry._METHODS, records=dict(registry._METHODS.records))
    monkeypatch.setattr(registry, "_METHODS", own)


def blend(weights: Sequence[Weights], *, base, batches=None, density=0.2, sign: str) -> Weights:
    """Blend members into their base.

    More about it.
    """
    return weights[0]


def register(function=blend, **declared):
    assert merge_method(**declared)(function) is function
    return get_method(function.__name__)


def test_the_methods_of_this_package_are_listed():
    names = list_methods()
    assert names == sorted(names)
    assert {"average", "weighted_average", "rank_average", "cluster", "gnn"} <= set(names)


def test_the_record_says_what_the_signature_says():
    method = register(paper="arXiv:0000.00000")
    assert method.name == "blend"
    assert method.function is blend
    assert method.paper == "arXiv:0000.00000"
    assert method.resources == {"base", "batches"}
    assert method.required == {"base"}
    assert dict(method.options) == {"density": 0.2, "sign": REQUIRED}
    assert method.summary == "Blend members into their base."


def test_records_of_two_methods_of_the_package():
    method = get_method("cluster")
    assert method.resources == {"layout", "batches", "generator", "report"}
    assert method.required == frozenset()
    defaults = {"clusters": 2, "keep": "all", "algorithm": "ward", "by": "weights"}
    assert dict(method.options) == defaults
    assert get_method("autoencoder").required == {"layout", "merger"}
    assert get_method("gnn").required == {"layout"}  # a merger comes with the package


def test_members_are_aligned_by_weights_unless_the_method_says_otherwise():
    assert (register().align, register().aligned) == ("weight_matching", True)
    method = register(align=None)
    assert (method.align, method.aligned) == (None, False)


def test_only_coefficients_draws_and_paths_depend_on_the_order_of_members():
    ordered = [name for name in list_methods() if get_method(name).ordered]
    assert ordered == ["dare", "slerp", "weighted_average"]


def test_a_record_cannot_be_changed():
    method = register()
    with pytest.raises(FrozenInstanceError):
        method.paper = "mine"
    with pytest.raises(TypeError):
        method.options["density"] = 1.0


def test_a_module_that_runs_twice_registers_twice():
    namespace = {"merge_method": merge_method, "__name__": "somebody.module"}
    code = '@merge_method()\ndef twin(weights):\n    "Do it."\n    return weights[0]\n'
    exec(code, namespace)
    first = get_method("twin").function
    exec(code, namespace)
    assert get_method("twin").function is namespace["twin"] is not first


def test_another_function_under_a_taken_name_is_refused():
    def average(weights):
        """Average otherwise."""

    with pytest.raises(
        ConfigError, match=r"'average' already, metamerge\.methods\.average\.average"
    ):
        merge_method()(average)
    assert get_method("average").function is not average


def test_an_unknown_method_is_refused_with_a_suggestion_and_the_list():
    with pytest.raises(
        ConfigError, match=r"'avrage'\. Did you mean 'average'\?.*'cluster', 'dare',"
    ):
        get_method("avrage")
    with pytest.raises(ConfigError, match=r"method: got 'zzz'\. Expected one of 'adaptive', "):
        get_method("zzz")


def without_docstring(weights):
    return weights[0]


def positional_option(weights, density=0.2):
    """Take an option by position."""


def open_ended(weights, **options):
    """Take anything."""


def without_members(*, base):
    """Take no members."""


def nothing():
    """Take nothing."""


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (without_docstring, "has no docstring"),
        (positional_option, "'density=0.2' of a merge method must be keyword-only"),
        (open_ended, "must be keyword-only"),
        (without_members, "only positional parameter"),
        (nothing, "only positional parameter"),
    ],
)
def test_a_function_that_is_no_merge_method_is_refused(function, told):
    with pytest.raises(ConfigError, match=told):
        merge_method()(function)
    assert function.__name__ not in list_methods()


def test_the_decorator_without_parentheses_is_refused():
    with pytest.raises(ConfigError, match=r"@merge_method\(\)"):
        merge_method(blend)
