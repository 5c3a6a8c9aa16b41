"""ResNet-20 by its formula, and factories of one's own."""

import sys

import pytest
import torch
from torch import nn

from metamerge.errors import ConfigError
from metamerge.structure import run
from zoo.architectures import (
    NORMS,
    build,
    factory_of,
    frozen,
    program_of,
    resnet8,
    resnet20,
)
from zoo.recipe import ZooOptions, factory_for
from zoo.tasks import load_task
from zoo.trainable import check_trainable

OWN = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, features, outputs, width=6):
        super().__init__()
        self.inner, self.leave = nn.Linear(features, width), nn.Linear(width, outputs)

    def forward(self, x):
        return self.leave(torch.relu(self.inner(x.flatten(1))))


def features(shape):
    return torch.Size(shape).numel()


def plain(shape, outputs):
    return Net(features(shape), outputs)


def wide(shape, outputs, widths=(4,)):
    asked.append({"shape": shape, "outputs": outputs, "widths": widths})
    return Net(features(shape), outputs, widths[0])


def normed(shape, outputs, *, norm="none", widths=(5,)):
    asked.append({"norm": norm, "widths": widths})
    return Net(features(shape), outputs, widths[0])


asked = []
number = 7


def no_module(shape, outputs):
    return lambda x: x


def too_few(shape, outputs):
    return Net(features(shape), outputs - 1)


def nested(shape, outputs):
    class Pair(Net):
        def forward(self, x):
            return super().forward(x), x
    return Pair(features(shape), outputs)


def dropping(shape, outputs):
    return nn.Sequential(Net(features(shape), outputs), nn.Dropout(0.5))


def dropping_nothing(shape, outputs):
    return nn.Sequential(Net(features(shape), outputs), nn.Dropout(0.0))


def normalised(shape, outputs):
    return nn.Sequential(Net(features(shape), outputs), nn.BatchNorm1d(outputs))


def other_in_training(shape, outputs):
    class Other(Net):
        def forward(self, x):
            return super().forward(2 * x if self.training else x)
    return Other(features(shape), outputs)


def instance_normalised(shape, outputs):
    return nn.Sequential(
        nn.Flatten(), nn.Unflatten(1, (1, -1)), nn.InstanceNorm1d(1, track_running_stats=True),
        nn.Flatten(), nn.Linear(features(shape), outputs),
    )


def cumulative(shape, outputs):
    return nn.Sequential(Net(features(shape), outputs), nn.BatchNorm1d(outputs, momentum=None))


def tied(shape, outputs):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    net[3].weight = net[1].weight
    return nn.Sequential(net, nn.Linear(64, outputs))


