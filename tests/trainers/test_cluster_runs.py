import pytest
import torch

from metamerge.errors import ConfigError
from trainers.cluster_members import members_row
from trainers.cluster_runs import CLUSTERINGS, prepare, subsample
from trainers.cluster_scores import cluster_scores, row_scores, run_scores
from zoo import architectures
from zoo.tasks import Task, load_task

REGRESSIONS = [name for name in CLUSTERINGS if name not in ("classes", "dirichlet")]
CLASSIFICATIONS = ("labels", "features", "classes", "dirichlet")
SMALL = {"runs": 2, "seed": 3, "members": (2, 3)}


@pytest.fixture(scope="module")
def diabetes():
    return load_task("diabetes")


@pytest.fixture(scope="module")
def features(diabetes):
    return prepare(diabetes, "features", **SMALL)


def check_rows(prepared, task):
    """Every row is in one part of a run, and training rows are in one cluster each."""
    for clusters, validation, test in zip(
        prepared.runs.clusters, prepared.runs.validation, prepared.test, strict=True
    ):
        rows = torch.cat([*clusters, validation, test])
        assert len(rows.unique()) == len(rows) <= len(task.inputs)
        assert min(map(len, clusters)) > 0


@pytest.mark.parametrize("name", REGRESSIONS)
def test_every_clustering_of_a_regression_cuts_each_run_by_itself(diabetes, name):
    prepared = prepare(diabetes, name, **SMALL)
    check_rows(prepared, diabetes)
    assert prepared.members in (2, 3)
    assert prepared.test.shape == prepared.runs.validation.shape == (2, 88)
    assert not torch.equal(*prepared.test)
    assert prepared.nearest.shape == prepared.routed.shape == (2, 88)
    # training rows have mean 0 and deviation 1 in the run's own units
    for run, clusters in enumerate(prepared.runs.clusters):
        known = prepared.runs.inputs[run, torch.cat(list(clusters))]
        torch.testing.assert_close(known.mean(0), torch.zeros(10), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", CLASSIFICATIONS)
def test_every_clustering_of_classes_cuts_each_run_by_itself(name):
    task = subsample(load_task("wine"), 0, 0)
    prepared = prepare(task, name, **SMALL)
    check_rows(prepared, task)
    assert prepared.scale is None


def test_smaller_targets_come_first_where_clusters_have_no_order(diabetes):
    prepared = prepare(diabetes, "labels", **SMALL)
    for run, clusters in enumerate(prepared.runs.clusters):
        means = [float(prepared.runs.targets[run, rows].mean()) for rows in clusters]
        assert means == sorted(means)
        low = prepared.runs.targets[run, prepared.test[run]][prepared.nearest[run] == 0]
        rest = prepared.runs.targets[run, prepared.test[run]][prepared.nearest[run] > 0]
        assert low.max() <= rest.min() + 1e-6  # test rows go by their own targets


def test_nobody_who_routes_a_row_looks_at_its_target(diabetes):
    other = Task("other", diabetes.inputs, diabetes.targets.clone(), None, standardise=True)
    one = prepare(diabetes, "features", **SMALL)
    for run in range(2):
        assert torch.equal(one.nearest[run], one.routed[run])
    labels = prepare(other, "labels", **SMALL)
    assert not torch.equal(labels.nearest, labels.routed)


def test_a_run_is_the_same_whatever_the_number_of_runs(diabetes, features):
    more = prepare(diabetes, "features", runs=6, seed=2, members=(features.members,))
    assert torch.equal(more.test[1:3], features.test)
    for one, other in zip(more.runs.clusters[1:3], features.runs.clusters, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_scores_are_in_units_of_the_target_and_clusters_sum_to_them(diabetes, features):
    means = torch.zeros(2, 88, 1)  # the mean of training rows, for every row
    scores = row_scores(means, features)
    for run in range(2):
        rows = torch.cat(list(features.runs.clusters[run]))
        centre = diabetes.targets[rows].mean()
        expected = (diabetes.targets[features.test[run]] - centre).abs().mean()
        assert run_scores(scores)["mae"][run] == pytest.approx(float(expected), rel=1e-4)
    sizes = torch.stack([(features.nearest == c).sum(1) for c in range(features.members)], 1)
    one = {name: values[:1] for name, values in scores.items()}
    first = type(features)(
        features.task, features.runs, features.test[:1], features.nearest[:1], features.routed[:1],
        features.scale[:1], features.quality,
    )  # fmt: skip
    parts = torch.tensor(cluster_scores(one, first)["mse"])
    whole = (parts * sizes[0]).sum() / sizes[0].sum()
    assert float(whole) == pytest.approx(run_scores(one)["mse"][0], rel=1e-5)


def test_rows_are_drawn_and_official_test_rows_kept():
    inputs = torch.arange(50.0).unsqueeze(1)
    task = Task("t", inputs, inputs.clone(), None, test_rows=range(40, 50))
    less = subsample(task, 10, 0)
    assert less.test_rows == range(10, 20)
    assert torch.equal(less.inputs[10:], inputs[40:])
    assert "10 of 40" in less.notes[0]
    assert subsample(task, 0, 0) is task
    prepared = prepare(subsample(task, 30, 0), "random", runs=2, seed=0, members=(2,))
    assert torch.equal(prepared.test, torch.arange(30, 40).expand(2, -1))


def test_one_model_per_cluster_is_merged_and_compared(features):
    def network():
        return architectures.build("mlp", (10,), 1, widths=(8,))

    program = architectures.program_of(network(), (10,))
    row = members_row(
        network, program, features, count=1, shared=True, epochs=30, lr=0.01, batch_size=16
    )
    scores = {way: torch.tensor(found["mse"]).mean() for way, found in row["scores"].items()}
    assert len(scores) == 9
    assert scores["ensemble of the members"] <= scores["mean of the members"]  # it is convex
    assert scores["one network on all rows"] < 4500  # the mean of the targets: 5,900


def test_unknown_clusterings_are_refused(diabetes):
    with pytest.raises(ConfigError, match="colour"):
        prepare(diabetes, "colour", **SMALL)
