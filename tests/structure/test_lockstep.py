import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metamerge.structure import Execution, run, trace
from metamerge.weights import stack

COUNT = 3  # networks that run side by side


def member(stacked, index):
    return {key: tensor[index] for key, tensor in stacked.items()}


def assert_same(found, expected):
    """Equal up to sums in another order: some 100 terms at most, each rounded to 1e-16 of it."""
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) < 1e-12 * (1 + float(expected.abs().max()))


def test_one_network_agrees_with_its_module(network):
    weights, inputs = network.weights(), network.inputs(4)
    found = run(network.program, weights, [inputs])
    assert_same(found, network.outputs(weights, inputs))


def test_stacked_networks_agree_with_a_loop_over_modules_on_shared_inputs(network):
    weights, inputs = network.weights(COUNT), network.inputs(4)
    found = run(network.program, weights, [inputs], stacked=True)
    expected = [network.outputs(member(weights, n), inputs) for n in range(COUNT)]
    assert_same(found, torch.stack(expected))


def test_stacked_networks_agree_with_a_loop_over_modules_on_inputs_of_their_own(network):
    weights, inputs = network.weights(COUNT), network.inputs(COUNT, 4)
    found = run(network.program, weights, [inputs], stacked=True, own_inputs=True)
    expected = [network.outputs(member(weights, n), inputs[n]) for n in range(COUNT)]
    assert_same(found, torch.stack(expected))


def test_one_network_reads_many_sets_of_inputs(network):
    weights, inputs = network.weights(), network.inputs(COUNT, 4)
    found = run(network.program, weights, [inputs], own_inputs=True)
    expected = [network.outputs(weights, own) for own in inputs]
    assert_same(found, torch.stack(expected))


def test_a_stack_of_one_has_its_axis(network):
    weights, inputs = network.weights(1), network.inputs(4)
    found = run(network.program, weights, [inputs], stacked=True)
    assert_same(found, network.outputs(member(weights, 0), inputs)[None])


