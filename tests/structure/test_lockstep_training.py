"""Batched passes in training: batch statistics, convolutions and pooling beside torch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metamerge.structure import Execution, run, trace
from zoo.architectures import resnet20

COUNT, ROWS = 3, 6


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def stacked_weights(model):
    """Weights of as many networks, all different; variances are positive."""
    made = {}
    for place, (key, tensor) in enumerate(model.state_dict().items()):
        made[key] = tensor.expand(COUNT, *tensor.shape).clone()
        if tensor.is_floating_point():
            drawn = 0.5 * noise(COUNT, *tensor.shape, seed=place + 1)
            made[key] = drawn.abs() + 0.5 if key.endswith("running_var") else drawn
    return made


def leaves_of(weights, keys):
    return {k: t.clone().requires_grad_(k in keys) for k, t in weights.items()}


def execute(program, weights, inputs, *, training=True):
    execution = Execution(
        program, weights, [inputs], stacked=True, own_inputs=True, training=training
    )
    for node in program.nodes:
        execution.step(node)
    return execution


def assert_close(found, expected, bound=1e-12):
    """Equal up to ``bound`` of the largest entry: sums in another order."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    furthest = (found - expected).detach().abs().max()
    assert float(furthest) <= bound * float(expected.detach().abs().max())


# ---------------------------------------------------------------------------- batch statistics


