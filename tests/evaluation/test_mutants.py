"""Mutants of one family, row by row."""

from dataclasses import replace

import pytest
import torch

from evaluation.bench import Bench
from evaluation.competitors import drawn_images
from evaluation.judged import Judged
from evaluation.metrics import family_logits
from evaluation.mutant_rows import START, all_rows, joined, mutant_rows
from evaluation.mutants import Case, Schedule, _together, operations
from evaluation.scored import Scored
from metamerge.errors import ZooError
from metamerge.structure import Layout, discover_program, run
from zoo import architectures


@pytest.fixture(scope="module")
def case(digits_zoo):
    """The second of three families, with 80 labelled images."""
    judged = Judged(
        name="digits",
        layout=digits_zoo.layout,
        families={key: tensor[:3] for key, tensor in digits_zoo.unseen.items()},
        classes=None,
        split=digits_zoo.split,
        network=digits_zoo.network,
        segments=[
            torch.cat(digits_zoo.segments[4 * f : 4 * f + 4]).unique() for f in range(36, 39)
        ],
        recipe={"epochs": 2, "batch_size": 32, "lr": 1e-2},
        training=None,
        identity={},
    )
    bench = Bench(judged.alone(1), 1, first=1)
    (images,) = drawn_images(bench, "labelled", [80], full=False)
    shape = tuple(digits_zoo.split.task.inputs.shape[1:])

    def network(times):
        return architectures.build("mlp", shape, 10, widths=(round(32 * times),))

    schedule = Schedule(epochs=4, wide_epochs=2, scratch_epochs=1, rounds=2, rates=(1e-3, 1e-2))
    return Case(bench, images.budget, images.data, schedule, network, seed=1)


def test_the_start_says_what_the_members_say(case, digits_zoo):
    assert case.gap < 1e-5
    inputs = digits_zoo.objective[0][:20]
    family = {key: tensor[1:2] for key, tensor in digits_zoo.unseen.items()}
    expected = family_logits(digits_zoo.layout.program, family, inputs)[0].mean(0)
    assert torch.allclose(case.start.answers(inputs), expected, atol=1e-5)


def test_every_way_to_prune_ends_at_a_members_width(case):
    rate = 1e-2
    made = [
        case.at_once("taylor", "everything", rate),
        case.at_once("random", "everything", rate),
        case.on_the_way("everything", rate),
        case.afterwards("everything", rate),
        case.halves(shared=False),
    ]
    assert [m.layout.program == case.layout.program for m in made] == [True] * 5
    assert case.cut(case.start, "objective", "taylor", 2.0).layout.spec.groups == {"1": 64}


def test_members_that_are_frozen_move_in_their_last_layer_only(case):
    before = {key: tensor[0] for key, tensor in case.bench.families.items()}
    frozen = case.joined(True, "everything", 1e-2).weights
    together = case.joined(False, "everything", 1e-2).weights
    assert torch.equal(frozen["1.weight"], before["1.weight"])
    assert not torch.equal(frozen["3.weight"], before["3.weight"])
    assert not torch.equal(together["1.weight"], before["1.weight"])


def test_joined_members_are_trained_as_the_network_that_they_make(case):
    """One step of plain gradient: that of the mean of all logits, each member its share."""
    weights = {k: t[0].clone().requires_grad_() for k, t in case.bench.families.items()}
    inputs, targets = (t[case.budget.rows("objective")][:7] for t in case.budget.everything)
    logits = run(case.layout.program, weights, [inputs], stacked=True)
    found = torch.autograd.grad(
        _together(logits, targets.expand(4, -1)).sum(), list(weights.values()), retain_graph=True
    )
    whole = torch.nn.functional.cross_entropy(logits.mean(0), targets)
    expected = torch.autograd.grad(whole, list(weights.values()))
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(found, expected, strict=True))


def test_operations_by_hand():
    program = architectures.program_of(
        architectures.build("convnet", (1, 8, 8), 3, widths=(2,)), (1, 8, 8)
    )
    layout = Layout(program, discover_program(program))
    assert operations(layout) == 2 * 9 * 64 + 3 * 2 * 16


def test_a_training_that_rows_share_counts_for_each_and_is_made_once(case, monkeypatch):
    rows = {row.method: row for row in mutant_rows(case)}
    first = rows["mutant, trained on"].score()
    trained = []
    monkeypatch.setattr(
        case, "train", lambda *given: trained.append(given) or Case.train(case, *given)
    )
    second = rows["mutant, trained on"].score()
    assert not trained
    assert second.seconds > 0.5 * first.seconds
    assert torch.equal(first.accuracies, second.accuracies)
    assert first.parameters == 4 * 64 * 32 + 4 * 32 + 4 * 32 * 10 + 10


def test_test_images_are_refused_while_networks_are_made(case):
    def peek():
        return case.bench.judged.split.images("test")

    with pytest.raises(ZooError, match="training"):
        case.scored("a row", "none", peek, control=False)


def test_mutants_stand_beside_merging_and_controls(case):
    names = [(row.method, row.data) for row in all_rows(case, ())]
    assert len(set(names)) == len(names)
    assert {
        (START, "none"),
        ("mutant, pruned on the way", "labelled:80"),
        ("joined at the last layer, frozen", "labelled:80"),
        ("halves, each on all segments, fused", "segments"),
        ("average, aligned + refit", "unlabelled:80"),
        ("soft-vote ensemble", "none"),
        ("distilled from best member", "unlabelled:80"),
        ("best member, fine-tuned", "labelled:80"),
        ("trained from scratch", "labelled:80"),
    } < set(names)


def test_families_are_joined_row_by_row():
    one = Scored("a", 2, "none", torch.tensor([0.5]), 1.0, 7, False)
    other = replace(one, accuracies=torch.tensor([0.7]), seconds=3.0)
    whole = joined([one, other])
    assert whole.accuracies.tolist() == pytest.approx([0.5, 0.7])
    assert (whole.seconds, whole.parameters) == (2.0, 7)
