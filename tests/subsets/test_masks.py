"""Kernels and masks, by hand."""

import pytest
import torch

from metamerge.structure import Layout, discover_program
from metamerge.subsets import (
    Kernels,
    Live,
    by_kernel,
    find_kernels,
    live_weights,
    masks,
    placed,
    rows_subset,
    single_subset,
    taken,
    window,
)
from zoo.architectures import build, program_of

LAYER = [Kernels(("w", "b"), 4, 3)]
WEIGHTS = {"w": torch.arange(8.0).reshape(1, 4, 2), "b": torch.arange(4.0)[None]}


def test_kernels_are_rows_with_their_biases(tiny):
    told = [(own.count, own.size, own.dense) for own in tiny.kernels]
    assert told == [(2, 1 * 9 + 1, False), (3, 2 * 9 + 1, False), (4, 3 * 4 + 1, True)]
    keys = [key for own in tiny.kernels for key in own.keys]
    assert keys == list(tiny.first)


def test_every_trained_tensor_belongs_to_one_layer_or_stands_alone():
    network = build("resnet20", (1, 8, 8), 4, widths=(4, 4, 4))
    program = program_of(network, (1, 8, 8))
    kernels = find_kernels(Layout(program, discover_program(program)))
    keys = [key for own in kernels for key in own.keys]
    assert sorted(keys) == sorted(dict(network.named_parameters()))
    assert all(network.state_dict()[own.keys[0]].shape[0] == own.count for own in kernels)


def test_tensors_that_are_not_trained_have_no_kernels(tiny):
    left = find_kernels(tiny.layout, ["0.bias", "7.weight", "7.bias"])
    assert [own.keys for own in left] == [("0.weight",), ("3.weight", "3.bias")]


def test_kernel_sums_by_hand():
    values = {"w": WEIGHTS["w"][0], "b": WEIGHTS["b"][0]}
    assert by_kernel(values, LAYER).tolist() == [0 + 1 + 0, 2 + 3 + 1, 4 + 5 + 2, 6 + 7 + 3]


@pytest.mark.parametrize(
    ("share", "draw", "live"),
    [
        (0.5, 0, [0, 3]),
        (0.5, 1, [1, 2]),
        (0.5, 2, [0, 3]),  # halves alternate
        (0.75, 1, [0, 1, 3]),  # goes on with the last, then from the start
        (0.01, 0, [3]),  # one is always live
    ],
)
def test_a_window_of_an_order_by_hand(share, draw, live):
    assert window(torch.tensor([3, 0, 2, 1]), share, draw).tolist() == live


def test_live_rows_by_hand():
    subset = rows_subset(LAYER, [torch.tensor([[1, 3]])])
    live = taken(WEIGHTS, subset)
    assert live["w"].tolist() == [[[2, 3], [6, 7]]]
    assert live["b"].tolist() == [[1, 3]]
    assert live_weights(WEIGHTS, subset) == 6
    seen = masks(WEIGHTS, subset)
    assert seen["w"][0].tolist() == [[False] * 2, [True] * 2, [False] * 2, [True] * 2]
    assert seen["b"][0].tolist() == [False, True, False, True]


def test_live_single_weights_by_hand():
    subset = single_subset({"w": torch.tensor([[0, 5]])})
    assert taken(WEIGHTS, subset)["w"].tolist() == [[0, 5]]
    put = placed(WEIGHTS, {"w": torch.tensor([[10.0, 20.0]])}, subset)
    assert put["w"][0].tolist() == [[10, 1], [2, 3], [4, 20], [6, 7]]
    assert put["b"] is WEIGHTS["b"]
    assert not masks(WEIGHTS, subset)["b"].any()
    assert WEIGHTS["w"].flatten().tolist() == list(range(8))


def test_networks_have_live_rows_of_their_own():
    both = {key: torch.cat([tensor, tensor + 10]) for key, tensor in WEIGHTS.items()}
    subset = {"w": Live(torch.tensor([[0], [3]])), "b": Live()}
    assert taken(both, subset)["w"].tolist() == [[[0, 1]], [[16, 17]]]
    assert taken(both, subset)["b"].shape == (2, 4)


def test_gradients_flow_to_what_is_placed_alone():
    subset = rows_subset(LAYER, [torch.tensor([[1, 3]])])
    fixed = {key: tensor.clone().requires_grad_() for key, tensor in WEIGHTS.items()}
    live = {key: t.requires_grad_() for key, t in taken(WEIGHTS, subset).items()}
    placed(fixed, live, subset)["w"].sum().backward()
    assert live["w"].grad.tolist() == [[[1, 1], [1, 1]]]
    assert fixed["w"].grad.sum() == 4  # of the rows that were not written over
