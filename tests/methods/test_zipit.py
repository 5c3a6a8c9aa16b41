import math

import pytest
import torch

from metamerge.errors import ConfigError
from metamerge.methods import average, zipit
from metamerge.methods.zipit import zipped
from metamerge.structure import run
from metamerge.weights import stack, unstack

INPUTS = torch.rand(50, 2, generator=torch.Generator().manual_seed(0))


def test_two_members_by_hand(pair_member, pair_layout):
    # B's units are A's in the other order, and B is larger, so slots are in B's order: slot 0 holds
    # A's unit 1 and B's unit 0.
    one = pair_member([[1.0, 0.0], [0.0, 1.0]], [[1.0, 2.0]])
    other = pair_member([[0.0, 2.0], [2.0, 0.0]], [[3.0, 4.0]])
    for members in ([one, other], [other, one]):
        fused = zipit(members, layout=pair_layout, batches=INPUTS, within=0.0)
        assert fused["0.weight"].tolist() == [[0.0, 1.5], [1.5, 0.0]]
        assert fused["2.weight"].tolist() == [[2.5, 2.5]]  # ((2, 1) + (3, 4)) / 2


def test_units_inside_a_member_are_merged_by_hand(pair_member, pair_layout):
    # Each member has one unit twice; zipped, the network is exactly the members' mean.
    one = pair_member([[1.0, 0.0], [1.0, 0.0]], [[1.0, 2.0]])
    other = pair_member([[0.0, 1.0], [0.0, 1.0]], [[3.0, 4.0]])
    report = {}
    fused = zipit([one, other], layout=pair_layout, batches=INPUTS, within=1.0, report=report)
    assert sorted(fused["0.weight"].tolist()) == [[0.0, 1.0], [1.0, 0.0]]
    assert sorted(fused["2.weight"][0].tolist()) == [1.5, 3.5]
    assert report["within"] == {"0": 2}
    assert report["correlation"]["0"] == pytest.approx(1.0, abs=1e-5)
    logits = run(pair_layout.program, stack([one, other, fused]), [INPUTS], stacked=True)
    assert torch.allclose(logits[2], logits[:2].mean(0), atol=1e-6)


def slow(similarity, members, within):
    """Complete linkage with budgets, every pair looked at in every step."""
    units = len(similarity)
    width = units // members
    clusters = [{u} for u in range(units)]
    left = [int(within * (units - width) / members + 1e-9)] * members

    def owners(cluster):
        return {u // width for u in cluster}

    def allowed(a, b):
        return all(left[k] > 0 for k in owners(a) & owners(b))

    while len(clusters) > width:
        pairs = [(a, b) for i, a in enumerate(clusters) for b in clusters[:i]]
        pairs = [pair for pair in pairs if allowed(*pair)] or pairs
        a, b = max(pairs, key=lambda p: min(float(similarity[u, v]) for u in p[0] for v in p[1]))
        for k in owners(a) & owners(b):
            left[k] -= 1
        clusters = [c for c in clusters if c not in (a, b)] + [a | b]
    return {frozenset(cluster) for cluster in clusters}


@pytest.mark.parametrize("within", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("members", [2, 3, 4])
def test_greedy_merging_agrees_with_looking_at_every_pair(members, within):
    for seed in range(4):
        noise = torch.randn(
            members * 5, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        similarity = torch.corrcoef(noise)
        cluster, _, _ = zipped(similarity, members, within)
        found = {frozenset((cluster == c).nonzero().flatten().tolist()) for c in range(5)}
        assert found == slow(similarity, members, within)


def test_without_merges_inside_a_pair_of_members_is_matched_one_to_one():
    noise = torch.randn(20, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cluster, inside, _ = zipped(torch.corrcoef(noise), 2, 0.0)
    assert inside == 0
    assert sorted(cluster[:10].tolist()) == sorted(cluster[10:].tolist()) == list(range(10))


@pytest.mark.parametrize("within", [-0.1, 1.5, math.nan, None, "half", True])
def test_within_out_of_range_is_refused(pair_member, pair_layout, within):
    one = pair_member([[1.0, 0.0], [0.0, 1.0]], [[1.0, 2.0]])
    with pytest.raises(ConfigError, match=r"zipit: within must be a number in \[0, 1\]"):
        zipit([one, one], layout=pair_layout, batches=INPUTS, within=within)


def test_inputs_of_another_shape_are_refused(pair_member, pair_layout):
    one = pair_member([[1.0, 0.0], [0.0, 1.0]], [[1.0, 2.0]])
    with pytest.raises(ConfigError, match=r"\(5, 3\), the network takes \(b, 2\)"):
        zipit([one, one], layout=pair_layout, batches=torch.zeros(5, 3))


def test_on_trained_networks_it_beats_the_plain_average(digits_zoo):
    (inputs, _), (images, targets) = digits_zoo.objective, digits_zoo.validation
    plain, fused = [], []
    for family in range(6):
        members = unstack({key: tensor[family] for key, tensor in digits_zoo.unseen.items()})
        plain.append(average(members))
        fused.append(zipit(members, layout=digits_zoo.layout, batches=inputs))

    def score(weights):
        logits = run(digits_zoo.layout.program, stack(weights), [images], stacked=True)
        return float((logits.argmax(-1) == targets).double().mean())

    assert score(fused) > score(plain) + 0.05
