"""Refit: what it moves, what it leaves, and what it can be differentiated by."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from metamerge.corrections.refit import Target, construct, mean_target, observe, refit
from metamerge.structure import OUTPUTS, Layout, discover_program, run

FAMILIES, MEMBERS = 2, 3  # of a setting's members


def at(weights, *index):
    return {key: tensor[index] for key, tensor in weights.items()}


def name_of(layer):
    return layer.weight.removesuffix(".weight")


def largest_difference(one, other):
    return max(float((one[key] - other[key]).abs().max()) for key in other)


def scaled_targets(strength):
    def targets(layer, observed):
        wanted = strength(layer) if callable(strength) else strength
        return Target(mean_target(layer, observed).value, wanted)

    return targets


def test_pre_activations_are_those_of_every_member_alone(setting):
    observed = observe(setting.members, setting.layout, setting.inputs)
    assert list(observed) == [layer.node for layer in setting.layout.layers]
    for layer in setting.layout.layers:
        for f in range(FAMILIES):
            for m in range(MEMBERS):
                own = setting.before_activation(at(setting.members, f, m), name_of(layer))
                assert torch.allclose(observed[layer.node][f, m], own, atol=1e-12)


def test_fused_weights_equal_to_the_only_member_stay_as_they_are(setting, averaged):
    members = setting.draw(FAMILIES, 1)
    fitted = refit(averaged(members), members, setting.layout, setting.inputs)
    assert largest_difference(fitted, averaged(members)) < 1e-10


def test_identical_members_are_a_fixed_point(setting, averaged):
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


def test_gradients_with_respect_to_probes_and_fused_weights_are_right(make_setting):
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    setting = make_setting(model, (2,), rows=6)
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


def test_rows_beyond_the_limit_are_the_same_on_both_sides_of_the_regression(
    setting, averaged, monkeypatch
):
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


def test_a_unit_that_is_constant_in_all_members_stays_finite(averaged, make_setting):
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    setting = make_setting(model, (2,), rows=10)
    members = {key: t.clone() for key, t in setting.members.items()}
    members["0.weight"][:, :, 0] = 0  # constant
    members["0.bias"][:, :, 0] = -1  # and off
    inputs = setting.inputs.requires_grad_()
    fitted = refit(averaged(members), members, setting.layout, inputs)
    sum(t.square().sum() for t in fitted.values()).backward()
    assert all(t.isfinite().all() for t in fitted.values())
    assert inputs.grad.isfinite().all()
    assert not fitted["0.weight"][:, 0].any()


def test_names_that_share_a_tensor_still_agree(mlp, averaged):
    program = replace(mlp.program, tied={"alias": "2.weight"})
    layout = Layout(program, discover_program(program))
    members = {**mlp.members, "alias": mlp.members["2.weight"].clone()}
    fitted = refit(averaged(members), members, layout, mlp.inputs)
    assert torch.equal(fitted["alias"], fitted["2.weight"])
    assert not torch.allclose(fitted["alias"], mlp.average["2.weight"], atol=1e-3)
