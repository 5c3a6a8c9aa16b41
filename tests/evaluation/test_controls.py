"""Controls: trained fairly, on the images they may use, and nothing is chosen on any other."""

import inspect

import pytest
import torch
from torch import nn

from evaluation import controls
from evaluation.metrics import accuracy, family_logits
from metamerge.alignment import weight_matching
from metamerge.structure import Layout, discover_program, trace
from zoo.training import init_networks, predict, train_networks

FAMILIES = 4


@pytest.fixture(scope="module")
def budget(digits_zoo):
    return controls.Budget(digits_zoo.objective, digits_zoo.validation)


@pytest.fixture(scope="module")
def families(digits_zoo):
    return {key: tensor[:FAMILIES] for key, tensor in digits_zoo.unseen.items()}


@pytest.fixture(scope="module")
def start(families, digits_zoo):
    return controls.aligned_average(families, digits_zoo.layout)


@pytest.fixture(scope="module")
def score(digits_zoo):
    """Mean accuracy on test images, which no control is ever given."""
    inputs, targets = digits_zoo.split.images("test")

    def of(weights):
        logits = predict(digits_zoo.layout.program, weights, inputs)
        return float(accuracy(logits, targets).mean())

    return of


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def copy_of(weights):
    return {key: tensor.clone() for key, tensor in weights.items()}


# ---------------------------------------------------------------------------- the images


def test_the_parts_of_a_budget_do_not_meet_and_fill_it(budget):
    objective, validation = budget.rows("objective"), budget.rows("validation")
    assert len(objective) == len(budget.objective[1]) == 300
    assert len(validation) == len(budget.validation[1]) == 100
    together = torch.cat([objective, validation])
    assert torch.equal(together, budget.rows("everything"))
    assert len(together.unique()) == len(together)


def test_rows_of_a_budget_are_those_of_its_parts(budget):
    inputs, targets = budget.everything
    for part in ("objective", "validation"):
        own, labels = getattr(budget, part)
        assert torch.equal(inputs[budget.rows(part)], own)
        assert torch.equal(targets[budget.rows(part)], labels)


@pytest.mark.parametrize("part", ["test", "objectives", ""])
def test_a_part_that_does_not_exist_is_not_everything(budget, part):
    with pytest.raises(KeyError):
        budget.rows(part)


@pytest.mark.parametrize(
    "control",
    [controls.best_members, controls.fine_tuned, controls.from_scratch, controls.distilled],
)
def test_no_control_takes_images_besides_its_budget(control):
    named = inspect.signature(control).parameters
    assert "budget" in named
    assert not {"inputs", "targets", "images", "split", "test", "task"} & set(named)


# ---------------------------------------------------------------------------- nothing is trained


def test_the_best_member_is_the_one_that_knows_most_of_the_budget(digits_zoo, budget):
    families = digits_zoo.unseen
    chosen = controls.best_members(families, digits_zoo.layout, budget)
    inputs, targets = budget.everything
    program = digits_zoo.layout.program
    scores = accuracy(family_logits(program, families, inputs), targets)
    assert torch.equal(accuracy(predict(program, chosen, inputs), targets), scores.amax(1))
    best = scores.argmax(1)
    expected = {k: torch.stack([t[f, best[f]] for f in range(len(t))]) for k, t in families.items()}
    assert same(chosen, expected)


@pytest.mark.parametrize("few", ["objective", "validation"])
def test_the_best_member_is_chosen_on_both_parts_of_the_budget(digits_zoo, budget, few):
    layout = digits_zoo.layout
    family = {key: tensor[:1] for key, tensor in digits_zoo.unseen.items()}
    inputs, targets = budget.objective
    logits = family_logits(layout.program, family, inputs)[0]
    scores = accuracy(logits, targets)
    best, worst = int(scores.argmax()), int(scores.argmin())
    # Twenty images on which the worst member is always right do not make it the best.
    parts = {"objective": budget.objective, "validation": budget.objective}
    parts[few] = (inputs[:20], logits[worst, :20].argmax(-1))
    chosen = controls.best_members(family, layout, controls.Budget(**parts))
    assert same(chosen, {key: tensor[:, best] for key, tensor in family.items()})


def test_the_aligned_average_is_the_mean_of_aligned_members(families, digits_zoo, start):
    spec = digits_zoo.layout.spec
    aligned = spec.permute(families, weight_matching(families, spec))
    assert same(start, {key: tensor.mean(1) for key, tensor in aligned.items()})
    copies = {key: t[:, :1].expand_as(t) for key, t in families.items()}
    shuffled = spec.permute(copies, spec.random(torch.Generator().manual_seed(0), (FAMILIES, 4)))
    found = controls.aligned_average(shuffled, digits_zoo.layout)
    inputs = digits_zoo.validation[0]
    single = {key: tensor[:, 0] for key, tensor in families.items()}
    program = digits_zoo.layout.program
    expected = predict(program, single, inputs)
    assert torch.allclose(predict(program, found, inputs), expected, atol=1e-4)


def test_votes_by_hand():
    program = trace(nn.Sequential(nn.Linear(1, 2, bias=False)), torch.zeros(2, 1))
    layout = Layout(program, discover_program(program))
    # Logits of class 0 are w * x, of class 1 zero: one sure voice against two unsure ones.
    weights = torch.tensor([[[5.0], [0.0]], [[-0.1], [0.0]], [[-0.1], [0.0]]])
    found = controls.votes({"0.weight": weights[None]}, layout, torch.tensor([[1.0], [-1.0]]))
    assert {key: value.tolist() for key, value in found.items()} == {
        "soft_vote": [[0, 1]],
        "majority_vote": [[1, 0]],
    }


