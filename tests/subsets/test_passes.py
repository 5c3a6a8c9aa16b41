"""Gradients of what is live, beside those of all weights; of what is fixed there are none."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from metamerge.structure import run
from metamerge.subsets import Live, PartialPass, rows_subset, single_subset, taken
from zoo.masks import Masks, Recipe


class Convolutions(TorchDispatchMode):
    """Which gradients of convolutions are computed: kernels, and whether one by the inputs."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            by_inputs, by_kernels, _ = args[-1]
            self.seen += [("inputs", args[2].shape[0])] * by_inputs
            self.seen += [("kernels", args[0].shape[1])] * by_kernels
        return func(*args, **(kwargs or {}))


def gradients(tiny, subset, dtype=torch.float64, networks=2):
    """Losses and gradients of the live weights, and the gradients that were computed."""
    weights = {key: tensor[:networks].to(dtype) for key, tensor in tiny.weights.items()}
    live = {key: t.requires_grad_() for key, t in taken(weights, subset).items()}
    inputs = tiny.inputs.to(dtype).expand(networks, *tiny.inputs.shape)
    outputs = PartialPass(tiny.program, subset).run(weights, live, inputs)
    targets = tiny.targets.expand(networks, -1)
    losses = F.cross_entropy(outputs.movedim(-1, 1), targets, reduction="none").mean(1)
    with Convolutions() as computed:
        grads = torch.autograd.grad(losses.sum(), list(live.values()))
    return losses.detach(), dict(zip(live, grads, strict=True)), computed.seen


def reference(tiny, subset, networks=2):
    """The same from the gradients of all weights."""
    leaves = {key: t[:networks].clone().requires_grad_() for key, t in tiny.weights.items()}
    outputs = run(tiny.program, leaves, [tiny.inputs], stacked=True)
    targets = tiny.targets.expand(networks, -1)
    losses = F.cross_entropy(outputs.movedim(-1, 1), targets, reduction="none").mean(1)
    grads = torch.autograd.grad(losses.sum(), list(leaves.values()))
    return losses.detach(), taken(dict(zip(leaves, grads, strict=True)), subset)


def subset_of(tiny, name, networks=2):
    weights = {key: tensor[:networks] for key, tensor in tiny.weights.items()}
    return Masks(tiny.kernels, weights, list(range(networks))).draw(Recipe.parse(name))


NAMES = ("full", "first", "first-conv", "first-conv+dense", "random", "random@0.3", "upper")


@pytest.mark.parametrize("name", [*NAMES, "lower", "random-weights"])
@pytest.mark.parametrize("networks", [1, 2])
def test_gradients_are_those_of_all_weights_where_these_are_live(tiny, name, networks):
    subset = subset_of(tiny, name, networks)
    losses, grads, _ = gradients(tiny, subset, networks=networks)
    expected, wanted = reference(tiny, subset, networks)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-14)
    assert list(grads) == list(wanted)
    for key, grad in grads.items():
        torch.testing.assert_close(grad, wanted[key], rtol=1e-9, atol=1e-14)


def test_float32_takes_another_memory_layout_to_the_same_gradients(tiny):
    subset = subset_of(tiny, "random")
    for networks in (1, 2):
        own = {key: Live(index[:networks]) for key, (index, _) in subset.items()}
        _, grads, _ = gradients(tiny, own, torch.float32, networks)
        for key, grad in reference(tiny, own, networks)[1].items():
            torch.testing.assert_close(grads[key].double(), grad, rtol=1e-4, atol=1e-6)


def test_of_fixed_kernels_no_gradient_is_computed(tiny):
    """The layers have 2 and 3 kernels; halves of them are 1 and 2."""
    seen = gradients(tiny, subset_of(tiny, "first", 1), networks=1)[2]
    assert sorted(seen) == [("inputs", 3), ("kernels", 1), ("kernels", 2)]
    seen = gradients(tiny, subset_of(tiny, "random-weights", 1), networks=1)[2]
    assert sorted(seen) == [("inputs", 3), ("kernels", 2), ("kernels", 3)]  # nothing is saved


def test_below_the_first_live_layer_nothing_is_computed(tiny):
    second = rows_subset(tiny.kernels[1:2], [torch.tensor([[0, 2]])])
    assert gradients(tiny, second, networks=1)[2] == [("kernels", 2)]
    dense = {key: Live() for key in tiny.kernels[-1].keys}
    assert gradients(tiny, dense, networks=1)[2] == []


def test_a_bias_alone_may_be_live(tiny):
    subset = single_subset({"3.bias": torch.tensor([[1], [2]])})
    torch.testing.assert_close(
        gradients(tiny, subset)[1]["3.bias"], reference(tiny, subset)[1]["3.bias"]
    )
