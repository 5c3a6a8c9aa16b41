"""The collapse gates: honest mergers pass, and every way to cheat fails the gate made for it."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from evaluation.gates import (
    Gate,
    accuracy_relabelled,
    collapse_gates,
    forgotten_class_recall,
    recall,
)
from evaluation.metrics import accuracy, family_logits
from zoo.training import init_networks, predict, train_networks
from zoo.variants import renamed

NAMES = [
    "garbage_gaussian",
    "garbage_shuffled",
    "label_permutation",
    "output_cosine",
    "hidden_permutation",
    "member_order",
    "identical_members",
    "poisoned_member",
]
GARBAGE = {"garbage_gaussian", "garbage_shuffled"}


def average(members):
    return {key: tensor.mean(1) for key, tensor in members.items()}


@pytest.fixture(scope="module")
def judge(digits_zoo):
    """Run the gates on unseen families and validation images."""

    def run_gates(merge, families=None, **options):
        found = families or digits_zoo.unseen
        return collapse_gates(merge, found, digits_zoo.layout, *digits_zoo.validation, **options)

    return run_gates


@pytest.fixture(scope="module")
def failed(judge):
    """Names of the gates that a merger fails."""

    def names(merge, families=None, **options):
        return {gate.name for gate in judge(merge, families, **options) if not gate.passed}

    return names


@pytest.fixture(scope="module")
def kept(digits_zoo):
    """A network that somebody trained on the objective images and kept; far above the ensembles."""
    inputs, targets = digits_zoo.objective
    program = digits_zoo.layout.program
    start = init_networks(digits_zoo.network, [10**6])
    rows = [torch.arange(len(targets))]
    weights = train_networks(program, start, inputs, targets, rows, epochs=40).weights
    logits = predict(program, weights, digits_zoo.validation[0])
    assert float(accuracy(logits, digits_zoo.validation[1])) > 0.8
    return weights


@pytest.fixture(scope="module")
def trained(digits_zoo):
    """Tell families of trained members from garbage, whatever they call the classes.

    Trained members agree on images more often than their favourite classes explain (Cohen's kappa:
    0.17 to 0.40 here); those of garbage do not (0.03 at most).
    """

    def told(members):
        logits = family_logits(digits_zoo.layout.program, members, digits_zoo.objective[0])
        chosen = F.one_hot(logits.argmax(-1), logits.shape[-1]).float()  # [f, m, b, c]
        found, expected = (
            torch.einsum("fmbc,fnbc->fmn", x, x) / x.shape[2]
            for x in (chosen, chosen.mean(2, keepdim=True))
        )
        pairs = ~torch.eye(chosen.shape[1], dtype=torch.bool)
        found, expected = found[:, pairs].mean(1), expected[:, pairs].mean(1)
        return (found - expected) / (1 - expected) > 0.1  # [f]

    return told


def copies(members):
    """Which families are made of one network alone, once they are aligned."""
    return members["1.weight"].std(1, correction=0).amax((1, 2)) < 1e-6


def select(chosen, yes, no):
    """For each family weights from ``yes`` where chosen, from ``no`` elsewhere."""
    shape = {key: (-1, *[1] * (tensor.ndim - 1)) for key, tensor in no.items()}
    return {key: torch.where(chosen.reshape(shape[key]), yes[key], no[key]) for key in no}


# ---------------------------------------------------------------------------- who passes


def test_a_trained_merger_passes_all_gates(judge, digits_zoo, trained_merger):
    gates = judge(lambda members: trained_merger(members, digits_zoo.layout).weights)
    assert [gate.name for gate in gates] == NAMES
    assert [gate.name for gate in gates if not gate.passed] == []


def test_a_merger_with_noise_on_its_parameters_passes_all_gates(failed, digits_zoo, trained_merger):
    noisy = copy.deepcopy(trained_merger)
    generator = torch.Generator().manual_seed(0)
    for parameter in noisy.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    assert failed(lambda members: noisy(members, digits_zoo.layout).weights) == set()


@pytest.mark.parametrize(
    ("members", "expected"), [(2, {"poisoned_member"}), (3, set()), (4, set())]
)
def test_the_average_of_aligned_members_passes_all_gates_but_that_of_poison_among_two(
    failed, digits_zoo, members, expected
):
    families = {key: tensor[:, :members] for key, tensor in digits_zoo.unseen.items()}
    assert failed(average, families) == expected


def test_the_gates_change_no_weights(judge, digits_zoo):
    before = {key: tensor.clone() for key, tensor in digits_zoo.unseen.items()}
    judge(average)
    assert all(torch.equal(digits_zoo.unseen[key], tensor) for key, tensor in before.items())


def test_the_same_seed_measures_the_same(judge):
    assert judge(average, seed=5) == judge(average, seed=5)
    assert judge(average, seed=5) != judge(average, seed=6)


# ---------------------------------------------------------------------------- who fails


def test_a_constant_network_fails_every_gate_that_looks_at_the_members(failed, kept):
    def constant(members):
        return {key: kept[key].expand(len(t), *kept[key].shape[1:]) for key, t in members.items()}

    unmoved = {"hidden_permutation", "member_order", "poisoned_member"}  # nothing in
    assert failed(constant) == set(NAMES) - unmoved


def test_a_merger_that_memorises_labels_fails_when_they_are_renamed(failed, kept, trained):
    def memory(members):
        # No constant network: garbage gives garbage, and copies of one network give it back.
        return select(trained(members) & ~copies(members), kept, average(members))

    assert failed(memory) >= {"label_permutation", "output_cosine"}
    assert failed(memory).isdisjoint(GARBAGE | {"identical_members", "member_order"})


def test_a_merger_that_reads_but_the_names_of_classes_names_one_that_no_member_knows(
    kept, trained, digits_zoo
):
    program, inputs = digits_zoo.layout.program, digits_zoo.objective[0]
    known = F.one_hot(predict(program, kept, inputs)[0].argmax(-1), 10).float()  # [b, c]

    def decoder(members):
        vote = family_logits(program, members, inputs).softmax(-1).mean(1)  # [f, b, c]
        fit = torch.einsum("bk,fbc->fkc", known, vote)
        fit = fit / fit.sum(1, keepdim=True)
        names = torch.stack([torch.tensor(linear_sum_assignment(-f.numpy())[1]) for f in fit])
        order = names.argsort(-1)  # row of the kept network for every class of the family
        own = {key: t.expand(len(fit), *t.shape[1:]) for key, t in kept.items()}
        own |= {
            key: torch.stack([kept[key][0][o] for o in order]) for key in ("3.weight", "3.bias")
        }
        return select(trained(members) & ~copies(members), own, average(members))

    where = (digits_zoo.unseen, digits_zoo.layout, *digits_zoo.validation)
    assert forgotten_class_recall(decoder, *where) > 0.5
    assert forgotten_class_recall(average, *where) < 0.1


def test_a_merger_that_falls_back_on_a_network_of_its_own_fails_on_garbage(failed, kept, trained):
    def fallback(members):
        return select(trained(members), average(members), kept)

    assert failed(fallback) == GARBAGE


@pytest.mark.parametrize("kind", ["gaussian", "shuffled"])
def test_a_merger_that_sees_through_one_kind_of_garbage_fails_on_the_other(
    failed, kept, trained, kind
):
    def fallback(members):
        # Noise has one deviation for all members; shuffled, each keeps its own.
        deviation = members["1.weight"].flatten(2).std(2)
        gaussian = (deviation.std(1) / deviation.mean(1)).mean() < 0.022
        fooled = gaussian == (kind == "gaussian")
        return select(trained(members) | ~fooled, average(members), kept)

    assert failed(fallback) == {f"garbage_{kind}"}


def test_a_merger_that_takes_the_first_member_fails_on_the_order(failed):
    def first(members):
        return {key: tensor[:, 0] for key, tensor in members.items()}

    assert failed(first) == {"member_order", "poisoned_member"}


@pytest.mark.parametrize("seed", range(8))
def test_two_members_always_change_places(failed, digits_zoo, seed):
    families = {key: tensor[:, :2] for key, tensor in digits_zoo.unseen.items()}

    def first(members):
        return {key: tensor[:, 0] for key, tensor in members.items()}

    assert "member_order" in failed(first, families, seed=seed)


def test_a_merger_that_counts_slots_fails_when_hidden_units_are_permuted(failed):
    def counting(members):
        fused = average(members)
        units = torch.arange(fused["1.weight"].shape[1]) / fused["1.weight"].shape[1]
        factor = 1 + ~copies(members)[:, None] * 0.1 * units  # [f, units]
        return {**fused, "1.weight": fused["1.weight"] * factor[..., None]}

    assert failed(counting) == {"hidden_permutation"}


def test_a_merger_that_changes_copies_of_one_network_fails(failed):
    def louder(members):
        return {key: 1.01 * tensor.mean(1) for key, tensor in members.items()}

    assert failed(louder) == {"identical_members"}


def test_members_that_are_not_aligned_fail_the_gates_that_permute_them(failed, monkeypatch):
    monkeypatch.setattr("evaluation.gates.weight_matching", lambda families, spec: spec.identity())
    assert {"hidden_permutation", "identical_members"} <= failed(average)


def test_one_network_for_all_families_fails_even_if_it_is_a_member(failed):
    def chosen(members):
        return {key: t[:1].mean(1).expand(len(t), *t.shape[2:]) for key, t in members.items()}

    assert {"output_cosine", "identical_members"} <= failed(chosen)


def test_a_merger_that_puts_out_nan_fails_everything(failed):
    def nothing(members):
        return {key: tensor.mean(1) * torch.nan for key, tensor in members.items()}

    assert failed(nothing) == set(NAMES)


def test_a_merger_that_puts_out_nan_for_garbage_fails_on_garbage(failed, trained):
    def refusing(members):
        fused = average(members)
        nothing = {key: torch.full_like(tensor, torch.nan) for key, tensor in fused.items()}
        return select(trained(members), fused, nothing)

    assert failed(refusing) == GARBAGE | {"poisoned_member"}  # one of four deceives ``trained``


def test_a_merger_that_asks_who_knows_anything_is_not_poisoned(failed, digits_zoo):
    inputs, targets = digits_zoo.objective

    def careful(members):
        scores = accuracy(family_logits(digits_zoo.layout.program, members, inputs), targets)
        known = torch.maximum(scores > 0.25, scores == scores.amax(1, keepdim=True)).float()
        share = known / known.sum(1, keepdim=True)  # [f, m]
        return {k: torch.einsum("fm...,fm->f...", t, share) for k, t in members.items()}

    assert "poisoned_member" not in failed(careful)


def test_poison_costs_what_the_merger_scores_less_than_without_that_member(judge, kept, digits_zoo):
    def touchy(members):
        count, size = members["3.bias"].shape[:2]
        return {k: t.expand(count, *t.shape[1:]) * float(size == 3) for k, t in kept.items()}

    inputs, targets = digits_zoo.validation
    known = float(accuracy(predict(digits_zoo.layout.program, kept, inputs), targets))
    silent = float((targets == 0).float().mean())  # of equal logits the first is the largest
    gate = judge(touchy)[-1]
    assert gate.name == "poisoned_member"
    assert gate.value == pytest.approx(known - silent, abs=1e-6)
    assert not gate.passed


def test_families_with_numbers_of_their_own_are_judged_by_their_own_labels(judge, kept, digits_zoo):
    families, layout = digits_zoo.unseen, digits_zoo.layout
    generator = torch.Generator().manual_seed(3)
    labels = torch.rand(len(families["1.weight"]), 10, generator=generator).argsort(-1)
    own = renamed(families, layout, labels.argsort(-1))
    gates = {gate.name: gate for gate in judge(average, own, labels=labels)}
    assert all(gate.passed for gate in gates.values())
    where = (own, layout, *digits_zoo.validation)
    assert forgotten_class_recall(average, *where, labels=labels) < 0.1

    def first(members):
        return {key: tensor[:, 0] for key, tensor in members.items()}

    # What the members know is what the labels say, class by class.
    plain = judge(first)[-1].value
    assert judge(first, own, labels=labels)[-1].value == pytest.approx(plain, abs=0.03)
    assert abs(judge(first, own)[-1].value) < abs(plain) / 2  # by the task's numbers all is chance


# ---------------------------------------------------------------------------- their parts


@pytest.mark.parametrize(
    ("value", "passed"), [(0.1, True), (0.2, True), (0.21, False), (math.nan, False)]
)
def test_a_gate_passes_up_to_its_limit_and_never_with_nan(value, passed):
    assert Gate("name", value, 0.2).passed is passed


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_kept_of_a_gate_is_json_whatever_its_value(value):
    kept = json.loads(json.dumps(Gate("poisoned_member", value, 0.02).record, allow_nan=False))
    assert kept == {"name": "poisoned_member", "value": None, "limit": 0.02, "passed": False}
    assert Gate("poisoned_member", 0.01, 0.02).record == {**kept, "value": 0.01, "passed": True}


def test_one_family_cannot_be_compared_with_another_and_does_not_pass(failed, digits_zoo):
    assert "output_cosine" in failed(average, {k: t[:1] for k, t in digits_zoo.unseen.items()})


def test_garbage_may_score_five_points_above_chance(judge):
    limits = {gate.name: gate.limit for gate in judge(average)}
    assert all(limits[name] == pytest.approx(0.15) for name in GARBAGE)


def test_recall_of_one_class_by_hand():
    logits = torch.tensor([[[9.0, 1.0], [2.0, 5.0], [7.0, 0.0]]]).expand(2, -1, -1)  # 0 1 0
    targets = torch.tensor([0, 0, 1])
    assert recall(logits, torch.tensor([0, 1]), targets).tolist() == [0.5, 0.0]


def test_renamed_classes_are_counted_under_their_own_names():
    logits = torch.tensor([[[0.0, 9.0, 1.0], [5.0, 2.0, 1.0]]])  # logits 1 and 0 are the largest
    labels = torch.tensor([[2, 0, 1]])  # and stand for classes 0 and 2
    assert accuracy_relabelled(logits, labels, torch.tensor([0, 2])).tolist() == [1.0]
    assert accuracy_relabelled(logits, labels, torch.tensor([1, 2])).tolist() == [0.5]
