"""Weight matching to a reference, with restarts, and what its report says."""

from itertools import pairwise

import pytest
import torch

from metamerge.alignment import matching_cost, medoid, weight_matching
from metamerge.errors import ConfigError

DRAWS = 20


def test_to_a_reference_every_member_is_matched_as_in_a_pair_with_it(network):
    members = network.draw(3, 4)
    found = weight_matching(members, network.spec, to="reference", reference=2)
    for k in (0, 1, 3):
        pair = {key: tensor[:, [2, k]] for key, tensor in members.items()}
        expected = weight_matching(pair, network.spec, to="reference", reference=0)
        for group, n in network.spec.groups.items():
            assert torch.equal(found[group][:, k], expected[group][:, 1])
            assert torch.equal(found[group][:, 2], torch.arange(n).expand(3, n))


def test_without_a_number_the_reference_is_the_medoid(network):
    members = network.draw(5, 4)
    found = weight_matching(members, network.spec, to="reference")
    for f, k in enumerate(medoid(members, network.spec).tolist()):
        for group, n in network.spec.groups.items():
            assert torch.equal(found[group][f, k], torch.arange(n))


def test_the_barycentre_is_nearer_than_a_reference_lets_it_be(network):
    members = network.draw(DRAWS, 6)
    near, far = (
        matching_cost(members, network.spec, weight_matching(members, network.spec, to=to))
        for to in ("barycentre", "reference")
    )
    assert (near <= far + 1e-12).all()
    assert near.mean() < 0.99 * far.mean()


def test_restarts_never_cost_more_and_say_which_run_counts(network):
    members, report = network.draw(8, 4), {}
    once = matching_cost(members, network.spec, weight_matching(members, network.spec))
    found = weight_matching(
        members,
        network.spec,
        restarts=6,
        generator=torch.Generator().manual_seed(0),
        report=report,
    )
    cost = matching_cost(members, network.spec, found)
    assert (cost <= once + 1e-12).all()
    assert float(cost.mean()) <= min(report["costs"]) + 1e-12
    assert len(report["costs"]) == 7
    for f, winner in enumerate(report["restart"]):
        assert winner in range(7)
        assert (winner == 0) == bool(cost[f] > once[f] - 1e-12)
    assert max(report["restart"]) > 0


def test_restarts_with_the_same_seed_are_the_same(perceptron):
    members = perceptron.draw(4, 4)
    first, second = (
        weight_matching(
            members, perceptron.spec, restarts=2, generator=torch.Generator().manual_seed(seed)
        )
        for seed in (3, 3)
    )
    assert all(torch.equal(first[group], second[group]) for group in first)


def test_the_report_holds_the_matching_cost_of_every_step(network):
    members, report = network.draw(3, 4), {}
    perm = weight_matching(members, network.spec, report=report)
    steps = report["objective"]
    before = matching_cost(members, network.spec, network.spec.identity())
    after = matching_cost(members, network.spec, perm)
    assert steps[0] == pytest.approx(float(before.mean()), rel=1e-12)
    assert steps[-1] == pytest.approx(float(after.mean()), rel=1e-12)
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(steps[1:]))
    assert "restart" not in report


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "mean"}, r"to must be one of .*'barycentre', 'reference'.*, got 'mean'"),
        ({"to": ["reference"]}, "to must be one of"),
        ({"sweeps": 0}, "sweeps must be a whole number of at least 1, got 0"),
        ({"sweeps": True}, "sweeps must be a whole number"),
        ({"sweeps": float("nan")}, "sweeps must be a whole number"),
        ({"restarts": -1}, "restarts must be a whole number of at least 0, got -1"),
        ({"restarts": None}, "restarts must be a whole number"),
        ({"reference": 3}, "reference must be a whole number from 0 to .* 2, or None .*, got 3"),
        ({"reference": "first"}, "reference must be a whole number .* or None for the medoid"),
    ],
)
def test_options_out_of_range_are_refused(perceptron, options, message):
    with pytest.raises(ConfigError, match=message):
        weight_matching(perceptron.draw(1, 3), perceptron.spec, **options)
