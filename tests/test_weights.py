"""Weights: laying flat, stacking, wrapper prefixes, and what makes members incompatible."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metamerge.errors import ConfigError, IncompatibleWeights, NonFinite
from metamerge.weights import (
    check_compatible,
    check_finite,
    flatten,
    reorder,
    stack,
    strip_wrappers,
    unflatten,
    unstack,
)


def small():
    return {"b": torch.tensor([1.0, 2.0]), "steps": torch.tensor(7), "a": torch.tensor([[3.0]])}


def message_of(error, *members):
    with pytest.raises(error) as caught:
        check_compatible([(f"{'abcdef'[i]}.safetensors", w) for i, w in enumerate(members)])
    return str(caught.value)


def test_flatten_keeps_the_order_of_the_dict_and_leaves_integers_out():
    assert flatten(small()).tolist() == [1.0, 2.0, 3.0]


def test_flatten_gives_float32_whatever_comes_in():
    halves = {"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.ones(1, dtype=torch.float64)}
    assert flatten(halves).dtype == torch.float32


def test_flatten_of_integers_alone_is_an_empty_vector():
    assert flatten({"steps": torch.tensor(1)}).shape == (0,)


def test_flatten_lets_gradients_through():
    weights = {"a": torch.ones(2, requires_grad=True)}
    (2 * flatten(weights)).sum().backward()
    assert weights["a"].grad.tolist() == [2.0, 2.0]


def test_unflatten_restores_shapes_and_dtypes_and_copies_integers():
    like = small() | {"half": torch.zeros(2, dtype=torch.float16), "none": torch.zeros(0, 3)}
    restored = unflatten(flatten(like) + 1, like)
    assert list(restored) == list(like)
    assert restored["a"].tolist() == [[4.0]]
    assert restored["half"].tolist() == [1.0, 1.0]
    assert all(restored[k].dtype == like[k].dtype for k in like)
    assert all(restored[k].shape == like[k].shape for k in like)
    restored["steps"] += 1
    assert like["steps"] == 7


def test_unflatten_shares_no_memory_with_the_vector():
    like = {"a": torch.zeros(2)}
    flat = torch.zeros(2)
    unflatten(flat, like)["a"].fill_(9)
    assert flat.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("size", [2, 4])
def test_a_vector_of_another_length_is_refused(size):
    with pytest.raises(IncompatibleWeights, match=rf"\({size},\).*\(3,\)"):
        unflatten(torch.zeros(size), small())


def test_stack_adds_a_leading_axis_and_unstack_takes_it_off():
    members = [small(), {name: tensor + 1 for name, tensor in small().items()}]
    stacked = stack(members)
    assert stacked["a"].shape == (2, 1, 1)
    assert stacked["steps"].tolist() == [7, 8]
    back = unstack(stacked)
    assert len(back) == 2
    for member, restored in zip(members, back, strict=True):
        assert list(member) == list(restored)
        assert all(torch.equal(member[name], restored[name]) for name in member)


def test_stack_matches_tensors_by_name_not_by_position():
    first = {"a": torch.zeros(1), "b": torch.ones(1)}
    assert stack([first, dict(reversed(first.items()))])["b"].tolist() == [[1.0], [1.0]]


def test_stack_promotes_mixed_floating_dtypes():
    members = [{"a": torch.ones(1, dtype=dtype)} for dtype in (torch.float32, torch.bfloat16)]
    assert stack(members)["a"].dtype == torch.float32


@pytest.mark.parametrize("other", [torch.zeros(3), torch.tensor(1.0)])
def test_unstack_refuses_leading_axes_that_differ(other):
    with pytest.raises(IncompatibleWeights, match="'b' has shape"):
        unstack({"a": torch.zeros(2, 2), "b": other})


def test_reorder_takes_the_order_of_the_other():
    shuffled = dict(reversed(small().items()))
    assert torch.equal(flatten(reorder(shuffled, small())), flatten(small()))


def test_reorder_refuses_other_names():
    with pytest.raises(IncompatibleWeights, match="misses 'a', 'b', 'steps' and adds 'c'"):
        reorder({"c": torch.zeros(1)}, dict(sorted(small().items())))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "_orig_mod.module."])
def test_a_wrapper_prefix_of_one_member_is_stripped(prefix):
    wrapped = {prefix + name: tensor for name, tensor in small().items()}
    stripped = strip_wrappers([("plain", small()), ("wrapped", wrapped)])
    assert [name for name, _ in stripped] == ["plain", "wrapped"]
    assert stripped[1][1].keys() == small().keys()
    check_compatible(stripped)


def test_a_wrapper_prefix_of_the_first_member_is_stripped():
    wrapped = {f"module.{name}": tensor for name, tensor in small().items()}
    stripped = strip_wrappers([("wrapped", wrapped), ("plain", small())])
    assert stripped[0][1].keys() == small().keys()


def test_a_prefix_that_all_members_share_is_kept():
    own = {f"model.{name}": tensor for name, tensor in small().items()}
    assert all(w.keys() == own.keys() for _, w in strip_wrappers([("a", own), ("b", own)]))


def test_a_prefix_that_only_some_names_carry_is_kept():
    mixed = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    plain = {"a": torch.zeros(1), "b": torch.zeros(1)}
    assert strip_wrappers([("a", plain), ("b", mixed)])[1][1] is mixed


def test_nothing_is_stripped_where_members_still_differ():
    wrapped, other = {"module.a": torch.zeros(1)}, {"b": torch.zeros(1)}
    assert strip_wrappers([("a", wrapped), ("b", other)]) == [("a", wrapped), ("b", other)]


def test_members_of_another_width_are_named_with_the_way_out():
    text = message_of(
        IncompatibleWeights,
        {"conv1.weight": torch.zeros(32, 3, 3, 3)},
        {"conv1.weight": torch.zeros(64, 3, 3, 3)},
    )
    assert text == (
        "checkpoints[1] (b.safetensors): 'conv1.weight' has shape (64, 3, 3, 3), "
        "checkpoints[0] (a.safetensors) has (32, 3, 3, 3). Merge models of one width, or use "
        'align="optimal_transport".'
    )


def test_a_transposed_matrix_is_called_so():
    text = message_of(
        IncompatibleWeights,
        {"w": torch.zeros(2, 3)},
        {"w": torch.zeros(2, 3)},
        {"w": torch.zeros(3, 2)},
    )
    assert text.startswith("checkpoints[2] (c.safetensors)")
    assert "transposed" in text


def test_missing_and_extra_names_are_listed_up_to_ten():
    many = {f"layer{i:02}": torch.zeros(1) for i in range(12)}
    text = message_of(IncompatibleWeights, many, {"head": torch.zeros(1)})
    assert "'layer09' and 2 more" in text
    assert "'layer10'" not in text
    assert "adds 'head'" in text


def test_floating_dtypes_may_differ():
    check_compatible(
        [("a", {"w": torch.zeros(1)}), ("b", {"w": torch.zeros(1, dtype=torch.bfloat16)})]
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_float_against_another_kind_is_refused(dtype):
    text = message_of(
        IncompatibleWeights, {"w": torch.zeros(1)}, {"w": torch.zeros(1, dtype=dtype)}
    )
    assert "'w' has dtype" in text
    assert str(dtype) in text


def test_another_order_of_names_is_compatible():
    check_compatible([("a", small()), ("b", dict(reversed(small().items())))])


def test_tied_zero_size_and_scalar_tensors_are_compatible():
    tied = torch.zeros(3)
    member = {"a": tied, "b": tied, "none": torch.zeros(0, 4), "scalar": torch.tensor(1.0)}
    check_compatible([("a", member), ("b", {k: v.clone() for k, v in member.items()})])


def test_no_checkpoints_at_all_is_refused():
    with pytest.raises(ConfigError, match="at least one"):
        check_compatible([])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_values_that_are_not_finite_are_counted_and_named(value, dtype):
    weights = {"fine": torch.zeros(2), "bad": torch.tensor([1.0, value, value], dtype=dtype)}
    with pytest.raises(NonFinite, match=r"a\.pt: 'bad' holds 2 values of 3"):
        check_finite("a.pt", weights)


def test_denormals_zeros_and_integers_are_finite():
    check_finite(
        "a", {"tiny": torch.tensor([1e-45, 0.0]), "n": torch.tensor(3), "e": torch.zeros(0)}
    )


@settings(max_examples=50, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=5),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64]),
)
def test_unflatten_undoes_flatten(shapes, dtype):
    weights = {f"t{i}": torch.randint(0, 9, shape).to(dtype) for i, shape in enumerate(shapes)}
    restored = unflatten(flatten(weights), weights)
    assert all(torch.equal(restored[name], weights[name]) for name in weights)
