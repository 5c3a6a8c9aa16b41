from dataclasses import replace

import pytest
import torch
from torch import nn

from metamerge.corrections.refit import (
    Target,
    construct,
    fold,
    mean_target,
    mixed_target,
    observe,
    refit,
    solve_ridge,
)
from metamerge.structure import OUTPUTS, Layout, discover_program, run, trace

FAMILIES, MEMBERS = 2, 3


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.inner = nn.Linear(6, 8), nn.Linear(8, 8)
        self.leave = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.enter(x))
        return self.leave(torch.relu(x + self.inner(x)))


class Positions(nn.Module):
    """Linear layers that read rows by positions, then their mean."""

    def __init__(self):
        super().__init__()
        self.enter, self.inner, self.leave = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 3)

    def forward(self, x):
        x = torch.relu(self.inner(torch.relu(self.enter(x))))
        return self.leave(x.mean(1))


MODELS = {
    "mlp": (
        lambda: nn.Sequential(
            nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3)
        ),
        (6,),
    ),
    "layer norm": (
        lambda: nn.Sequential(
            nn.Linear(6, 12), nn.LayerNorm(12), nn.GELU(), nn.Linear(12, 3, bias=False)
        ),
        (6,),
    ),
    "residual": (Residual, (6,)),
    "positions": (Positions, (4, 6)),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 5, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(5, 3),
        ),
        (2, 9, 9),
    ),
    "conv1d": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 6, 3),
            nn.ReLU(),
            nn.Conv1d(6, 4, 3),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(16, 3),
        ),
        (2, 8),
    ),
    "depthwise": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 6, 3),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, groups=6),
            nn.ReLU(),
            nn.Conv2d(6, 4, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 3),
        ),
        (2, 7, 7),
    ),
    "batch norm": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 6, 3, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 5, 3, bias=False),
            nn.BatchNorm2d(5),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(5, 3),
        ),
        (2, 7, 7),
    ),
}


class Setting:
    """A network with random members and calibration inputs, all in float64."""

    def __init__(self, model, shape, rows=50):  # by 81 positions: below MAX_ROWS
        self.model = model.double().eval()
        self.program = trace(model.float(), torch.zeros(2, *shape))
        self.layout = Layout(self.program, discover_program(self.program))
        self.model.double()
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(rows, *shape, generator=generator, dtype=torch.float64)
        self.members = self.draw(FAMILIES, MEMBERS)

    def draw(self, *sizes, seed=1):
        """Random weights ``[*sizes, ...]``; running variances are positive."""
        generator = torch.Generator().manual_seed(seed)
        made = {}
        for key, tensor in self.model.state_dict().items():
            shape = (*sizes, *tensor.shape)
            if not tensor.is_floating_point():
                made[key] = tensor.expand(shape).clone()
                continue
            noise = torch.randn(shape, generator=generator, dtype=torch.float64)
            noise = noise / max(1, tensor[0].numel()) ** 0.5 if tensor.ndim > 1 else noise
            made[key] = noise.abs() + 0.5 if key.endswith("running_var") else noise
        return made

    @property
    def average(self):
        return averaged(self.members)

    def outputs(self, weights):
        return run(self.program, weights, [self.inputs], stacked=True)

    def before_activation(self, weights, name):
        """What a submodule gives out, the slow way: rows by units."""
        self.model.load_state_dict(weights)
        seen = []
        hook = dict(self.model.named_modules())[name].register_forward_hook(
            lambda module, args, output: seen.append(output.detach())
        )
        self.model(self.inputs)
        hook.remove()
        output = seen[0]
        linear = isinstance(dict(self.model.named_modules())[name], nn.Linear)
        return (output if linear else output.movedim(1, -1)).flatten(0, -2)


def averaged(members):
    return {k: t.mean(1) if t.is_floating_point() else t[:, 0] for k, t in members.items()}


def at(weights, *index):
    return {key: tensor[index] for key, tensor in weights.items()}


def name_of(layer):
    return layer.weight.removesuffix(".weight")


def largest_difference(one, other):
    return max(float((one[key] - other[key]).abs().max()) for key in other)


@pytest.fixture(scope="module", params=MODELS)
def setting(request):
    build, shape = MODELS[request.param]
    return Setting(build(), shape)


@pytest.fixture(scope="module")
def mlp():
    build, shape = MODELS["mlp"]
    return Setting(build(), shape)