class Widened(nn.Module):
    """A batch norm of the sum of two branches, whose maps lie differently in memory."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.shift = nn.Parameter(torch.zeros(3, 1, 1))

    def forward(self, x):
        return self.norm(self.conv(x) + self.shift + x.mean(1, keepdim=True))


NORMALISED = {
    "units": (lambda: nn.Sequential(nn.BatchNorm1d(5)), (5,)),
    "signals": (lambda: nn.Sequential(nn.BatchNorm1d(5)), (5, 4)),
    "maps": (lambda: nn.Sequential(nn.BatchNorm2d(3)), (3, 4, 5)),
    "volumes": (lambda: nn.Sequential(nn.BatchNorm3d(2)), (2, 3, 2, 2)),
    "without factors": (lambda: nn.Sequential(nn.BatchNorm2d(3, affine=False)), (3, 4, 5)),
    "slow and coarse": (lambda: nn.Sequential(nn.BatchNorm1d(5, eps=0.3, momentum=0.7)), (5,)),
    "behind a linear layer": (
        lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)),
        (5,),
    ),
    "behind convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(4, 3, 1, bias=False), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2),
        ),
        (2, 6, 7),
    ),
    "of two branches": (Widened, (2, 4, 5)),
    "residual": (lambda: resnet20((2, 6, 6), 3, widths=(2, 3), norm="batch"), (2, 6, 6)),
}  # fmt: skip


@pytest.fixture(scope="module", params=NORMALISED)
def normalised(request):
    build, shape = NORMALISED[request.param]
    program = trace(build().double().eval(), torch.rand(2, *shape, dtype=torch.float64))
    return build, program, noise(COUNT, ROWS, *shape)


def modules(build, weights):
    """The networks one by one, in training mode."""
    for n in range(COUNT):
        model = build().double().train()
        model.load_state_dict({key: tensor[n] for key, tensor in weights.items()})
        yield n, model


def test_statistics_and_outputs_are_those_of_modules_in_training_mode(normalised):
    build, program, inputs = normalised
    weights = stacked_weights(build())
    execution = execute(program, weights, inputs)
    running = {key for key in weights if key.endswith(("running_mean", "running_var"))}
    assert execution.statistics.keys() == running
    for n, model in modules(build, weights):
        assert_close(execution.output()[n], model(inputs[n]).detach())
        for key, buffer in model.named_buffers():
            if key in running:
                assert_close(execution.statistics[key][n], buffer)
                assert not torch.allclose(weights[key][n], buffer)


def test_gradients_in_training_are_those_of_modules(normalised):
    build, program, inputs = normalised
    weights = stacked_weights(build())
    keys = [key for key, _ in build().named_parameters()]
    leaves, given = leaves_of(weights, keys), inputs.clone().requires_grad_()
    outputs = execute(program, leaves, given).output()
    direction = noise(*outputs.shape, seed=9)
    (outputs * direction).sum().backward()
    for n, model in modules(build, weights):
        own = inputs[n].clone().requires_grad_()
        (model(own) * direction[n]).sum().backward()
        # A gradient through a normalisation is a difference of terms, many of them after each
        # other: those cancel to some 1e-3 of their size, each rounded to 1e-16.
        assert_close(given.grad[n], own.grad, 1e-9)
        for key, parameter in model.named_parameters():
            scale = 1 + float(parameter.grad.abs().max())  # biases before a norm have gradient 0
            assert float((leaves[key].grad[n] - parameter.grad).abs().max()) < 1e-10 * scale, key


def test_a_pass_in_training_changes_neither_weights_nor_inputs(normalised):
    build, program, inputs = normalised
    weights, given = stacked_weights(build()), inputs.clone()
    before = {key: tensor.clone() for key, tensor in weights.items()}
    statistics = execute(program, weights, given).statistics
    assert all(torch.equal(weights[key], tensor) for key, tensor in before.items())
    assert torch.equal(given, inputs)
    assert not any(tensor.requires_grad for tensor in statistics.values())


def test_out_of_training_nothing_is_normalised_by_the_batch(normalised):
    build, program, inputs = normalised
    weights = stacked_weights(build())
    execution = execute(program, weights, inputs, training=False)
    assert execution.statistics == {}
    expected = run(program, weights, [inputs], stacked=True, own_inputs=True)
    assert torch.equal(execution.output(), expected)
    for n, model in modules(build, weights):
        assert_close(expected[n], model.eval()(inputs[n]).detach(), 1e-11)


def test_batch_statistics_by_hand():
    """Rows 1 and 3: mean 2, variance 1, divided by the root of 1 + 3; unbiased, variance 2.

    Running ones go half of the way, with momentum 0.5.
    """
    program = trace(nn.BatchNorm1d(1, eps=3.0, momentum=0.5).eval(), torch.zeros(2, 1))
    weights = {"weight": [[2.0], [1.0]], "bias": [[0.5], [0.0]]}
    weights |= {"running_mean": [[0.0], [4.0]], "running_var": [[1.0], [0.0]]}
    weights = {key: torch.tensor(value) for key, value in weights.items()}
    inputs = torch.tensor([[[1.0], [3.0]], [[4.0], [6.0]]])
    execution = execute(program, weights, inputs)
    assert execution.output().tolist() == [[[-0.5], [1.5]], [[-0.5], [0.5]]]
    assert execution.statistics["running_mean"].tolist() == [[1.0], [4.5]]
    assert execution.statistics["running_var"].tolist() == [[1.5], [1.0]]


def test_networks_do_not_share_statistics(normalised):
    build, program, inputs = normalised
    weights = stacked_weights(build())
    before = execute(program, weights, inputs)
    other = inputs.clone()
    other[1] = other[1].square()
    after = execute(program, weights, other)
    for key, tensor in after.statistics.items():
        assert torch.equal(tensor[[0, 2]], before.statistics[key][[0, 2]])
        assert not torch.allclose(tensor[1], before.statistics[key][1])


def test_batch_norm_without_running_statistics_is_the_same_in_training():
    def build():
        return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False))

    program = trace(build().double().eval(), torch.rand(2, 5, dtype=torch.float64))
    weights, inputs = stacked_weights(build()), noise(COUNT, ROWS, 5)
    execution = execute(program, weights, inputs)
    assert execution.statistics == {}
    for n, model in modules(build, weights):
        assert_close(execution.output()[n], model(inputs[n]).detach())


def test_batch_norm_in_training_is_one_call_for_all_networks(mapped):
    build, shape = NORMALISED["behind convolutions"]
    program = trace(build().double().eval(), torch.rand(2, *shape, dtype=torch.float64))
    execute(program, stacked_weights(build()), noise(COUNT, ROWS, *shape))
    assert mapped == []


def test_networks_may_share_the_input_that_they_normalise():
    build, shape = NORMALISED["units"]
    program = trace(build().double().eval(), torch.rand(2, *shape, dtype=torch.float64))
    weights, shared = stacked_weights(build()), noise(ROWS, *shape)
    execution = Execution(program, weights, [shared], stacked=True, training=True)
    for node in program.nodes:
        execution.step(node)
    for n, model in modules(build, weights):
        assert_close(execution.output()[n], model(shared).detach())


def test_a_batch_norm_that_is_used_twice_moves_its_statistics_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.inner = nn.BatchNorm1d(5), nn.Linear(5, 5)

        def forward(self, x):
            return self.norm(self.inner(self.norm(x)))

    program = trace(Twice().double().eval(), torch.rand(2, 5, dtype=torch.float64))
    weights, inputs = stacked_weights(Twice()), noise(COUNT, ROWS, 5)
    execution = execute(program, weights, inputs)
    for n, model in modules(Twice, weights):
        assert_close(execution.output()[n], model(inputs[n]).detach())
        assert_close(execution.statistics["norm.running_mean"][n], model.norm.running_mean)


# ---------------------------------------------------------------------------- convolutions

CONVOLUTIONS = {
    "plain": (2, 4, {"kernel_size": 3}),
    "odd channels": (3, 5, {"kernel_size": 3, "padding": 1}),
    "one channel": (1, 1, {"kernel_size": (2, 3)}),
    "pointwise": (4, 3, {"kernel_size": 1, "stride": 2, "bias": False}),
    "strides": (3, 4, {"kernel_size": 3, "stride": (2, 1), "padding": (0, 2)}),
    "dilation": (2, 3, {"kernel_size": (3, 2), "dilation": (2, 3)}),
    "same": (3, 2, {"kernel_size": (4, 3), "padding": "same", "bias": False}),
    "valid": (3, 2, {"kernel_size": 3, "padding": "valid", "stride": 2}),
    "groups": (4, 6, {"kernel_size": 3, "groups": 2}),
    "depthwise": (3, 3, {"kernel_size": 3, "padding": 1, "groups": 3, "bias": False}),
}
SPATIAL = (7, 8)
BOUNDS = {  # of the largest entry; sums of up to 6 * 42 products
    torch.float64: 1e-13,
    torch.float32: 1e-5,
    torch.bfloat16: 2**-7,  # of the result in the end: its own eight bits
}


class Convolved(nn.Module):
    """All of them side by side: each reads an input and gives an output of its own."""

    def __init__(self):
        super().__init__()
        self.each = nn.ModuleDict(
            {name: nn.Conv2d(*sizes, **given) for name, (*sizes, given) in CONVOLUTIONS.items()}
        )

    def forward(self, *inputs):
        return tuple(conv(x) for conv, x in zip(self.each.values(), inputs, strict=True))


@pytest.fixture(scope="module")
def convolved():
    model = Convolved()
    inputs = [torch.rand(2, conv.in_channels, *SPATIAL) for conv in model.each.values()]
    return model, trace(model, tuple(inputs))


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("own_inputs", [True, False], ids=["own inputs", "shared input"])
@pytest.mark.parametrize("place", range(len(CONVOLUTIONS)), ids=list(CONVOLUTIONS))
def test_convolutions_and_their_gradients_are_those_of_each_network(
    convolved, place, own_inputs, dtype
):
    model, program = convolved
    name, module = list(model.each.items())[place]
    leaves = {
        key: (0.3 * noise(COUNT, *tensor.shape, seed=place, dtype=dtype)).requires_grad_()
        for place, (key, tensor) in enumerate(model.state_dict().items())
    }
    lead = (COUNT, ROWS) if own_inputs else (ROWS,)
    inputs = [
        noise(*lead, conv.in_channels, *SPATIAL, seed=5, dtype=dtype).requires_grad_()
        for conv in model.each.values()
    ]
    execution = Execution(program, leaves, inputs, stacked=True, own_inputs=own_inputs)
    for node in program.nodes:
        execution.step(node)
    outputs, given = execution.values[program.outputs[place]].value, inputs[place]
    direction = noise(*outputs.shape, seed=6, dtype=dtype)
    (outputs * direction).sum().backward()

    # The slow way: every network by itself, in float64, on the same rounded numbers.
    slow = {
        key: tensor.detach().double().requires_grad_()
        for key, tensor in leaves.items()
        if key.startswith(f"each.{name}.")
    }
    weight, bias = slow[f"each.{name}.weight"], slow.get(f"each.{name}.bias")
    own = given.detach().double().requires_grad_()
    expected = torch.stack(
        [
            F.conv2d(
                own[n] if own_inputs else own, weight[n], None if bias is None else bias[n],
                module.stride, module.padding, module.dilation, module.groups,
            )
            for n in range(COUNT)
        ]
    )  # fmt: skip
    (expected * direction.double()).sum().backward()
    pairs = {"outputs": (outputs.detach(), expected.detach()), "inputs": (given.grad, own.grad)}
    pairs |= {key: (leaves[key].grad, tensor.grad) for key, tensor in slow.items()}
    for key, (found, wanted) in pairs.items():
        assert found.dtype == dtype
        furthest = float((found.double() - wanted).abs().max())
        assert furthest < BOUNDS[dtype] * float(wanted.abs().max()), key


def test_convolutions_are_one_call_for_all_networks(mapped):
    channels, width, options = CONVOLUTIONS["strides"]
    module = nn.Conv2d(channels, width, **options)
    program = trace(module, torch.rand(2, channels, *SPATIAL))
    weights = stacked_weights(module)
    run(program, weights, [noise(COUNT, 2, channels, *SPATIAL)], stacked=True, own_inputs=True)
    run(program, weights, [noise(2, channels, *SPATIAL)], stacked=True)
    assert mapped == []


def test_a_chain_of_convolutions_and_pools_is_that_of_each_network_in_float32():
    """Maps stay with their channels last from one to the next, and are flattened all the same."""

    def build():
        return nn.Sequential(
            nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(5, 4, 3),
            nn.AvgPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2),
        )  # fmt: skip

    program = trace(build(), torch.rand(2, 3, 8, 12))
    weights = {key: tensor.float() for key, tensor in stacked_weights(build()).items()}
    leaves, inputs = leaves_of(weights, weights.keys()), noise(COUNT, ROWS, 3, 8, 12).float()
    run(program, leaves, [inputs], stacked=True, own_inputs=True).square().sum().backward()
    for n in range(COUNT):
        own = {key: tensor[n].clone().requires_grad_() for key, tensor in weights.items()}
        torch.func.functional_call(build(), own, (inputs[n],)).square().sum().backward()
        for key in weights:
            assert_close(leaves[key].grad[n], own[key].grad, 1e-5)


# ---------------------------------------------------------------------------- pooling

POOLS = {
    "max 1d": (nn.MaxPool1d(2), 1),
    "max 1d with overlap": (nn.MaxPool1d(3, 1, padding=1), 1),
    "mean 1d": (nn.AvgPool1d(3, 2), 1),
    "adaptive mean 1d": (nn.AdaptiveAvgPool1d(3), 1),
    "adaptive mean 1d to one": (nn.AdaptiveAvgPool1d(1), 1),
    "max 2d": (nn.MaxPool2d(2), 2),
    "max 2d, ragged": (nn.MaxPool2d((3, 2), stride=2, padding=(1, 0), ceil_mode=True), 2),
    "max 2d, dilated": (nn.MaxPool2d(2, stride=1, dilation=2), 2),
    "mean 2d": (nn.AvgPool2d((2, 3), stride=(1, 2), padding=(0, 1)), 2),
    "mean 2d without its pads": (nn.AvgPool2d(3, padding=1, count_include_pad=False), 2),
    "mean 2d with a divisor": (nn.AvgPool2d(2, divisor_override=3), 2),
    "adaptive mean 2d": (nn.AdaptiveAvgPool2d((2, 3)), 2),
    "adaptive mean 2d to one": (nn.AdaptiveAvgPool2d(1), 2),
    "adaptive mean 2d to one by one": (nn.AdaptiveAvgPool2d((1, 1)), 2),
    "adaptive mean 2d to one row": (nn.AdaptiveAvgPool2d((1, 3)), 2),
    "adaptive mean 2d to one row of its own": (nn.AdaptiveAvgPool2d((1, None)), 2),
    "max 3d": (nn.MaxPool3d(2), 3),
    "mean 3d": (nn.AvgPool3d(2, stride=1), 3),
    "adaptive mean 3d to one": (nn.AdaptiveAvgPool3d(1), 3),
}
SIZES = (5, 6, 4)


class Pooled(nn.Module):
    """All of them side by side: one value per number of axes goes in, one per pool comes out."""

    def __init__(self):
        super().__init__()
        self.pools = nn.ModuleList(module for module, _ in POOLS.values())

    def forward(self, line, plane, room):
        values = (line, plane, room)
        return tuple(
            module(values[axes - 1])
            for module, (_, axes) in zip(self.pools, POOLS.values(), strict=True)
        )


@pytest.fixture(scope="module", params=[(), (3,)], ids=["no channels", "channels"])
def pooled(request):
    """Values of a network ``[b, places]``, which pooling takes for channels, or ``[b, c, ...]``."""
    shapes = [(*request.param, *SIZES[:axes]) for axes in (1, 2, 3)]
    program = trace(Pooled(), tuple(torch.rand(2, *shape) for shape in shapes))
    return program, [noise(COUNT, 4, *shape, seed=place) for place, shape in enumerate(shapes)]


@pytest.mark.parametrize("place", range(len(POOLS)), ids=list(POOLS))
def test_pooling_and_its_gradient_are_those_of_each_network(pooled, place):
    program, values = pooled
    module, axes = list(POOLS.values())[place]
    leaves = [value.clone().requires_grad_() for value in values]
    execution = Execution(program, {}, leaves, stacked=True, own_inputs=True)
    for node in program.nodes:
        execution.step(node)
    outputs = execution.values[program.outputs[place]].value
    given, own = leaves[axes - 1], values[axes - 1].clone().requires_grad_()
    expected = torch.stack([module(own[n]) for n in range(COUNT)])
    assert_close(outputs, expected)
    direction = noise(*outputs.shape, seed=9)
    for found in (outputs, expected):
        (found * direction).sum().backward()
    assert_close(given.grad, own.grad)


def test_pooling_is_one_call_for_all_networks(pooled, mapped):
    program, values = pooled
    run(program, {}, values, stacked=True, own_inputs=True)
    assert mapped == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_mean_over_all_places_hands_every_place_its_share(dtype):
    program = trace(nn.AdaptiveAvgPool2d(1), torch.rand(2, 3, 4, 5))
    given = noise(COUNT, 2, 3, 4, 5, dtype=dtype).requires_grad_()
    outputs = run(program, {}, [given], stacked=True, own_inputs=True)
    assert_close(outputs, given.detach().mean((-1, -2), keepdim=True), 1e-6)
    direction = noise(*outputs.shape, seed=1, dtype=dtype)
    (outputs * direction).sum().backward()
    assert_close(given.grad, (direction / 20).expand_as(given), 1e-6)
