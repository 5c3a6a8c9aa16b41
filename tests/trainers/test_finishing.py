"""What is left to do once a merger is trained."""

from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from evaluation.gates import Gate
from metamerge.mergers import GNNConfig, GNNMerger, ThresholdObjective, fuse, fuse_beside
from metamerge.mergers.gate import answers_of
from metamerge.mergers.watching import told_apart
from trainers import finishing
from trainers.families import Data
from trainers.finishing import (
    FILL,
    LONG,
    REFINING,
    Way,
    chosen,
    familiarity,
    promising,
    settle,
    try_inputs,
    try_refining,
)
from trainers.validating import Goal, score

FUSED = [way for way in REFINING if way.start == "fused"]


@pytest.mark.parametrize(
    ("plain", "mixed", "expected"),
    [
        ((0.90, 0.90, 0.90, 0.90), (0.90, 0.90, 0.90, 0.90), (0, 0)),
        # more steps add next to nothing
        ((0.80, 0.90, 0.9002, 0.9004), (0.80, 0.85, 0.85, 0.85), (100, 0)),
        ((0.80, 0.90, 0.9002, 0.9006), (0.80, 0.85, 0.85, 0.85), (200, 0)),
        # by 0.011, and the error is 0.0115
        ((0.80, 0.90, 0.80, 0.80), (0.85, 0.85, 0.85, 0.911), (100, 0)),
        ((0.80, 0.90, 0.80, 0.80), (0.85, 0.85, 0.85, 0.912), (400, FILL)),
        ((0.80, 0.90, 0.80, 0.80), (0.85, 0.85, 0.9296, 0.93), (200, FILL)),
    ],
)
def test_the_least_refining_is_chosen_that_is_as_good_by_hand(plain, mixed, expected):
    """Of three families: gains of mixtures are two points on each side of their mean."""
    spread = torch.tensor([-0.02, 0.0, 0.02], dtype=torch.float64)
    found = {w: s + spread * bool(w.mixtures) for w, s in zip(FUSED, plain + mixed, strict=True)}
    worse = torch.full((3,), 0.7).double()
    assert chosen({way: found.get(way, worse) for way in REFINING}) == Way(*expected)


@pytest.mark.parametrize(
    ("plain", "spread", "expected"),
    [
        ((0.90, 0.91, 0.92, 0.93), 0.0, True),
        ((0.90, 0.89, 0.89, 0.9001), 0.0, True),  # a start is left before it is bettered
        ((0.90, 0.92, 0.93, 0.92), 0.0, False),
        ((0.90, 0.92, 0.93, 0.92), 0.02, True),  # worse by 0.01, and the error is 0.0115
        ((0.90, 0.92, 0.932, 0.92), 0.02, False),
        ((0.90, 0.89, 0.89, 0.8999), 0.02, False),  # nothing is gained by steps
        ((0.90, 0.90, 0.90, 0.90), 0.0, False),
    ],
)
def test_many_steps_are_tried_where_the_most_of_few_are_as_good_as_any(plain, spread, expected):
    """Of three families; what 400 steps make of them is spread out."""
    found = {way: torch.full((3,), 0.99).double() for way in REFINING}
    steps = [way for way in FUSED if not way.mixtures]
    found |= {w: torch.full((3,), s).double() for w, s in zip(steps, plain, strict=True)}
    found[Way(400, 0)] += spread * torch.tensor([-1.0, 0.0, 1.0]).double()
    assert promising(found) == expected


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ((0.0009, 0.0009, 0.0009), Way(100, 0)),  # not worth it
        ((-0.01, 0.0, 0.02), Way(100, 0)),  # by 0.0033, and the error is 0.0088
        ((0.0011, 0.0011, 0.0011), LONG),
        ((0.01, 0.02, 0.03), LONG),
    ],
)
def test_many_steps_have_to_be_worth_their_time(gains, expected):
    found = {way: torch.full((3,), 0.9 if way.steps else 0.8).double() for way in REFINING}
    assert chosen({**found, LONG: 0.9 + torch.tensor(gains).double()}) == expected


@pytest.mark.parametrize(("gain", "expected"), [(0.0009, (0, 0)), (0.0011, (0, FILL))])
def test_mixtures_have_to_be_worth_their_time(gain, expected):
    """Every family gains as much, so the error is 0."""
    found = {w: torch.full((3,), 0.5 + gain * bool(w.mixtures)).double() for w in REFINING}
    assert chosen(found) == Way(*expected)


def test_one_family_alone_is_no_reason_for_mixtures():
    found = {way: torch.tensor([0.5 + 0.4 * bool(way.mixtures)]) for way in REFINING}
    assert chosen(found) == Way(0, 0)


@pytest.mark.parametrize(
    ("short", "mixed", "expected"),
    [
        ((0.9, 0.9, 0.9), (0.9, 0.9, 0.9), Way(100, 0)),  # as good as the fused network
        ((0.9009, 0.9009, 0.9009), (0.9, 0.9, 0.9), Way(100, 0)),  # not worth it
        ((0.89, 0.9, 0.92), (0.9, 0.9, 0.9), Way(100, 0)),  # by 0.0033, and the error is 0.0088
        ((0.91, 0.92, 0.93), (0.9, 0.9, 0.9), Way(100, 0, "member")),
        ((0.91, 0.92, 0.93), (0.92, 0.93, 0.94), Way(100, FILL, "member")),
        ((0.7, 0.7, 0.7), (0.92, 0.93, 0.94), Way(100, FILL, "member")),
    ],
)
def test_a_member_is_the_start_where_it_clearly_gains(short, mixed, expected):
    """A fused network has 0.9 after 100 steps, in all three families."""
    found = {way: torch.full((3,), 0.9 if way.steps else 0.8).double() for way in FUSED}
    for way in set(REFINING) - set(FUSED):
        found[way] = torch.tensor(mixed if way.mixtures else short).double()
    assert chosen(found) == expected