def test_gradients_of_stacked_weights_are_those_of_every_network_alone(network):
    weights, inputs = network.weights(COUNT), network.inputs(4)
    model = network.build().double().eval()
    read = {key for key, _ in model.named_parameters()}
    leaves = {key: t.requires_grad_() if key in read else t for key, t in weights.items()}
    outputs = run(network.program, leaves, [inputs], stacked=True)
    direction = torch.randn(
        outputs.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    (outputs * direction).sum().backward()
    for n in range(COUNT):
        own = {
            key: t.detach().clone().requires_grad_(key in read)
            for key, t in member(weights, n).items()
        }
        (torch.func.functional_call(model, own, (inputs,)) * direction[n]).sum().backward()
        for key in read:
            assert_same(leaves[key].grad[n], own[key].grad)


def test_gradients_reach_the_inputs(network):
    weights, inputs = network.weights(COUNT), network.inputs(4).requires_grad_()
    run(network.program, weights, [inputs], stacked=True).square().sum().backward()
    expected = torch.zeros_like(inputs)
    model = network.build().double().eval()
    for n in range(COUNT):
        own = inputs.detach().clone().requires_grad_()
        torch.func.functional_call(model, member(weights, n), (own,)).square().sum().backward()
        expected += own.grad
    assert_same(inputs.grad, expected)


def test_values_are_freed_after_their_last_use(network):
    weights, inputs = network.weights(COUNT), network.inputs(4)
    execution = Execution(network.program, weights, [inputs], stacked=True)
    nodes, outputs = network.program.nodes, {*network.program.outputs}
    for i, node in enumerate(nodes):
        execution.step(node)
        made = {*network.program.inputs, *(earlier.name for earlier in nodes[: i + 1])}
        needed = outputs.union(*(later.refs for later in nodes[i + 1 :]))
        assert set(execution.values) == made & needed
    assert set(execution.values) == outputs


def test_one_value_is_alive_at_a_time_however_deep_the_chain():
    layers = [part for _ in range(12) for part in (nn.Linear(4, 4), nn.GELU())]
    program = trace(nn.Sequential(*layers), torch.zeros(2, 4))
    weights = {key: torch.ones(COUNT, *program.shape(v)) for v, key in program.parameters.items()}
    alive = weakref.WeakSet()
    most = 0
    execution = Execution(program, weights, [torch.ones(5, 4)], stacked=True)
    for node in program.nodes:
        lane = execution.step(node)
        alive.add(lane.value)
        del lane
        most = max(most, len(alive))
    assert most == 1  # what was read last is gone as soon as it was read


def test_all_outputs_are_kept():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.leave = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            x = F.gelu(self.enter(x))
            return self.leave(x), x

    program = trace(Two(), torch.zeros(2, 4))
    weights = {key: torch.ones(COUNT, *program.shape(v)) for v, key in program.parameters.items()}
    execution = Execution(program, weights, [torch.ones(2, 4)], stacked=True)
    for node in program.nodes:
        execution.step(node)
    shapes = [execution.values[name].value.shape for name in program.outputs]
    assert shapes == [(COUNT, 2, 3), (COUNT, 2, 5)]
    assert execution.output() is execution.values[program.output].value


def test_a_peek_stores_and_frees_nothing(networks):
    network = networks["mlp"]
    weights, inputs = network.weights(COUNT), network.inputs(4)
    execution = Execution(network.program, weights, [inputs], stacked=True)
    for node in network.program.nodes:
        before = dict(execution.values)
        peeked = execution.peek(node)
        assert execution.values == before
        assert torch.equal(peeked.value, execution.step(node).value)


def test_weights_may_be_filled_while_the_pass_goes_on(networks):
    network = networks["mlp"]
    weights, inputs = network.weights(COUNT), network.inputs(4)
    expected = run(network.program, weights, [inputs], stacked=True)
    late = {}
    execution = Execution(network.program, late, [inputs], stacked=True)
    for node in network.program.nodes:
        for ref in node.refs:
            if ref in network.program.parameters:
                key = network.program.parameters[ref]
                late[key] = weights[key]
        execution.step(node)
    assert torch.equal(execution.output(), expected)


def test_the_first_layer_reads_shared_inputs_without_a_copy_per_network(networks):
    network = networks["mlp"]
    inputs = network.inputs(4)
    execution = Execution(network.program, network.weights(COUNT), [inputs], stacked=True)
    first = network.program.nodes[0]
    lane = execution.argument(first, 0)
    assert lane.value is inputs
    assert not lane.stacked
    assert execution.step(first).stacked


def test_inputs_and_weights_stay_as_they_are(network):
    weights, inputs = network.weights(COUNT), network.inputs(4)
    before = {key: tensor.clone() for key, tensor in weights.items()}, inputs.clone()
    run(network.program, weights, [inputs], stacked=True)
    assert all(torch.equal(before[0][key], tensor) for key, tensor in weights.items())
    assert torch.equal(before[1], inputs)


def test_running_statistics_are_those_of_each_network_and_do_not_change(networks):
    network = networks["mlp with batch normalisation"]
    weights = network.weights(COUNT)
    statistics = weights["1.running_mean"].clone()
    rows = network.inputs(8)
    together = run(network.program, weights, [rows], stacked=True)
    alone = run(network.program, weights, [rows[:1]], stacked=True)
    assert_same(together[:, :1], alone)  # a row does not depend on those beside it
    assert torch.equal(weights["1.running_mean"], statistics)


@pytest.mark.parametrize(
    ("name", "slow", "fast"),
    [
        ("conv1d", "conv1d.default", "max_pool1d.default"),
        ("depthwise", "conv2d.default", "batch_norm.default"),
        ("conv3d", "conv3d.default", "reshape.default"),
        ("residual", "add.Tensor", "linear.default"),
        ("mlp without biases", "softmax.int", "gelu.default"),
        ("mlp with layer normalisation and dropout", "layer_norm.default", "linear.default"),
        ("batch normalisation without running statistics", "batch_norm.default", "selu.default"),
    ],
)
def test_operators_without_a_batched_form_are_mapped_over_the_networks(
    networks, mapped, name, slow, fast
):
    network = networks[name]
    ops = [node.op for node in network.program.nodes]
    run(network.program, network.weights(COUNT), [network.inputs(4)], stacked=True)
    assert {slow, fast} <= set(ops)
    assert slow in mapped
    assert fast not in mapped


def test_linear_maps_and_convolutions_are_never_mapped(networks, mapped):
    network = networks["conv2d with batch normalisation and flatten"]
    run(network.program, network.weights(COUNT), [network.inputs(4)], stacked=True)
    assert mapped == []


class Attending(nn.Module):
    """Attention in which all networks look at the same keys, with or without a mask."""

    def __init__(self, mask, causal):
        super().__init__()
        self.q, self.v, self.leave = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.register_buffer("mask", mask, persistent=False)
        self.causal = causal

    def forward(self, x):  # [b, 4, 6]
        q, k, v = (y.unflatten(-1, (2, 3)).transpose(1, 2) for y in (self.q(x), x, self.v(x)))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, is_causal=self.causal)
        return self.leave(x.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("mask", "causal", "alone"),
    [
        (None, False, False),
        (None, True, False),
        (torch.tensor([[0.0, -1.0, 2.0, 0.5]] * 4), False, False),
        (torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0)), False, True),
    ],
)
def test_attention_of_all_networks_is_one_batch_unless_its_mask_has_more_axes(
    make_network, mapped, mask, causal, alone
):
    network = make_network(lambda: Attending(mask, causal), (4, 6))
    weights, rows = network.weights(COUNT), network.inputs(5)
    found = run(network.program.in_float64(), weights, [rows], stacked=True)
    for i in range(COUNT):
        assert_same(found[i], network.outputs({k: t[i] for k, t in weights.items()}, rows))
    assert ("scaled_dot_product_attention.default" in mapped) == alone