def ridge_problem(rows, columns):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, rows, columns, generator=generator, dtype=torch.float64)
    targets = torch.randn(2, rows, 4, generator=generator, dtype=torch.float64)
    return inputs, targets


@pytest.mark.parametrize(("rows", "columns"), [(40, 7), (12, 12), (9, 30)])
@pytest.mark.parametrize("ridge", [1e-2, 1.0])
def test_ridge_regression_agrees_with_the_normal_equations_in_both_forms(rows, columns, ridge):
    inputs, targets = ridge_problem(rows, columns)
    found = solve_ridge(inputs, targets, ridge)
    for f in range(2):
        x, y = inputs[f], targets[f]
        penalty = ridge * rows * x.square().mean() + 1e-8
        primal = torch.linalg.solve(x.T @ x + penalty * torch.eye(columns).double(), x.T @ y)
        kernel = x.T @ torch.linalg.solve(x @ x.T + penalty * torch.eye(rows).double(), y)
        assert torch.allclose(primal, kernel, atol=1e-10)
        assert torch.allclose(found[f], primal, atol=1e-10)
    # The largest eigenvalue is at most the trace, so the condition is at most columns / ridge + 1.
    rough = solve_ridge(inputs.float(), targets.float(), ridge).double()
    bound = (columns / ridge + 1) * 2**-23
    assert float((rough - found).norm() / found.norm()) < bound


@pytest.mark.parametrize(("rows", "columns", "size"), [(40, 7, 7), (9, 30, 9)])
def test_the_smaller_of_the_two_matrices_is_factorised(monkeypatch, rows, columns, size):
    factorised = []
    original = torch.linalg.cholesky
    monkeypatch.setattr(
        torch.linalg, "cholesky", lambda gram: factorised.append(gram.shape) or original(gram)
    )
    solve_ridge(*ridge_problem(rows, columns), 0.1)
    assert factorised == [(2, size, size)]


def test_the_solution_of_a_ridge_regression_is_a_minimum():
    inputs, targets = ridge_problem(40, 7)
    solution = solve_ridge(inputs, targets, 0.1)

    def loss(change):
        candidate = solution + change
        penalty = 0.1 * 40 * inputs.square().mean((1, 2)) * candidate.square().sum((1, 2))
        return (inputs @ candidate - targets).square().sum((1, 2)) + penalty

    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        change = torch.randn(solution.shape, generator=generator, dtype=torch.float64) / 100
        assert (loss(change) > loss(torch.zeros_like(change))).all()


def test_ridge_regression_by_hand():
    # x = 1, 2 and y = 2, 4: x'y = 10, x'x = 5 and 2 * mean(x^2) = 5, so the slope is 10 / (5 + 5r).
    inputs, targets = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[2.0], [4.0]]])
    assert solve_ridge(inputs, targets, 0.0).item() == pytest.approx(2, rel=1e-6)
    assert solve_ridge(inputs, targets, 1.0).item() == pytest.approx(1, rel=1e-6)
    assert solve_ridge(inputs, targets, torch.tensor(3.0)).item() == pytest.approx(0.5, rel=1e-6)


def test_inputs_that_are_all_zero_give_a_zero_solution():
    targets = torch.ones(1, 5, 2)
    for columns in (3, 9):
        solution = solve_ridge(torch.zeros(1, 5, columns), targets, 1e-2)
        assert torch.equal(solution, torch.zeros(1, columns, 2))


@pytest.mark.parametrize(("rows", "columns"), [(6, 3), (3, 6)])
def test_ridge_regression_can_be_differentiated_in_both_forms(rows, columns):
    inputs, targets = ridge_problem(rows, columns)
    ridge = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    arguments = inputs.requires_grad_(), targets.requires_grad_(), ridge
    assert torch.autograd.gradcheck(solve_ridge, arguments)


def test_mixing_by_hand():
    # One unit on two rows. Members -1, 1 and 6, 0: means 0 and 3, spreads 1 and 3. Mixed 1 : 3 they
    # are 4.25, 0.25: mean 2.25, spread 2, to be stretched to (1 + 3 * 3) / 4 = 2.5.
    observed = torch.tensor([[-1.0, 1.0], [6.0, 0.0]])[None, :, :, None]
    mixing = torch.tensor([0.25, 0.75])[None, :, None]
    mixed = mixed_target(observed, mixing)
    assert mixed.shape == (1, 2, 1)
    assert mixed.flatten().tolist() == pytest.approx([4.75, -0.25])
    doubled = mixed_target(observed, mixing, 2.0)
    assert doubled.flatten().tolist() == pytest.approx([7.25, -2.75])
    # Evenly mixed: 2.5, 0.5, mean 1.5 and spread 1, stretched to 2.
    assert mean_target(None, observed).value.flatten().tolist() == pytest.approx([3.5, -0.5])
    assert mean_target(None, observed).strength == 1


