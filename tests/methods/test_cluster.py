import math

import pytest
import torch

from metamerge.errors import ConfigError
from metamerge.methods import average, cluster

FOUR = [0.0, 2.0, 4.0, 20.0]


def value(fused):
    return fused["0.weight"][0].item()


@pytest.mark.parametrize("algorithm", ["ward", "kmeans"])
def test_four_numbers(scalar_members, algorithm):
    # Clusters {0, 2, 4} and {20}: means 2 and 20, their mean 11; the average would be 6.5.
    assert value(cluster(scalar_members(*FOUR), algorithm=algorithm)) == 11.0


def test_three_clusters_of_four_numbers(scalar_members):
    assert value(cluster(scalar_members(0, 2, 10, 24), clusters=3)) == pytest.approx(35 / 3)


def test_one_cluster_is_the_average(scalar_members):
    assert value(cluster(scalar_members(*FOUR), clusters=1)) == 6.5


def test_as_many_clusters_as_members_are_the_average(scalar_members):
    assert value(cluster(scalar_members(*FOUR), clusters=4)) == 6.5


def test_best_without_batches_is_the_largest(scalar_members):
    assert value(cluster(scalar_members(20, 0, 2, 4), keep="best")) == 2.0


def test_best_of_equally_large_ones_is_the_tightest(scalar_members):
    assert value(cluster(scalar_members(0, 2, 10, 11), keep="best")) == 10.5


@pytest.mark.parametrize(("label", "expected"), [(0, 20.0), (1, 2.0)])
def test_best_with_labels_has_the_lowest_loss(scalar_layout, scalar_members, label, expected):
    batches = (torch.ones(1, 1), torch.tensor([label]))
    fused = cluster(scalar_members(*FOUR), keep="best", layout=scalar_layout, batches=batches)
    assert value(fused) == expected


def test_step_counters_of_clusters_left_out_do_not_count(scalar_members):
    members = scalar_members(*FOUR)
    for member, steps in zip(members, (5, 7, 6, 9), strict=True):
        member["steps"] = torch.tensor(steps)
    assert cluster(members, keep="best")["steps"].item() == 7
    assert cluster(members)["steps"].item() == 9


def test_by_predictions_members_that_say_the_same_are_together(scalar_layout, scalar_members):
    # On x = 1 the logit of class 0 is the number: -9 and -99 say the same, as do 9 and 99.
    members, inputs = scalar_members(-9, 9, 99, -99), torch.ones(3, 1)
    told = {}
    given = {"layout": scalar_layout, "batches": inputs, "report": told}
    assert value(cluster(members, by="predictions", **given)) == 0.0
    assert told == {"clusters": [[0, 3], [1, 2]]}


def test_the_report_is_what_a_caller_needs_to_train_the_means(scalar_layout, scalar_members):
    members, told = scalar_members(*FOUR), {}
    batches = (torch.ones(1, 1), torch.tensor([0]))
    given = {"layout": scalar_layout, "batches": batches, "report": told}
    fused = cluster(members, keep="best", **given)
    assert told["clusters"] == [[0, 1, 2], [3]]
    assert told["kept"] == 1
    expected = [math.log1p(math.exp(-mean)) for mean in (2.0, 20.0)]
    assert told["losses"] == pytest.approx(expected, abs=1e-6)
    again = average([members[i] for i in told["clusters"][told["kept"]]])
    assert torch.equal(again["0.weight"], fused["0.weight"])


def ward(points, clusters):
    """Join the two clusters whose union costs least, again and again."""
    groups = [[i] for i in range(len(points))]

    def cost(group):
        return float((points[group] - points[group].mean(0)).square().sum())

    while len(groups) > clusters:
        pairs = [(a, b) for i, a in enumerate(groups) for b in groups[i + 1 :]]
        a, b = min(pairs, key=lambda pair: cost(pair[0] + pair[1]) - cost(pair[0]) - cost(pair[1]))
        groups = [g for g in groups if g not in (a, b)] + [a + b]
    return groups


@pytest.mark.parametrize("clusters", [2, 3, 5])
def test_agrees_with_slow_clustering_in_float64(clusters):
    generator = torch.Generator().manual_seed(0)
    members = [
        {"a": torch.randn(2, 3, generator=generator), "b": torch.randn(4, generator=generator)}
        for _ in range(9)
    ]
    points = torch.stack([torch.cat([m["a"].flatten(), m["b"]]) for m in members]).double()
    means = torch.stack([points[group].mean(0) for group in ward(points, clusters)])
    fused = cluster(members, clusters=clusters)
    found = torch.cat([fused["a"].flatten(), fused["b"]]).double()
    assert torch.allclose(found, means.mean(0), atol=1e-6, rtol=0)


def test_names_in_another_order_do_not_move_members():
    one = {"a": torch.tensor([0.0]), "b": torch.tensor([9.0])}
    near = {"b": torch.tensor([9.0]), "a": torch.tensor([1.0])}
    far = {"a": torch.tensor([9.0]), "b": torch.tensor([0.0])}
    assert cluster([one, near, far])["a"].item() == 4.75  # (0.5 + 9) / 2


def test_k_means_follows_its_generator_and_needs_none(scalar_members):
    members = scalar_members(*range(12))
    for make in (lambda: None, lambda: torch.Generator().manual_seed(3)):
        one, other = (
            cluster(members, clusters=5, algorithm="kmeans", generator=make()) for _ in range(2)
        )
        assert value(one) == value(other)


def test_one_member_needs_no_clusters(scalar_members):
    assert value(cluster(scalar_members(3), clusters=2)) == 3.0


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
@pytest.mark.parametrize("algorithm", ["ward", "kmeans"])
def test_fewer_different_members_than_clusters_do_no_harm(scalar_members, algorithm):
    assert value(cluster(scalar_members(3, 3, 3), algorithm=algorithm)) == pytest.approx(3)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"clusters": 0}, "from 1 to the number of members, 4, got 0"),
        ({"clusters": 5}, "from 1 to the number of members, 4, got 5"),
        ({"clusters": 2.0}, "got 2.0"),
        ({"keep": "worst"}, "keep must be one of .* got 'worst'"),
        ({"clusters": True}, "got True"),
        ({"by": "name"}, "by must be one of .* got 'name'"),
        ({"by": "predictions"}, "needs batches"),
        ({"algorithm": "dbscan"}, "algorithm must be one of .* got 'dbscan'"),
    ],
)
def test_options_out_of_range_are_refused(scalar_members, options, told):
    with pytest.raises(ConfigError, match=told):
        cluster(scalar_members(*FOUR), **options)


def test_batches_without_layout_or_labels_are_refused(scalar_layout, scalar_members):
    members = scalar_members(*FOUR)
    with pytest.raises(ConfigError, match="without a layout"):
        cluster(members, keep="best", batches=(torch.ones(1, 1), torch.tensor([0])))
    with pytest.raises(ConfigError, match="no labels"):
        cluster(members, keep="best", layout=scalar_layout, batches=torch.ones(1, 1))