@pytest.mark.parametrize("own_inputs", [False, True])
def test_lists_of_tensors_are_mapped_whether_stacked_or_shared(make_network, own_inputs):
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.leave = nn.Linear(4, 6), nn.Linear(10, 3)

        def forward(self, x):
            return self.leave(torch.cat([torch.relu(self.inner(x)), x], 1))

    network = make_network(Joined, (4,))
    weights = network.weights(COUNT)
    inputs = network.inputs(COUNT, 5) if own_inputs else network.inputs(5)
    found = run(network.program, weights, [inputs], stacked=True, own_inputs=own_inputs)
    expected = [
        network.outputs(member(weights, n), inputs[n] if own_inputs else inputs)
        for n in range(COUNT)
    ]
    assert_same(found, torch.stack(expected))


@pytest.mark.parametrize(
    ("start", "end"), [(1, -1), (2, 3), (-2, -1), (-3, -2), (1, 2), (2, -1), (-3, 3)]
)
def test_axes_are_flattened_from_either_end(make_network, start, end):
    network = make_network(
        lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(start, end)), (2, 4, 5)
    )
    weights, inputs = network.weights(COUNT), network.inputs(4)
    found = run(network.program, weights, [inputs], stacked=True)
    expected = [network.outputs(member(weights, n), inputs) for n in range(COUNT)]
    assert_same(found, torch.stack(expected))


def test_outputs_that_no_weight_reaches_are_given_once_per_stack():
    program = trace(nn.Flatten(), torch.zeros(2, 2, 3))
    inputs = torch.ones(4, 2, 3)
    assert run(program, {}, [inputs]).shape == (4, 6)
    assert run(program, {}, [inputs], stacked=True).shape == (1, 4, 6)


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2},
        {"stride": (1, 2), "padding": (2, 0)},
        {"dilation": (2, 1), "bias": False},
        {"kernel_size": (1, 3), "padding": (0, 1)},
    ],
)
def test_convolutions_of_all_kinds_agree_with_the_module(make_network, options):
    options = {"kernel_size": 3, **options}
    network = make_network(lambda: nn.Sequential(nn.Conv2d(2, 3, **options)), (2, 7, 8))
    weights, inputs = network.weights(COUNT), network.inputs(2)
    found = run(network.program, weights, [inputs], stacked=True)
    expected = [network.outputs(member(weights, n), inputs) for n in range(COUNT)]
    assert_same(found, torch.stack(expected))


def test_a_number_of_inputs_that_does_not_fit_is_refused(networks):
    network = networks["mlp"]
    with pytest.raises(ValueError, match="argument"):
        run(network.program, network.weights(), [network.inputs(2), network.inputs(2)])


class Positions(nn.Module):
    """Tensors that are made, constants, and sizes that are computed from the batch."""

    def __init__(self):
        super().__init__()
        self.table, self.leave = nn.Embedding(6, 4), nn.Linear(4, 3)
        self.register_buffer("factor", torch.arange(1.0, 5.0), persistent=False)

    def forward(self, x):
        places = torch.arange(x.shape[1])
        rows = torch.zeros(2 * x.shape[0], 1, 4, dtype=x.dtype)
        x = torch.cat([x * self.factor, x], 0) + self.table(places) + rows
        return self.leave(x)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_made_tensors_and_constants_are_shared_by_all_networks(rows):
    torch.manual_seed(0)
    model = Positions()
    program = trace(model, torch.zeros(2, 6, 4))
    weights = {key: torch.stack([t, 2 * t, 3 * t]) for key, t in model.state_dict().items()}
    x = torch.randn(rows, 6, 4)
    found = run(program, weights, [x], stacked=True)
    expected = [torch.func.functional_call(model, member(weights, n), (x,)) for n in range(COUNT)]
    torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize("affine", [True, False])
def test_groups_are_normalised_behind_convolutions_whose_channels_come_last(affine):
    first = nn.GroupNorm(1, 3, affine=affine)  # its input is shared by all networks
    model = nn.Sequential(first, nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8, 1e-3), nn.ReLU())
    inputs = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    program = trace(model, inputs)
    generator = torch.Generator().manual_seed(1)
    weights = [
        {k: torch.randn(t.shape, generator=generator) for k, t in model.state_dict().items()}
        for _ in range(3)
    ]
    found = run(program, stack(weights), [inputs], stacked=True)
    for own, expected in zip(found, weights, strict=True):
        model.load_state_dict(expected)
        torch.testing.assert_close(own, model(inputs), rtol=1e-4, atol=1e-4)
