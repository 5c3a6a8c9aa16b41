"""What segments may be cut by: features of rows, and that only rows of the segments have a say."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from zoo import architectures, reference
from zoo.parts import split_task
from zoo.recipe import CLUSTERED, ZooOptions, factory_for
from zoo.reference import features_for
from zoo.splits import features
from zoo.tasks import Task, load_task

OPTIONS = ZooOptions(widths=(8,), split="clusters", reference_epochs=2.0)
ASKED = [{"by": by} for by in CLUSTERED] + [{"split": "difficulty"}]
TASKS = ("digits", "diabetes")


@pytest.fixture(scope="module", params=TASKS)
def split(request):
    return cut(request.param)


@pytest.fixture(scope="module", autouse=True)
def _traced_once():
    """Tracing takes longer than all the rest: networks that look alike share their program."""
    known, original = {}, architectures.program_of

    def program_of(model, shape):
        key = (repr(model), tuple(shape))
        if key not in known:
            known[key] = original(model, shape)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(architectures, "program_of", program_of)
        yield


def cut(name):
    """Three hundred rows of a task, so that reference networks take no time."""
    task = load_task(name)
    small = Task(
        name, task.inputs[:300], task.targets[:300], task.classes, standardise=task.standardise
    )
    return split_task(small, objective=100)


@pytest.fixture
def trained(monkeypatch):
    """Reference networks that were trained: stacked weights and the rows of each."""
    seen = []
    original = reference.train_networks

    def spy(program, weights, inputs, targets, rows, **options):
        result = original(program, weights, inputs, targets, rows, **options)
        seen.append((result.weights, rows, options))
        return result

    monkeypatch.setattr(reference, "train_networks", spy)
    return seen


def asked_for(parts, **changes):
    (found,) = features_for(replace(OPTIONS, **changes), parts).values()
    return found


def altered(split, rows):
    """The same split of a task in which some rows hold something else."""
    generator = torch.Generator().manual_seed(1)
    inputs, targets = split.task.inputs.clone(), split.task.targets.clone()
    inputs[rows] = inputs[rows][torch.randperm(len(rows), generator=generator)].flip(-1)
    if split.task.regression:
        targets[rows] = -3 * targets[rows] + 1
    else:
        targets[rows] = (targets[rows] + 3) % split.task.classes
    task = replace(split.task, inputs=inputs, targets=targets)
    return replace(split, task=task)


def modules(split, weights, **changes):
    count = len(next(iter(weights.values())))
    for i in range(count):
        model = factory_for(replace(OPTIONS, **changes), split.task)().eval()
        model.load_state_dict({key: tensor[i] for key, tensor in weights.items()})
        yield model


# ---------------------------------------------------------------------------- who has a say


@pytest.mark.parametrize("changes", ASKED, ids=str)
def test_only_rows_of_the_segments_have_a_say(split, changes):
    own = split.rows("segments")
    others = torch.cat([split.rows(part) for part in ("objective", "validation", "test")])
    found, again = (asked_for(task, **changes)[own] for task in (split, altered(split, others)))
    assert torch.equal(found, again)
    assert found.isfinite().all()


@pytest.mark.parametrize("changes", ASKED, ids=str)
def test_rows_of_the_segments_do_have_a_say(split, changes):
    own = split.rows("segments")
    changed = asked_for(altered(split, own[:40]), **changes)[own]
    found = asked_for(split, **changes)[own]
    assert changed.shape != found.shape or not torch.equal(found, changed)


@pytest.mark.parametrize("changes", ASKED, ids=str)
def test_every_row_of_the_task_has_an_entry_in_float32(split, changes):
    found = asked_for(split, **changes)
    assert len(found) == 300
    assert found.dtype == torch.float32
    assert found.ndim == (1 if "split" in changes else 2)


@pytest.mark.parametrize("changes", ASKED, ids=str)
def test_the_seed_decides_about_networks_and_nothing_else(split, changes):
    one = asked_for(split, **changes)
    torch.manual_seed(7)
    assert torch.equal(one, asked_for(split, **changes))
    if changes.get("by") not in (
        "inputs",
        "important",
        "labels",
        "targets",
    ):  # those train a network
        assert not torch.equal(one, asked_for(split, seed=1, **changes))


@pytest.mark.parametrize("name", ["disjoint", "dirichlet", "everything", "bins", "quantity"])
def test_other_splits_ask_for_nothing_and_train_nothing(split, name, trained):
    assert features_for(replace(OPTIONS, split=name), split) == {}
    assert trained == []


# ---------------------------------------------------------------------------- without a network


def test_inputs_are_flattened(split, trained):
    assert torch.equal(asked_for(split, by="inputs"), split.task.inputs.flatten(1))
    assert trained == []


def test_targets_are_one_number_per_class():
    split = cut("digits")
    found = asked_for(split, by="targets")
    assert found.shape == (300, 10)
    assert torch.equal(found.argmax(1), split.task.targets)
    assert found.sum(1).tolist() == [1.0] * 300


def test_targets_of_a_regression_are_the_tenths_of_its_rows():
    split = cut("diabetes")
    rows = split.rows("segments")
    found = asked_for(split, by="targets")[rows].flatten()
    counts = found.long().bincount(minlength=10)
    assert len(counts) == 10
    # A tenth of 125 rows is 12.5; a handful of equal targets falls to one side of a border.
    assert counts.min() >= 9
    assert counts.max() <= 16
    order = split.task.targets[rows].flatten().argsort()
    assert (found[order].diff() >= 0).all()


def test_important_inputs_are_some_of_the_inputs():
    split = cut("digits")
    found = asked_for(split, by="important")
    columns = {tuple(column) for column in split.task.inputs.flatten(1).T.tolist()}
    assert found.shape == (300, 32)
    assert {tuple(column) for column in found.T.tolist()} <= columns


# ---------------------------------------------------------------------------- with a network


@pytest.mark.parametrize("name", TASKS)
def test_errors_are_those_of_a_network_that_has_not_seen_the_row(name, trained):
    split = cut(name)
    found = asked_for(split, by="errors")
    ((weights, halves, _),) = trained
    rows = split.rows("segments")
    assert torch.equal(torch.cat(halves).sort().values, rows)
    assert abs(len(halves[0]) - len(halves[1])) <= 1
    for model, unseen in zip(modules(split, weights), reversed(halves), strict=True):
        with torch.no_grad():
            outputs = model(split.task.inputs[unseen])
        expected = features.errors(outputs, split.task.targets[unseen])
        torch.testing.assert_close(found[unseen], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TASKS)
def test_difficulty_is_the_loss_of_a_network_that_has_not_seen_the_row(name, trained):
    split = cut(name)
    found = asked_for(split, split="difficulty")
    ((weights, halves, _),) = trained
    for model, unseen in zip(modules(split, weights), reversed(halves), strict=True):
        targets = split.task.targets[unseen]
        with torch.no_grad():
            outputs = model(split.task.inputs[unseen])
        if name == "digits":
            expected = F.cross_entropy(outputs, targets, reduction="none")
        else:
            expected = (outputs - targets).square().mean(1)
        torch.testing.assert_close(found[unseen], expected, rtol=1e-4, atol=1e-5)


def test_a_label_that_is_wrong_makes_its_own_row_hard_and_no_other_of_its_half():
    """The network that judges a row never saw it, so its logits are what they were."""
    split = cut("digits")
    rows = split.rows("segments")
    wrong = altered(split, rows[:1])
    before, after = (asked_for(s, split="difficulty")[rows] for s in (split, wrong))
    same = before == after
    assert not same[0]
    assert len(rows) // 2 - 1 <= int(same.sum()) <= len(rows) // 2 + 1


@pytest.mark.parametrize(
    ("name", "changes"),
    [("digits", {}), ("diabetes", {}), ("digits", {"architecture": "cnn", "widths": (3, 4)})],
    ids=str,
)
def test_activations_are_what_the_last_layer_reads(name, changes, trained):
    split = cut(name)
    found = asked_for(split, by="activations", **changes)
    ((weights, (rows,), _),) = trained
    assert torch.equal(rows, split.rows("segments"))
    (model,) = modules(split, weights, **changes)
    with torch.no_grad():
        expected = model[:-1](split.task.inputs[rows])
    torch.testing.assert_close(found[rows], expected, rtol=1e-4, atol=1e-5)
    assert found.shape == (300, 4 if changes else 8)
    assert float(found[rows].std()) > 0


def test_long_tasks_are_read_in_batches(split, monkeypatch):
    expected = [asked_for(split, **changes) for changes in ASKED]
    monkeypatch.setattr(reference, "_BATCH", 7)
    for changes, whole in zip(ASKED, expected, strict=True):
        torch.testing.assert_close(asked_for(split, **changes), whole, rtol=1e-4, atol=1e-5)


def test_a_reference_network_is_one_of_the_zoo_that_knows_every_class(trained):
    split = cut("digits")
    options = {"classes_per_family": 3, "batch_size": 16, "lr": (0.02, 0.5), "seed": 4}
    asked_for(split, by="errors", **options)
    ((weights, _, given),) = trained
    assert weights["1.weight"].shape == (2, 8, 64)
    assert weights["3.weight"].shape == (2, 10, 8)
    told = {name: given[name] for name in ("epochs", "batch_size", "lr", "seed")}
    assert told == {"epochs": 2.0, "batch_size": 16, "lr": 0.02, "seed": 4}


def test_reference_networks_have_learned_something():
    split = cut("digits")
    rows = split.rows("segments")
    scores = [
        asked_for(split, split="difficulty", reference_epochs=e)[rows].mean() for e in (0.0, 40.0)
    ]
    assert scores[1] < 0.75 * scores[0]  # on 60 rows each; measured: 1.5 of 2.3