@pytest.mark.parametrize(
    ("harmful", "expected"),
    [
        ((), Way(400, FILL, "member")),
        ((Way(400, FILL, "member"),), Way(200, FILL)),
        ((Way(400, FILL, "member"), Way(200, FILL)), LONG),
        ((Way(400, FILL, "member"), Way(200, FILL), LONG), Way(100, 0)),
        ((Way(400, FILL, "member"), Way(200, FILL), LONG, Way(100, 0)), Way(0, 0)),
        ((Way(400, FILL, "member"), Way(200, FILL), LONG, Way(100, 0), Way(0, 0)), Way(0, 0)),
    ],
)
def test_refining_that_breaks_a_gate_is_not_chosen(monkeypatch, harmful, expected):
    def way_of(config):
        return Way(config.refine, config.mixtures, config.start)

    def gates_of(merger, group):
        broken = way_of(merger.config) in harmful
        return [Gate("poisoned_member", 0.03 if broken else 0.01, 0.02)]

    monkeypatch.setattr(finishing, "gates_of", gates_of)
    best = {Way(100, 0): 0.9, LONG: 0.92, Way(200, FILL): 0.95, Way(400, FILL, "member"): 0.97}
    refined = {way: torch.full((3,), best.get(way, 0.8)).double() for way in (*REFINING, LONG)}
    merger = SimpleNamespace(config=GNNConfig())
    found, gates = settle(merger, refined, [SimpleNamespace(name="k3")])
    assert found == way_of(merger.config) == expected
    assert gates["k3"][0].passed == (expected not in harmful)


# ---------------------------------------------------------------------------- spare probes


@pytest.fixture
def sparing(trained_merger):
    """The trained merger, most of whose probes have become spare."""
    merger = deepcopy(trained_merger)
    merger.config = replace(merger.config, probes=24, spare=40, refine=100)
    merger.probes.count = 24
    return merger


@pytest.fixture
def judging():
    return Goal(ThresholdObjective(), labels=True, at_once=12)


def test_what_validation_families_choose_from_is_what_a_merge_makes_of_spare_probes(
    make_families, sparing, judging
):
    group = make_families()
    found = try_refining(sparing, [group], judging, (Way(0, 0), Way(100, 0)))
    for steps in (0, 100):
        fused = fuse(sparing, group.weights, group.layout, steps=steps)
        expected = score(fused, group, group.targets())
        assert found[Way(steps, 0)].float() == pytest.approx(expected, abs=0.006)  # two images
    alone = deepcopy(sparing)
    alone.probes.banks["1x8x8"] = sparing.probes.banks["1x8x8"][:24]
    less = try_refining(alone, [group], judging, (Way(0, 0), Way(100, 0)))
    assert torch.equal(less[Way(0, 0)], found[Way(0, 0)])
    assert not torch.equal(less[Way(100, 0)], found[Way(100, 0)])


def test_inputs_are_tried_beside_spare_probes_as_they_are_in_use(make_families, sparing, judging):
    group = make_families()
    found = try_inputs(sparing, Data([], [group], [group]), judging)
    assert len(found) == len(group)
    for family in range(0, len(group), 3):
        one = {key: tensor[[family]] for key, tensor in group.weights.items()}
        fused = fuse_beside(sparing, one, group.layout, group.images[0])
        expected = score(fused, group, group.targets()[[family]])
        assert float(found[family]) == pytest.approx(float(expected), abs=0.006)


# ---------------------------------------------------------------------------- familiar probes


def test_familiar_is_what_the_family_that_tells_least_apart_nearly_does(digits_zoo):
    shape, layout = (1, 8, 8), digits_zoo.layout
    probes = digits_zoo.objective[0][:64]  # digits, which members do tell apart
    merger = GNNMerger(GNNConfig(probes=64, shapes=(shape,)), {shape: probes})
    groups = [
        SimpleNamespace(layout=layout, weights={k: t[rows] for k, t in digits_zoo.unseen.items()})
        for rows in (slice(0, 5), slice(5, None))
    ]
    told = [told_apart(answers_of(group.weights, layout, probes)) for group in groups]
    assert min(each.min() for each in told) > 0.2
    found = familiarity(merger, groups)
    assert found == pytest.approx(0.85 * float(torch.cat(told).min()))
    assert found < familiarity(merger, [groups[int(told[0].min() < told[1].min())]])


def test_members_that_tell_nothing_apart_say_nothing_of_what_is_familiar(
    digits_zoo, trained_merger
):
    weights = {key: torch.zeros_like(t[:3]) for key, t in digits_zoo.unseen.items()}
    group = SimpleNamespace(layout=digits_zoo.layout, weights=weights)
    assert familiarity(trained_merger, [group]) == 0
