"""What refit does to each kind of layer: rescale it, regress it, keep its normalisation."""

import pytest
import torch
from torch import nn

from metamerge.corrections.refit import observe, refit

FIRST = ("0.weight", "0.bias")
FAMILIES, MEMBERS = 2, 3  # of a setting's members


def at(weights, *index):
    return {key: tensor[index] for key, tensor in weights.items()}


def name_of(layer):
    return layer.weight.removesuffix(".weight")


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
def test_layers_that_are_no_matrix_over_patches_are_only_rescaled(make_setting, name):
    setting = make_setting(name)
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
def test_a_refitted_convolution_agrees_with_regression_on_patches_cut_by_hand(
    make_setting, options, bias
):
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Conv2d(3, 2, **options, bias=bias))
    setting = make_setting(model, (1, 6, 7), rows=8)
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


def test_normalised_layers_without_a_bias_keep_the_wanted_mean(make_setting):
    setting = make_setting("batch norm")
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