def not_a_number(shape, outputs):
    net = Net(features(shape), outputs)
    nn.init.constant_(net.leave.bias, torch.nan)
    return net
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The module above, as a user would have it: in a package of their own."""
    package = tmp_path / "my_nets"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "shapes.py").write_text(OWN)
    (package / "broken.py").write_text("import no_such_module_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_nets.shapes"
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_nets"]:
        del sys.modules[name]


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def expected_count(channels, outputs, widths):
    """Weights of ResNet-20 with projected shortcuts, layer by layer."""

    def convolution(read, made, size):
        return read * made * size**2 + 2 * made  # no bias, but a factor and a shift per channel

    total, read = convolution(channels, widths[0], 3), widths[0]
    for stage, width in enumerate(widths):
        total += convolution(read, width, 3) + 5 * convolution(width, width, 3)
        if stage:
            total += convolution(read, width, 1)
        read = width
    return total + read * outputs + outputs


# ---------------------------------------------------------------------------- ResNet-20


@pytest.mark.parametrize("norm", NORMS)
def test_resnet20_has_the_parameters_of_the_paper_and_its_projections(norm):
    """He et al. count 0.27 million: 269,722, and 2,752 more where shortcuts are projected."""
    projected = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert count(resnet20((3, 32, 32), 10, norm=norm)) == 269_722 + projected
    assert expected_count(3, 10, (16, 32, 64)) == 269_722 + projected


@pytest.mark.parametrize("widths", [(4,), (3, 5), (2, 3, 4, 5)], ids=str)
def test_resnet20_has_the_parameters_of_its_formula_at_any_width(widths):
    assert count(resnet20((1, 8, 8), 7, widths=widths)) == expected_count(1, 7, widths)


def test_resnet20_has_20_layers_and_two_projections():
    layers = [
        m for m in resnet20((3, 32, 32), 10).modules() if isinstance(m, nn.Conv2d | nn.Linear)
    ]
    sizes = [getattr(layer, "kernel_size", None) for layer in layers]
    assert sizes.count((3, 3)) + sizes.count(None) == 20
    assert sizes.count((1, 1)) == 2
    assert all(m.bias is None for m in layers if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize("norm", NORMS)
def test_every_stage_but_the_first_halves_the_map(norm):
    model = resnet20((1, 16, 12), 5, widths=(2, 3, 4), norm=norm).eval()
    seen, x = [], torch.rand(2, 1, 16, 12)
    for layer in model:
        x = layer(x)
        if not seen or seen[-1] != x.shape[1:]:
            seen.append(x.shape[1:])
    assert seen == [(2, 16, 12), (3, 8, 6), (4, 4, 3), (4, 1, 1), (4,), (5,)]


def test_resnet8_has_8_layers_and_starts_at_half_the_size():
    model = resnet8((3, 32, 32), 10, norm="batch").eval()
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    sizes = [getattr(layer, "kernel_size", None) for layer in layers]
    assert sizes.count((3, 3)) + sizes.count(None) == 8
    assert sizes.count((1, 1)) == 2
    x, seen = torch.rand(2, 3, 32, 32), []
    for layer in model:
        x = layer(x)
        seen.append(tuple(x.shape[1:]))
    assert [seen[0], *seen[2:5]] == [(8, 16, 16), (8, 16, 16), (16, 8, 8), (32, 4, 4)]


def test_norms_are_those_that_were_asked_for():
    for norm, kind, other in (
        ("layer", nn.GroupNorm, nn.BatchNorm2d),
        ("batch", nn.BatchNorm2d, nn.GroupNorm),
    ):
        modules = list(resnet20((1, 8, 8), 3, widths=(2, 3), norm=norm).modules())
        assert sum(isinstance(m, kind) for m in modules) == 1 + 2 * 6 + 1
        assert not any(isinstance(m, other) for m in modules)
    assert not dict(resnet20((1, 8, 8), 3, widths=(2,)).named_buffers())  # layer norm by default


def test_a_layer_norm_is_over_channels_and_places():
    x = torch.randn(5, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    found = NORMS["layer"](3)(x)
    mean, variance = x.mean((1, 2, 3), keepdim=True), x.var((1, 2, 3), keepdim=True, correction=0)
    torch.testing.assert_close(found, (x - mean) / (variance + 1e-5).sqrt())


def test_a_residual_block_adds_its_input_by_hand():
    """Convolutions of 0 add nothing: what is positive comes through, the rest is cut."""
    model = resnet20((1, 4, 4), 2, widths=(2,), norm="batch").eval()
    block = model[2]
    for part in (block.first, block.second):
        nn.init.zeros_(part[0].weight)
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(block(x), x.relu())


@pytest.mark.parametrize("norm", NORMS)
def test_the_program_of_a_residual_network_gives_what_the_network_gives(norm):
    model = build("resnet20", (1, 6, 6), 3, widths=(2, 3), norm=norm).double()
    inputs = torch.rand(4, 1, 6, 6, dtype=torch.float64)
    program = program_of(model, (1, 6, 6))
    found = run(program, model.state_dict(), [inputs])
    torch.testing.assert_close(found, model.eval()(inputs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["resnet8", "resnet20"])
def test_an_unknown_norm_is_refused_with_those_that_there_are(name):
    with pytest.raises(ConfigError, match=rf"{name}: no norm 'group'; .* \['batch', 'layer'\]"):
        build(name, (1, 8, 8), 3, norm="group")


# --------------------------------------------------------------------------- one's own factories


def test_a_factory_is_found_by_module_and_name(own):
    factory = factory_of(f"{own}:plain")
    assert factory is sys.modules[own].plain
    model = build(f"{own}:plain", (1, 8, 8), 3)
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 3)
    check_trainable(model, (1, 8, 8), 3, f"{own}:plain")


def test_a_factory_may_be_a_class(own):
    model = build(f"{own}:Net", 12, 3)
    assert model(torch.rand(2, 3, 4)).shape == (2, 3)


def test_a_zoo_builds_networks_of_ones_own(own):
    task = load_task("digits")
    options = ZooOptions(architecture=f"{own}:wide", widths=(3,))
    model = factory_for(options, task)()
    assert model.inner.out_features == 3
    assert sys.modules[own].asked == [{"shape": (1, 8, 8), "outputs": 10, "widths": (3,)}]
    fewer = ZooOptions(architecture=f"{own}:plain", classes_per_family=4)
    assert factory_for(fewer, task)().leave.out_features == 4


def test_widths_and_norm_are_handed_on_only_where_they_are_given(own):
    build(f"{own}:normed", (5,), 2)
    build(f"{own}:normed", (5,), 2, widths=[3])
    build(f"{own}:normed", (5,), 2, norm="batch")
    build(f"{own}:normed", (5,), 2, widths=(2,), norm="layer")
    assert sys.modules[own].asked == [
        {"norm": "none", "widths": (5,)},
        {"norm": "none", "widths": (3,)},
        {"norm": "batch", "widths": (5,)},
        {"norm": "layer", "widths": (2,)},
    ]


@pytest.mark.parametrize(
    ("factory", "given", "message"),
    [
        ("plain", {"widths": (3,)}, r"has no widths; got widths=\(3,\)"),
        ("plain", {"norm": "batch"}, r"has no norm; got norm='batch'"),
        ("wide", {"norm": "batch", "widths": (3,)}, r"has no norm; got norm='batch'"),
    ],
)
def test_an_option_that_a_factory_does_not_take_is_refused(own, factory, given, message):
    with pytest.raises(ConfigError, match=f"'{own}:{factory}' {message}"):
        build(f"{own}:{factory}", (5,), 2, **given)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_networks_without_a_norm_of_ours_refuse_one_as_well(name):
    with pytest.raises(ConfigError, match=f"'{name}' has no norm; got norm='batch'"):
        build(name, (1, 8, 8), 2, norm="batch")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "resnet",
            r"'resnet' is unknown; .*'convnet', 'mlp', 'resnet20', 'resnet8'\], and any factory",
        ),
        ("my_nets.shapes", "is unknown; .* as package.module:factory"),
        ("my_nets.shapes:", "is unknown; .* as package.module:factory"),
        ("my_nets.shapes:missing", "cannot be imported .*no attribute 'missing'"),
        ("my_nets.missing:plain", r"cannot be imported .*Run from the folder that holds 'my_nets'"),
        ("no_nets.shapes:plain", "Run from the folder that holds 'no_nets', or put .* PYTHONPATH"),
        ("my_nets.broken:plain", "cannot be imported .*no_such_module_anywhere"),
        ("my_nets.shapes:number", "is int, not a factory"),
    ],
)
@pytest.mark.usefixtures("own")
def test_a_wrong_name_is_refused_and_says_what_to_do(name, message):
    with pytest.raises(ConfigError, match=message):
        build(name, (5,), 2)
    with pytest.raises(ConfigError, match=message):  # before anything is built
        ZooOptions(architecture=name)


def test_a_name_without_a_module_is_refused_as_any_other():
    with pytest.raises(ConfigError, match="':plain'"):
        factory_of(":plain")


def test_a_factory_that_makes_no_module_is_refused(own):
    with pytest.raises(ConfigError, match=r"made a function, expected a torch\.nn\.Module"):
        build(f"{own}:no_module", (5,), 2)


# ---------------------------------------------------------------------- what cannot be trained


def refused(own, name, match):
    model = build(f"{own}:{name}", (1, 8, 8), 3)
    with pytest.raises(ConfigError, match=match):
        check_trainable(model, (1, 8, 8), 3, name)


def test_wrong_outputs_are_refused_with_both_shapes(own):
    refused(own, "too_few", r"inputs \(8, 1, 8, 8\) give \(8, 2\), expected \(8, 3\)")
    refused(own, "nested", r"inputs \(8, 1, 8, 8\) give tuple, expected \(8, 3\)")


def test_networks_that_are_random_in_training_are_refused(own):
    refused(own, "dropping", "random in training mode.*set its probability to 0")


@pytest.mark.parametrize("name", ["plain", "dropping_nothing", "normalised"])
def test_networks_that_the_trainer_follows_are_taken_and_left_as_they_are(own, name):
    model = build(f"{own}:{name}", (1, 8, 8), 3)
    before = {key: tensor.clone() for key, tensor in model.named_parameters()}
    check_trainable(model, (1, 8, 8), 3, name)
    assert not model.training
    assert all(torch.equal(before[key], tensor) for key, tensor in model.named_parameters())


@pytest.mark.parametrize("name", ["other_in_training", "instance_normalised", "cumulative", "tied"])
def test_networks_that_the_trainer_does_not_follow_are_refused(own, name):
    refused(own, name, name)


def test_what_needs_no_gradient_is_not_trained():
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    network[0].requires_grad_(False)
    assert frozen(network) == ["0.weight", "0.bias"]
    assert "1.running_mean" in frozen(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))


def test_a_network_that_gives_nan_is_not_called_random(own):
    refused(own, "not_a_number", "(?i)nan|finite")


def test_a_check_leaves_the_global_generator_alone(own):
    model = build(f"{own}:plain", (1, 8, 8), 3)
    before = torch.get_rng_state()
    check_trainable(model, (1, 8, 8), 3, "plain")
    assert torch.equal(torch.get_rng_state(), before)