def test_folding_by_hand():
    # Unit 2x + 1 of mean 5 doubled about its mean, and the mean moved to 7: 4x - 1, since x is 2.
    weight, bias = torch.tensor([[[2.0]]]), torch.tensor([[1.0]])
    factor, mean, wanted = (torch.tensor([[value]]) for value in (2.0, 5.0, 7.0))
    scaled, moved = fold(weight, bias, factor, mean, wanted)
    assert (scaled.item(), moved.item()) == (4, -1)
    assert fold(weight, None, factor, mean, wanted)[1] is None


def single_chain(bias):
    """Inputs 0, 1, 2 pass one hidden unit unchanged; members read 2h (+ 1) and 4h (+ 3) off it."""
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1, bias=bias))
    setting = Setting(model, (1,))
    setting.inputs = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    members = {
        "0.weight": torch.ones(1, 2, 1, 1),
        "0.bias": torch.zeros(1, 2, 1),
        "2.weight": torch.tensor([2.0, 4.0]).reshape(1, 2, 1, 1),
    }
    if bias:
        members["2.bias"] = torch.tensor([1.0, 3.0]).reshape(1, 2, 1)
    members = {key: t.double() for key, t in members.items()}
    fused = {key: t[:, 0] * (key.startswith("0")) for key, t in members.items()}
    return setting, members, fused


@pytest.mark.parametrize(("ridge", "slope"), [(0.0, 3), (0.5, 2), (1.0, 1.5), (2.0, 1)])
def test_a_line_through_three_points_by_hand(ridge, slope):
    # The target is 3h + 2. About the means, h'h = 2 and 3 * mean(h^2) = 2: slope 6 / (2 + 2r). The
    # line passes through the means 1 and 5 whatever its slope.
    setting, members, fused = single_chain(bias=True)
    fitted = refit(fused, members, setting.layout, setting.inputs, ridge=ridge)
    assert fitted["0.weight"].item() == pytest.approx(1)
    assert fitted["0.bias"].item() == pytest.approx(0, abs=1e-12)
    assert fitted["2.weight"].item() == pytest.approx(slope, rel=1e-6)
    assert fitted["2.bias"].item() == pytest.approx(5 - slope, rel=1e-6)


@pytest.mark.parametrize(("ridge", "slope"), [(0.0, 3), (0.5, 2), (2.0, 1)])
def test_a_line_through_the_origin_by_hand(ridge, slope):
    # Without a bias nothing is centred: h'h = 5 = 3 * mean(h^2), the target 3h gives 15 / (5 + 5r).
    setting, members, fused = single_chain(bias=False)
    fitted = refit(fused, members, setting.layout, setting.inputs, ridge=ridge)
    assert fitted["2.weight"].item() == pytest.approx(slope, rel=1e-6)


def test_pre_activations_are_those_of_every_member_alone(setting):
    observed = observe(setting.members, setting.layout, setting.inputs)
    assert list(observed) == [layer.node for layer in setting.layout.layers]
    for layer in setting.layout.layers:
        for f in range(FAMILIES):
            for m in range(MEMBERS):
                own = setting.before_activation(at(setting.members, f, m), name_of(layer))
                assert torch.allclose(observed[layer.node][f, m], own, atol=1e-12)


def test_fused_weights_equal_to_the_only_member_stay_as_they_are(setting):
    members = setting.draw(FAMILIES, 1)
    fitted = refit(averaged(members), members, setting.layout, setting.inputs)
    assert largest_difference(fitted, averaged(members)) < 1e-10


def test_identical_members_are_a_fixed_point(setting):
    members = {k: t.repeat_interleave(3, 1) for k, t in setting.draw(FAMILIES, 1).items()}
    fitted = refit(averaged(members), members, setting.layout, setting.inputs)
    assert largest_difference(fitted, averaged(members)) < 1e-10


