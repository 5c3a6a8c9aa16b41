import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metamerge.errors import ConfigError
from metamerge.gradients import orthogonalise
from metamerge.weights import unstack
from zoo import architectures
from zoo.clustered import (
    Batches,
    Runs,
    cluster_gradients,
    row_cross_entropy,
    row_squared_error,
    train_clustered,
)
from zoo.combination import RULES
from zoo.training import init_networks

RUNS, ROWS, FEATURES, WIDTHS = 3, 60, 4, (6, 5)
SIZES = (20, 15, 5)


def network():
    return architectures.build("mlp", (FEATURES,), 1, widths=WIDTHS)


@pytest.fixture(scope="module")
def program():
    return architectures.program_of(network(), (FEATURES,))


def make_runs(count=RUNS, dtype=torch.float32, first=0):
    """Runs with 40 training rows in three clusters and 20 validation rows."""
    data = [torch.Generator().manual_seed(first + r) for r in range(count)]
    inputs = torch.stack([torch.randn(ROWS, FEATURES, generator=g) for g in data]).to(dtype)
    noise = torch.stack([torch.randn(ROWS, 1, generator=g) for g in data]).to(dtype)
    orders = [torch.randperm(ROWS, generator=g) for g in data]
    return Runs(
        inputs,
        inputs[..., :1] * 2 - inputs[..., 1:2].square() + 0.1 * noise,
        [order[: sum(SIZES)].split(SIZES) for order in orders],
        torch.stack([order[sum(SIZES) :] for order in orders]),
        [first + r for r in range(count)],
    )


def start(count=RUNS, dtype=torch.float32, first=0):
    seeds = range(first, first + count)
    return {key: t.to(dtype) for key, t in init_networks(network, seeds).items()}


