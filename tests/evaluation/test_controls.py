"""Controls: trained fairly, on the images they may use, and nothing is chosen on any other."""

import inspect

import pytest
import torch
from torch import nn

from evaluation import controls
from evaluation.metrics import accuracy, family_logits
from metamerge.alignment import weight_matching
from metamerge.errors import StructureError
from metamerge.structure import Layout, discover_program, trace
from metamerge.weights import stack
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
    [
        controls.best_members,
        controls.bias_corrected,
        controls.prior_corrected,
        controls.fine_tuned,
        controls.from_scratch,
        controls.distilled,
    ],
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
    inputs = torch.tensor([[1.0], [-1.0]])
    logits = family_logits(layout.program, {"0.weight": weights[None]}, inputs)
    assert controls.soft_vote(logits).tolist() == [[0, 1]]
    assert controls.majority(logits).tolist() == [[1, 0]]


# ---------------------------------------------------------------------------- output biases


@pytest.fixture(scope="module")
def split_by_classes(digits_zoo):
    """Two families of two members: each has 80 % of its images from one half of the classes."""
    task, rows = digits_zoo.split.task, digits_zoo.split.rows("segments")
    generator = torch.Generator().manual_seed(0)
    segments = []
    for _ in range(2):
        for half in (task.targets[rows] < 5, task.targets[rows] >= 5):
            counts = ((half, 240), (~half, 60))
            own = [
                rows[mask][torch.randperm(int(mask.sum()), generator=generator)[:count]]
                for mask, count in counts
            ]
            segments.append(torch.cat(own))
    weights = train_networks(
        digits_zoo.layout.program,
        init_networks(digits_zoo.network, range(4)),
        task.inputs,
        task.targets,
        segments,
        epochs=15,
    ).weights
    shares = torch.stack([task.targets[s].bincount(minlength=10) / len(s) for s in segments])
    return {key: t.unflatten(0, (2, 2)) for key, t in weights.items()}, shares


def test_a_bias_helps_a_member_that_was_trained_on_an_80_20_class_split(
    split_by_classes, digits_zoo, budget, score
):
    families, _ = split_by_classes
    corrected, ridge = controls.bias_corrected(families, digits_zoo.layout, budget)
    best = controls.best_members(families, digits_zoo.layout, budget)
    assert ridge in controls.RIDGES
    assert score(corrected) > score(best) + 0.002


def test_a_bias_helps_members_of_skewed_segments_most(families, digits_zoo, budget, score):
    corrected, _ = controls.bias_corrected(families, digits_zoo.layout, budget)
    assert (
        score(corrected) > score(controls.best_members(families, digits_zoo.layout, budget)) + 0.03
    )


def test_a_bias_is_all_that_is_corrected(families, digits_zoo, budget):
    before, layout = copy_of(families), digits_zoo.layout
    corrected, _ = controls.bias_corrected(families, layout, budget)
    assert same(families, before)
    for f in range(FAMILIES):
        owners = [
            m for m in range(4) if torch.equal(corrected["1.weight"][f], families["1.weight"][f, m])
        ]
        assert len(owners) == 1
        assert torch.equal(corrected["3.weight"][f], families["3.weight"][f, owners[0]])
        assert not torch.equal(corrected["3.bias"][f], families["3.bias"][f, owners[0]])


def test_the_ridge_of_biases_is_chosen_on_validation_images(families, digits_zoo, budget):
    layout = digits_zoo.layout
    one = {key: t[:1, :1] for key, t in families.items()}
    said = predict(layout.program, {k: t[0] for k, t in one.items()}, budget.validation[0])[0]
    # What the member says now is called the truth on validation images: to stay is best.
    biased = controls.Budget(budget.objective, (budget.validation[0], said.argmax(-1)))
    assert controls.bias_corrected(one, layout, biased)[1] == max(controls.RIDGES)