@pytest.mark.parametrize("ridge", [1e-2, 1e-1])
def test_outputs_come_closer_to_what_the_members_compute_together(setting, ridge):
    observed = observe(setting.members, setting.layout, setting.inputs)
    last = setting.layout.layers[-1]
    target = mean_target(last, observed[last.node]).value
    fitted = refit(setting.average, setting.members, setting.layout, setting.inputs, ridge=ridge)

    def miss(weights):
        return (setting.outputs(weights) - target).square().mean((1, 2))

    assert (miss(fitted) < miss(setting.average)).all()


def test_the_first_layer_is_only_rescaled_to_the_members_spread(setting):
    layer = setting.layout.layers[0]
    fitted = refit(setting.average, setting.members, setting.layout, setting.inputs)
    ratio = (fitted[layer.weight] / setting.average[layer.weight]).flatten(2)
    assert torch.allclose(ratio, ratio[..., :1].expand_as(ratio))
    observed = observe(setting.members, setting.layout, setting.inputs)[layer.node]
    for f in range(FAMILIES):
        rows = setting.before_activation(at(fitted, f), name_of(layer))
        wanted = observed[f].std(1, correction=0).mean(0)
        assert torch.allclose(rows.std(0, correction=0), wanted, rtol=1e-6)
        if layer.bias:
            assert torch.allclose(rows.mean(0), observed[f].mean((0, 1)), atol=1e-10)


@pytest.mark.parametrize("name", ["conv1d", "depthwise"])
def test_layers_that_are_no_matrix_over_patches_are_only_rescaled(name):
    build, shape = MODELS[name]
    setting = Setting(build(), shape)
    layer = setting.layout.layers[1]
    fitted = refit(setting.average, setting.members, setting.layout, setting.inputs)
    ratio = (fitted[layer.weight] / setting.average[layer.weight]).flatten(2)
    assert torch.allclose(ratio, ratio[..., :1].expand_as(ratio))
    assert float((ratio - 1).abs().max()) > 0.05
    regressed = setting.layout.layers[-1].weight
    ratio = fitted[regressed] / setting.average[regressed]
    assert not torch.allclose(ratio, ratio[..., :1].expand_as(ratio))


def unfolded(maps, kernel, stride, padding, dilation):
    """Patches of feature maps, position by position: ``[b * positions, channels * taps]``."""
    maps = nn.functional.pad(maps, (padding[1], padding[1], padding[0], padding[0]))
    high, wide = (d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True))
    rows = []
    for image in maps:
        for y in range(0, image.shape[1] - high + 1, stride[0]):
            for x in range(0, image.shape[2] - wide + 1, stride[1]):
                patch = image[:, y : y + high : dilation[0], x : x + wide : dilation[1]]
                rows.append(patch.flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": (2, 3), "stride": (1, 2), "padding": (1, 0)},
        {"kernel_size": 2, "dilation": (2, 1), "padding": 1},
    ],
)
def test_a_refitted_convolution_agrees_with_regression_on_patches_cut_by_hand(options, bias):
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Conv2d(3, 2, **options, bias=bias))
    setting = Setting(model, (1, 6, 7), rows=8)
    ridge = 0.05
    fitted = refit(setting.average, setting.members, setting.layout, setting.inputs, ridge=ridge)
    conv = model[2]
    for f in range(FAMILIES):
        # from here on nothing but the module, loops and a linear solver
        model.load_state_dict({**at(setting.average, f), **at({k: fitted[k] for k in FIRST}, f)})
        maps = model[:2](setting.inputs).detach()
        rows = unfolded(maps, conv.kernel_size, conv.stride, conv.padding, conv.dilation)
        current = setting.before_activation(model.state_dict(), "2")
        each = torch.stack(
            [setting.before_activation(at(setting.members, f, m), "2") for m in range(MEMBERS)]
        )
        mixed = each.mean(0)
        spread = each.std(1, correction=0).mean(0) / mixed.std(0, correction=0)
        miss = mixed.mean(0) + (mixed - mixed.mean(0)) * spread - current
        centre, offset = (rows.mean(0), miss.mean(0)) if bias else (0 * rows[0], 0 * miss[0])
        x, y = rows - centre, miss - offset
        penalty = ridge * len(x) * x.square().mean()
        gram = x.T @ x + penalty * torch.eye(x.shape[1], dtype=torch.float64)
        change = torch.linalg.solve(gram, x.T @ y)
        weight = setting.average["2.weight"][f] + change.T.reshape(conv.weight.shape)
        assert torch.allclose(fitted["2.weight"][f], weight, atol=1e-6)
        if bias:
            shifted = setting.average["2.bias"][f] + offset - centre @ change
            assert torch.allclose(fitted["2.bias"][f], shifted, atol=1e-6)