# ---------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def tuned(start, digits_zoo, budget):
    return controls.fine_tuned(start, digits_zoo.layout, budget)


def test_fine_tuning_improves_the_start(tuned, start, score):
    weights, rate = tuned
    assert rate in controls.RATES
    assert score(weights) > score(start) + 0.3  # 0.4 becomes 0.9


def test_training_leaves_the_start_as_it_is(start, digits_zoo, budget, monkeypatch):
    monkeypatch.setattr(controls, "RATES", (1e-2,))
    monkeypatch.setattr(controls, "TUNE_EPOCHS", 1)
    before = copy_of(start)
    weights, _ = controls.fine_tuned(start, digits_zoo.layout, budget)
    assert same(start, before)
    assert not same(weights, before)


def test_the_chosen_rate_is_trained_again_on_the_whole_budget(tuned, start, digits_zoo, budget):
    weights, rate = tuned
    inputs, targets = budget.everything
    rows = [budget.rows("everything")] * FAMILIES
    expected = train_networks(
        digits_zoo.layout.program,
        start,
        inputs,
        targets,
        rows,
        epochs=controls.TUNE_EPOCHS,
        lr=rate,
    ).weights
    assert same(weights, expected)


def test_distillation_improves_the_start_towards_the_ensemble(start, families, digits_zoo, budget):
    layout = digits_zoo.layout
    weights, _ = controls.distilled(start, families, layout, budget)
    inputs = digits_zoo.split.images("test")[0]
    vote = controls.votes(families, layout, inputs)["soft_vote"]

    def agrees(weights):
        return float((predict(layout.program, weights, inputs).argmax(-1) == vote).float().mean())

    assert agrees(weights) > agrees(start) + 0.3


def test_distillation_does_not_look_at_objective_labels(
    start, families, digits_zoo, budget, monkeypatch
):
    monkeypatch.setattr(controls, "TUNE_EPOCHS", 2)
    inputs, targets = budget.objective
    other = controls.Budget((inputs, (targets + 1) % 10), budget.validation)
    one = controls.distilled(start, families, digits_zoo.layout, budget)
    two = controls.distilled(start, families, digits_zoo.layout, other)
    assert one[1] == two[1]
    assert same(one[0], two[0])


def test_training_from_scratch_learns_and_its_seeds_decide(digits_zoo, budget, score, monkeypatch):
    monkeypatch.setattr(controls, "RATES", (1e-2,))
    network, layout = digits_zoo.network, digits_zoo.layout
    weights, _ = controls.from_scratch(network, [5, 6], layout, budget)
    assert score(weights) > 0.85  # chance is 0.1
    assert score(init_networks(network, [5, 6])) < 0.3
    monkeypatch.setattr(controls, "SCRATCH_EPOCHS", 0)
    untrained, _ = controls.from_scratch(network, [6, 5], layout, budget)
    assert same(untrained, init_networks(network, [6, 5]))


def test_the_learning_rate_is_chosen_on_validation_images_alone(
    start, digits_zoo, budget, monkeypatch
):
    layout = digits_zoo.layout
    monkeypatch.setattr(controls, "RATES", (0.0, 1e-2))
    monkeypatch.setattr(controls, "TUNE_EPOCHS", 5)
    assert controls.fine_tuned(start, layout, budget)[1] == 1e-2
    # What one network says now is called the truth on validation images: not to learn is best.
    one = {key: tensor[:1] for key, tensor in start.items()}
    said = predict(layout.program, one, budget.validation[0])[0].argmax(-1)
    biased = controls.Budget(budget.objective, (budget.validation[0], said))
    weights, rate = controls.fine_tuned(one, layout, biased)
    assert rate == 0.0
    assert same(weights, one)


def test_validation_images_are_not_trained_on_while_the_rate_is_chosen(
    start, digits_zoo, budget, monkeypatch
):
    seen = []
    monkeypatch.setattr(controls, "TUNE_EPOCHS", 1)
    genuine = controls.train_networks

    def spy(program, weights, inputs, targets, rows, **options):
        seen.append((options["lr"], rows))
        return genuine(program, weights, inputs, targets, rows, **options)

    monkeypatch.setattr(controls, "train_networks", spy)
    _, chosen = controls.fine_tuned(start, digits_zoo.layout, budget)
    *searched, last = seen
    assert [rate for rate, _ in searched] == list(controls.RATES)
    for _, rows in searched:
        assert all(torch.equal(own, budget.rows("objective")) for own in rows)
    assert last[0] == chosen
    assert all(torch.equal(own, budget.rows("everything")) for own in last[1])


def test_the_ceiling_is_trained_on_the_rows_of_its_family_alone(digits_zoo, score):
    task = digits_zoo.split.task
    rows = [torch.cat(digits_zoo.segments[4 * f : 4 * f + 4]).unique() for f in (36, 37)]

    def ceiling(inputs, targets, epochs):
        return controls.on_union(
            digits_zoo.network,
            [1, 2],
            digits_zoo.layout,
            (inputs, targets),
            rows,
            epochs=epochs,
            batch_size=32,
            lr=0.01,
        )

    members = {key: t[:2].flatten(0, 1) for key, t in digits_zoo.unseen.items()}
    assert score(ceiling(task.inputs, task.targets, 15)) > score(members) + 0.3
    inputs, targets = task.inputs.clone(), task.targets.clone()
    others = torch.ones(len(targets), dtype=torch.bool)
    others[torch.cat(rows)] = False
    inputs[others], targets[others] = 0.5, 0
    assert same(ceiling(inputs, targets, 1), ceiling(task.inputs, task.targets, 1))
