import math

import pytest
import torch

from metamerge.errors import ConfigError
from metamerge.methods import average, unit_clusters
from metamerge.methods._slots import grouped
from metamerge.methods.unit_clusters import _distances, _filled, _hungarian, _kmeans, _start
from metamerge.structure import run
from metamerge.weights import stack, unstack

INPUTS = torch.rand(50, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("algorithm", ["kmeans", "hungarian"])
def test_two_members_by_hand(pair_member, pair_layout, algorithm):
    # Slot 0 of the larger member B holds A's unit 1; centres are the means of the pairs. The output
    # is fitted to (A + B) / 2 = (1 + 8) / 2 x0 + (2 + 6) / 2 x1 on units 1.5 x1 and 1.5 x0.
    one = pair_member([[1.0, 0.0], [0.0, 1.0]], [[1.0, 2.0]])
    other = pair_member([[0.0, 2.0], [2.0, 0.0]], [[3.0, 4.0]])
    fused = unit_clusters(
        [one, other], layout=pair_layout, batches=INPUTS, algorithm=algorithm, ridge=1e-7
    )
    assert torch.allclose(fused["0.weight"], torch.tensor([[0.0, 1.5], [1.5, 0.0]]), atol=1e-5)
    assert torch.allclose(fused["2.weight"], torch.tensor([[4 / 1.5, 4.5 / 1.5]]), atol=1e-4)


def test_importance_by_hand(pair_member, pair_layout):
    # Relative to their member's mean, units count 2/3 and 4/3 in A, 3/3.5 and 4/3.5 in B.
    one = pair_member([[1.0, 0.0], [0.0, 1.0]], [[1.0, 2.0]])
    other = pair_member([[2.0, 0.0], [0.0, 2.0]], [[3.0, 4.0]])
    fused = unit_clusters([one, other], layout=pair_layout, batches=INPUTS, importance="weights")
    a, b = (2 / 3, 6 / 7), (4 / 3, 8 / 7)
    expected = [(a[0] + 2 * a[1]) / sum(a), (b[0] + 2 * b[1]) / sum(b)]
    assert torch.allclose(fused["0.weight"].diagonal(), torch.tensor(expected), atol=1e-5)


def test_a_cluster_may_hold_units_of_one_member_only(pair_member, pair_layout):
    one = pair_member([[1.0, 0.0], [1.0, 0.0]], [[1.0, 2.0]])
    other = pair_member([[0.0, 1.0], [0.0, 1.0]], [[3.0, 4.0]])
    report = {}
    fused = unit_clusters([one, other], layout=pair_layout, batches=INPUTS, report=report)
    assert sorted(fused["0.weight"].round(decimals=5).tolist()) == [[0.0, 1.0], [1.0, 0.0]]
    assert report["spread"]["0"] == pytest.approx(0, abs=1e-6)
    assert report["sizes"]["0"] == [2, 2]


def make_points(members=3, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(members * width, 4, generator=generator, dtype=torch.float64)
    counts = torch.rand(members, width, generator=generator, dtype=torch.float64) + 0.1
    return points, counts


def centres(points, counts, slot, width):
    """Weighted means of clusters, one after the other."""
    flat = counts.flatten()
    return torch.stack(
        [
            (points[slot == c] * flat[slot == c, None]).sum(0) / flat[slot == c].sum()
            for c in range(width)
        ]
    )


def test_distances_from_inner_products_are_those_of_points():
    points, counts = make_points()
    slot = torch.arange(15) % 5
    grouping = grouped(slot.reshape(3, 5), 5, counts)
    expected = torch.cdist(points, centres(points, counts, slot, 5)).square()
    assert torch.allclose(_distances(points @ points.mT, grouping), expected, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_k_means_ends_where_slow_k_means_does(seed):
    points, counts = make_points(members=4, seed=seed)
    found = _kmeans(points @ points.mT, counts, _start(4, 5, 1))
    centre, slot = points[5:10], None
    for _ in range(50):
        distance = torch.cdist(points, centre).square()
        slot = _filled(distance.argmin(1), distance, counts.flatten(), 5)
        centre = centres(points, counts, slot, 5)
    assert torch.equal(found.slot.flatten(), slot)
    assert (found.share > 0).all()


def test_an_empty_cluster_takes_the_furthest_unit_that_has_company():
    distance = torch.tensor([[0.0, 9, 9], [5, 0, 9], [4, 0, 9], [3, 0, 9]]) + 1.0
    distance[1, 1], distance[0, 0] = 2.5, 8.0
    filled = _filled(torch.tensor([0, 1, 1, 1]), distance, torch.ones(4), 3)
    assert filled.tolist() == [0, 2, 1, 1]


def test_hungarian_gives_every_slot_one_unit_of_every_member():
    points, counts = make_points(members=4)
    found = _hungarian(points @ points.mT, counts, _start(4, 5, 2))
    assert torch.equal(found.slot.sort(1).values, torch.arange(5).expand(4, 5))


def test_votes_are_what_the_outputs_are_fitted_to(digits_zoo):
    inputs, _ = digits_zoo.objective
    members = unstack({key: tensor[0] for key, tensor in digits_zoo.unseen.items()})
    program = digits_zoo.layout.program
    vote = run(program, stack(members), [inputs], stacked=True).softmax(-1).mean(0)
    gaps = []
    for outputs in ("mean", "votes"):
        fused = unit_clusters(members, layout=digits_zoo.layout, batches=inputs, outputs=outputs)
        own = run(program, stack([fused]), [inputs], stacked=True)[0].softmax(-1)
        gaps.append(float((own - vote).abs().mean()))
    assert gaps[1] < 0.5 * gaps[0]


def test_on_trained_networks_it_beats_the_plain_average_and_votes_beat_means(digits_zoo):
    (inputs, _), (images, targets) = digits_zoo.objective, digits_zoo.validation
    made = {"average": [], "mean": [], "votes": []}
    for family in range(6):
        members = unstack({key: tensor[family] for key, tensor in digits_zoo.unseen.items()})
        made["average"].append(average(members))
        for outputs in ("mean", "votes"):
            made[outputs].append(
                unit_clusters(members, layout=digits_zoo.layout, batches=inputs, outputs=outputs)
            )

    def score(weights):
        logits = run(digits_zoo.layout.program, stack(weights), [images], stacked=True)
        return float((logits.argmax(-1) == targets).double().mean())

    assert score(made["mean"]) > score(made["average"]) + 0.1
    assert score(made["votes"]) > score(made["mean"]) + 0.1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"algorithm": "ward"}, "algorithm must be one of 'kmeans', 'hungarian', got 'ward'"),
        ({"importance": True}, "importance must be one of"),
        ({"outputs": None}, "outputs must be one of 'mean', 'votes', got None"),
        ({"ridge": 0}, r"ridge must be a number in \(0, inf\), got 0"),
        ({"ridge": math.nan}, "ridge must be a number"),
        ({"ridge": "weak"}, "ridge must be a number"),
    ],
)
def test_options_out_of_range_are_refused(pair_member, pair_layout, options, told):
    one = pair_member([[1.0, 0.0], [0.0, 1.0]], [[1.0, 2.0]])
    with pytest.raises(ConfigError, match=f"unit_clusters: {told}"):
        unit_clusters([one, one], layout=pair_layout, batches=INPUTS, **options)