def test_the_shares_of_a_new_prior_are_found_without_labels_by_hand():
    # A member that learned equal shares, on 8 inputs like one class and 2 like the other.
    program = trace(nn.Sequential(nn.Linear(1, 2)), torch.zeros(2, 1))
    layout = Layout(program, discover_program(program))
    start = {"0.weight": torch.tensor([[[9.0], [0.0]]]), "0.bias": torch.zeros(1, 2)}
    inputs = torch.tensor([[1.0]] * 8 + [[-1.0]] * 2)
    images = (inputs, torch.zeros(10, dtype=torch.long))
    budget = controls.Budget(images, images)
    found, shares = controls.prior_corrected(start, layout, budget, torch.tensor([[0.5, 0.5]]))
    assert shares[0].tolist() == pytest.approx([0.8, 0.2], abs=1e-3)
    gap = found["0.bias"][0, 0] - found["0.bias"][0, 1]
    assert float(gap) == pytest.approx(float(torch.tensor(4.0).log()), abs=1e-2)


def test_a_prior_that_is_known_helps_members_of_an_80_20_class_split(
    split_by_classes, digits_zoo, budget, score
):
    families, shares = split_by_classes
    members = {key: t.flatten(0, 1) for key, t in families.items()}
    found, classes = controls.prior_corrected(members, digits_zoo.layout, budget, shares)
    assert score(found) > score(members)
    assert torch.allclose(classes.sum(1), torch.ones(4).double())
    assert float((classes - 0.1).abs().max()) < float((shares - 0.1).abs().max())


def test_networks_without_an_output_bias_are_refused():
    program = trace(nn.Sequential(nn.Linear(2, 3, bias=False)), torch.zeros(2, 2))
    layout = Layout(program, discover_program(program))
    with pytest.raises(StructureError, match="with a bias"):
        controls.shifted({"0.weight": torch.zeros(1, 3, 2)}, layout, torch.zeros(1, 3))


# ---------------------------------------------------------------------------- other members


def test_recalibrated_members_have_their_own_statistics_on_the_inputs():
    make = lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))  # noqa: E731
    torch.manual_seed(0)
    modules = [make().eval() for _ in range(4)]
    inputs = 3 + torch.randn(50, 4)
    program = trace(modules[0], inputs)
    layout = Layout(program, discover_program(program))
    families = {
        k: t.unflatten(0, (2, 2)) for k, t in stack([m.state_dict() for m in modules]).items()
    }
    found = controls.recalibrated(families, layout, inputs)
    with torch.no_grad():
        rows = modules[3][0](inputs)
    assert torch.allclose(found["1.running_mean"][1, 1], rows.mean(0), atol=1e-5)
    assert torch.allclose(found["1.running_var"][1, 1], rows.var(0), rtol=1e-4)
    assert torch.equal(found["0.weight"], families["0.weight"])


def test_members_without_statistics_are_not_changed(families, digits_zoo, budget):
    found = controls.recalibrated(families, digits_zoo.layout, budget.objective[0])
    assert same(found, families)


def test_garbage_has_the_moments_of_the_members_and_knows_nothing(families, digits_zoo, score):
    garbage = controls.garbage_members(families, seed=1)
    for key, tensor in families.items():
        assert garbage[key].shape == tensor.shape
        error = 4 * float(tensor.std()) / tensor.numel() ** 0.5
        assert abs(float(garbage[key].mean() - tensor.mean())) < error
        assert float(garbage[key].std() / tensor.std()) == pytest.approx(1, abs=0.15)
    assert same(garbage, controls.garbage_members(families, seed=1))
    assert not same(garbage, controls.garbage_members(families, seed=2))
    assert score({key: tensor.flatten(0, 1) for key, tensor in garbage.items()}) < 0.2
    assert score(controls.aligned_average(garbage, digits_zoo.layout)) < 0.3


def test_fitted_ensembles_beat_the_vote(digits_zoo, budget):
    layout, (inputs, targets) = digits_zoo.layout, digits_zoo.split.images("test")
    two = {key: tensor[:2] for key, tensor in digits_zoo.unseen.items()}

    def score(kind):
        said = controls.ensembles(two, layout, budget, inputs, kind=kind)
        return float((said.argmax(-1) == targets).float().mean())

    vote = controls.soft_vote(family_logits(layout.program, two, inputs))
    known = float((vote == targets).float().mean())
    assert min(map(score, ("learned_consensus", "gated_consensus"))) > known + 0.03
    assert score("soft_vote") == pytest.approx(known, abs=1e-6)


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
    vote = controls.soft_vote(family_logits(layout.program, families, inputs))

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