FIRST = ("0.weight", "0.bias")


def scaled_targets(strength):
    def targets(layer, observed):
        wanted = strength(layer) if callable(strength) else strength
        return Target(mean_target(layer, observed).value, wanted)

    return targets


@pytest.mark.parametrize("strength", [0.0, torch.tensor(0.0)])
def test_a_strength_of_zero_leaves_the_weights(setting, strength):
    targets = scaled_targets(strength)
    fitted = refit(
        setting.average, setting.members, setting.layout, setting.inputs, targets=targets
    )
    assert largest_difference(fitted, setting.average) < 1e-12


def test_half_the_strength_goes_half_the_way(setting):
    # Only the last layer moves: those before it would change what it reads.
    def at_strength(value):
        targets = scaled_targets(lambda layer: value if layer.target == OUTPUTS else 0.0)
        return refit(
            setting.average, setting.members, setting.layout, setting.inputs, targets=targets
        )

    half, whole = at_strength(0.5), at_strength(1.0)
    for key, start in setting.average.items():
        middle = (start.double() + whole[key].double()) / 2
        assert torch.allclose(half[key].double(), middle, atol=1e-12), key
    assert largest_difference(whole, setting.average) > 1e-2


def test_a_strong_ridge_gives_back_the_starting_weights(mlp):
    fitted = refit(mlp.average, mlp.members, mlp.layout, mlp.inputs, ridge=1e12)
    for key in ("2.weight", "4.weight"):
        assert torch.allclose(fitted[key], mlp.average[key], atol=1e-8)
    assert not torch.allclose(fitted["0.weight"], mlp.average["0.weight"], atol=1e-2)


def test_targets_are_asked_for_every_layer_in_order(setting):
    asked = []

    def targets(layer, observed):
        asked.append((layer, observed.shape))
        return mean_target(layer, observed)

    refit(setting.average, setting.members, setting.layout, setting.inputs, targets=targets)
    assert [layer for layer, _ in asked] == list(setting.layout.layers)
    sizes = [setting.average[layer.weight].shape[1] for layer in setting.layout.layers]
    assert [(s[0], s[1], s[3]) for _, s in asked] == [(FAMILIES, MEMBERS, n) for n in sizes]


def test_normalised_layers_without_a_bias_keep_the_wanted_mean():
    build, shape = MODELS["batch norm"]
    setting = Setting(build(), shape)
    assert len(setting.layout.running_means) == 2
    observed = observe(setting.members, setting.layout, setting.inputs)
    fitted = refit(setting.average, setting.members, setting.layout, setting.inputs)
    for node, key in setting.layout.running_means.items():
        layer = setting.layout.by_node[node]
        for f in range(FAMILIES):
            reached = setting.before_activation(at(fitted, f), name_of(layer)).mean(0)
            wanted = observed[layer.node][f].mean((0, 1))
            assert not torch.allclose(reached, wanted, atol=1e-3)  # there is something to take over
            left = reached - fitted[key][f]
            assert torch.allclose(left, wanted - setting.average[key][f], atol=1e-10)


def test_gradients_reach_probes_members_fused_weights_and_ridge(setting):
    inputs = setting.inputs[:20].clone().requires_grad_()
    ridge = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    read = {key for key, _ in setting.model.named_parameters()}
    fused = {k: t.clone().requires_grad_(k in read) for k, t in setting.average.items()}
    members = {k: t.clone().requires_grad_(k in read) for k, t in setting.members.items()}
    fitted = refit(fused, members, setting.layout, inputs, ridge=ridge)
    run(setting.program, fitted, [setting.inputs], stacked=True).square().sum().backward()
    leaves = [inputs, ridge, *(w[k] for w in (fused, members) for k in read)]
    for leaf in leaves:
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
    assert float(inputs.grad.abs().max()) > 0
    assert float(ridge.grad.abs()) > 0
    assert all(float(members[layer.weight].grad.abs().max()) > 0 for layer in setting.layout.layers)