def slow_training(runs, r, weights, rule, lr, epochs, batch_size):
    """One run with one module and one backward pass per cluster; weights after every epoch."""
    model = network().double()
    model.load_state_dict(weights)
    batches = Batches(runs, batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    history = [F.mse_loss(*predicted(model, runs, r)).item()]
    for _ in range(epochs):
        for rows, within, _ in batches.epoch():
            vectors, counts = [], []
            for own, weight in zip(rows[r], within[r], strict=True):
                own = own[weight > 0]
                model.zero_grad()
                if len(own):
                    F.mse_loss(model(runs.inputs[r, own]), runs.targets[r, own]).backward()
                vectors.append(
                    torch.cat(
                        [
                            (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                            for p in model.parameters()
                        ]
                    )
                )
                counts.append(len(own))
            stacked, counts = torch.stack(vectors), torch.tensor(counts).double()
            if rule.order == "mean":
                step = (counts / counts.sum()) @ stacked
            else:
                step = orthogonalise(stacked, order=rule.order)
            sizes = [p.numel() for p in model.parameters()]
            for p, g in zip(model.parameters(), step.split(sizes), strict=True):
                p.grad = g.reshape(p.shape).clone()
            if rule.adam:
                optimizer.step()
            else:
                with torch.no_grad():
                    for p in model.parameters():
                        p -= lr * p.grad
        history.append(F.mse_loss(*predicted(model, runs, r)).item())
    return history


def predicted(model, runs, r):
    with torch.no_grad():
        return model(runs.inputs[r, runs.validation[r]]), runs.targets[r, runs.validation[r]]


@pytest.mark.parametrize("name", ["plain", "increasing", "decreasing", "adam", "adam-decreasing"])
def test_runs_in_a_batch_equal_a_module_with_a_backward_pass_per_cluster(program, name):
    runs, weights = make_runs(dtype=torch.float64), start(dtype=torch.float64)
    done = train_clustered(
        program, weights, runs, rule=RULES[name], lr=0.02, epochs=4, batch_size=10
    )
    for r, own in enumerate(unstack(weights)):
        expected = slow_training(runs, r, own, RULES[name], 0.02, 4, 10)
        torch.testing.assert_close(done.validation[r], torch.tensor(expected).double())


def test_gradients_of_clusters_are_those_of_their_mean_loss(program):
    runs, weights = make_runs(dtype=torch.float64), start(dtype=torch.float64)
    rows, within, _ = Batches(runs, 40).epoch()[0]
    found = cluster_gradients(program, weights, runs, rows, within, row_squared_error)
    for r, own in enumerate(unstack(weights)):
        for k, cluster in enumerate(runs.clusters[r]):
            model = network().double()
            model.load_state_dict(own)
            F.mse_loss(model(runs.inputs[r, cluster]), runs.targets[r, cluster]).backward()
            expected = torch.cat([p.grad.flatten() for p in model.parameters()])
            torch.testing.assert_close(found[r, k], expected)


def test_the_mean_of_clusters_is_the_gradient_of_all_their_rows(program):
    runs, weights = make_runs(), start()
    one = Runs(
        runs.inputs, runs.targets, [[torch.cat(c)] for c in runs.clusters], runs.validation, [0] * 3
    )
    many = train_clustered(
        program, weights, runs, rule=RULES["plain"], lr=0.1, epochs=3, batch_size=40
    )
    whole = train_clustered(
        program, weights, one, rule=RULES["plain"], lr=0.1, epochs=3, batch_size=40
    )
    torch.testing.assert_close(many.validation, whole.validation)


def test_an_epoch_meets_every_row_once_and_every_step_a_share_of_each_cluster():
    runs = make_runs()
    batches = Batches(runs, 10)
    first, second = batches.epoch(), batches.epoch()
    assert len(first) == 4
    for steps in (first, second):
        for r, clusters in enumerate(runs.clusters):
            for k, own in enumerate(clusters):
                met = torch.cat([rows[r, k][within[r, k] > 0] for rows, within, _ in steps])
                assert sorted(met.tolist()) == sorted(own.tolist())
                per_step = [int((within[r, k] > 0).sum()) for _, within, _ in steps]
                assert max(per_step) - min(per_step) <= 1
    assert not torch.equal(first[0][0], second[0][0])


def test_weights_within_a_cluster_sum_to_one_or_to_nothing():
    runs = make_runs()
    few = [[c[0], c[1], c[2][:2]] for c in runs.clusters]
    runs = Runs(runs.inputs, runs.targets, few, runs.validation, runs.seeds)
    sums = torch.stack([within.sum(-1) for _, within, _ in Batches(runs, 8).epoch()])
    assert ((sums - 1).abs().lt(1e-6) | (sums == 0)).all()
    assert (sums == 0).any()  # two rows do not reach five steps


def test_a_run_does_not_depend_on_the_runs_beside_it(program):
    together = train_clustered(
        program, start(), make_runs(), rule=RULES["dropped"], lr=0.05, epochs=3, batch_size=10
    )
    alone = train_clustered(
        program,
        start(1, first=1),
        make_runs(1, first=1),
        rule=RULES["dropped"],
        lr=0.05,
        epochs=3,
        batch_size=10,
    )
    torch.testing.assert_close(together.validation[1:2], alone.validation)


def test_the_best_epoch_is_kept_and_a_diverged_run_keeps_what_came_before(program):
    runs, weights = make_runs(), start()
    done = train_clustered(program, weights, runs, rule=RULES["plain"], lr=100.0, epochs=6)
    assert not done.validation[:, -1].isfinite().any()
    assert (done.epoch == done.validation.nan_to_num(torch.inf).argmin(1)).all()
    assert all(tensor.isfinite().all() for tensor in done.weights.values())


def test_a_curriculum_starts_on_the_first_cluster_alone(program):
    runs, weights = make_runs(), start()
    firsts = [[c[0], c[1][:0], c[2][:0]] for c in runs.clusters]
    one = Runs(runs.inputs, runs.targets, firsts, runs.validation, runs.seeds)
    options = {"rule": RULES["plain"], "lr": 0.1, "epochs": 1, "batch_size": 40}
    alone = train_clustered(program, weights, one, **options)
    taught = train_clustered(program, weights, runs, curriculum=1.0, **options)
    torch.testing.assert_close(taught.validation, alone.validation)


def test_classes_are_learned_as_well():
    def classifier():
        return architectures.build("mlp", (FEATURES,), 3, widths=(16,))

    runs = make_runs()
    classes = (runs.inputs[..., 0] > 0).long() + (runs.inputs[..., 1] > 0).long()
    runs = Runs(runs.inputs, classes, runs.clusters, runs.validation, runs.seeds)
    program = architectures.program_of(classifier(), (FEATURES,))
    weights = init_networks(classifier, range(RUNS))
    done = train_clustered(
        program, weights, runs, rule=RULES["adam"], lr=0.03, epochs=60, loss=row_cross_entropy
    )
    assert (done.validation.amin(1) < 0.8 * done.validation[:, 0]).all()


def test_equal_gradients_agree_and_opposed_ones_do_not(program):
    runs = make_runs()
    same = [[c[0], c[0]] for c in runs.clusters]
    one = Runs(runs.inputs, runs.targets, same, runs.validation, runs.seeds)
    done = train_clustered(
        program, start(), one, rule=RULES["plain"], lr=0.1, epochs=2, batch_size=40
    )
    torch.testing.assert_close(done.agreement, torch.ones(RUNS, 2))


def test_a_network_with_other_parameters_is_refused():
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 1))
    program = architectures.program_of(model, (4,))
    weights = {key: t[None] for key, t in model.state_dict().items()}
    with pytest.raises(ConfigError, match=r"1\.bias, 1\.weight is no weight"):
        train_clustered(program, weights, make_runs(1), rule=RULES["plain"], lr=0.1, epochs=1)