def test_gradients_with_respect_to_probes_and_fused_weights_are_right():
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    setting = Setting(model, (2,), rows=6)
    keys = list(setting.average)

    def fitted(inputs, *fused):
        weights = dict(zip(keys, fused, strict=True))
        return tuple(refit(weights, setting.members, setting.layout, inputs).values())

    arguments = [t.clone().requires_grad_() for t in (setting.inputs, *setting.average.values())]
    assert torch.autograd.gradcheck(fitted, arguments)


def test_families_do_not_depend_on_each_other(setting):
    together = refit(setting.average, setting.members, setting.layout, setting.inputs)
    for f in range(FAMILIES):
        alone = refit(
            at(setting.average, slice(f, f + 1)),
            at(setting.members, slice(f, f + 1)),
            setting.layout,
            setting.inputs,
        )
        assert largest_difference(at(together, f), at(alone, 0)) < 1e-10


def test_what_goes_in_stays_as_it_is_and_all_keys_come_out(setting):
    fused, members, inputs = setting.average, setting.members, setting.inputs
    before = [{k: t.clone() for k, t in w.items()} for w in (fused, members, {"x": inputs})]
    fitted = refit(fused, members, setting.layout, inputs)
    for now, then in zip((fused, members, {"x": inputs}), before, strict=True):
        assert all(torch.equal(now[key], then[key]) for key in then)
    assert {k: t.shape for k, t in fitted.items()} == {k: t.shape for k, t in fused.items()}


def test_refit_in_halves_is_refit(mlp):
    observed = observe(mlp.members, mlp.layout, mlp.inputs)
    halves = construct(
        mlp.average, observed, mlp.layout, mlp.inputs, targets=mean_target, ridge=1e-2
    )
    whole = refit(mlp.average, mlp.members, mlp.layout, mlp.inputs)
    assert all(torch.equal(halves[key], whole[key]) for key in whole)


def test_rows_beyond_the_limit_are_drawn_alike_every_time(setting, monkeypatch):
    monkeypatch.setattr("metamerge.corrections.refit.MAX_ROWS", 40)
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        observed = observe(setting.members, setting.layout, setting.inputs)
        assert all(rows.shape[2] == 40 for rows in observed.values())
        results.append(refit(setting.average, setting.members, setting.layout, setting.inputs))
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_rows_beyond_the_limit_are_the_same_on_both_sides_of_the_regression(setting, monkeypatch):
    # Rows of targets and of inputs that did not belong together would move identical members.
    monkeypatch.setattr("metamerge.corrections.refit.MAX_ROWS", 40)
    members = {k: t.repeat_interleave(3, 1) for k, t in setting.draw(FAMILIES, 1).items()}
    start = averaged(members)
    fitted = refit(start, members, setting.layout, setting.inputs)
    assert largest_difference(fitted, start) < 1e-10
    # ... and a last layer that starts at zero is found again, as far as those rows can tell.
    last = setting.layout.layers[-1]
    moved = {**start, last.weight: 0 * start[last.weight]}
    fitted = refit(moved, members, setting.layout, setting.inputs, ridge=1e-9)
    found, wanted = (
        observe({key: t[:, None] for key, t in weights.items()}, setting.layout, setting.inputs)
        for weights in (fitted, start)
    )
    assert torch.allclose(found[last.node], wanted[last.node], atol=1e-5)


def test_a_unit_that_is_constant_in_all_members_stays_finite():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    setting = Setting(model, (2,), rows=10)
    members = {key: t.clone() for key, t in setting.members.items()}
    members["0.weight"][:, :, 0] = 0  # constant
    members["0.bias"][:, :, 0] = -1  # and off
    inputs = setting.inputs.requires_grad_()
    fitted = refit(averaged(members), members, setting.layout, inputs)
    sum(t.square().sum() for t in fitted.values()).backward()
    assert all(t.isfinite().all() for t in fitted.values())
    assert inputs.grad.isfinite().all()
    assert not fitted["0.weight"][:, 0].any()


def test_names_that_share_a_tensor_still_agree(mlp):
    program = replace(mlp.program, tied={"alias": "2.weight"})
    layout = Layout(program, discover_program(program))
    members = {**mlp.members, "alias": mlp.members["2.weight"].clone()}
    fitted = refit(averaged(members), members, layout, mlp.inputs)
    assert torch.equal(fitted["alias"], fitted["2.weight"])
    assert not torch.allclose(fitted["alias"], mlp.average["2.weight"], atol=1e-3)
