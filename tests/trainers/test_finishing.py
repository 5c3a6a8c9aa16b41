"""What is left to do once a merger is trained."""

from types import SimpleNamespace

import pytest
import torch

from evaluation.gates import Gate
from metamerge.mergers import GNNConfig, GNNMerger
from metamerge.mergers.gate import answers_of
from metamerge.mergers.watching import told_apart
from trainers import finishing
from trainers.finishing import FILL, REFINING, chosen, familiarity, settle


@pytest.mark.parametrize(
    ("plain", "mixed", "expected"),
    [
        ((0.90, 0.90, 0.90), (0.90, 0.90, 0.90, 0.90), (0, 0)),
        # more steps add next to nothing
        ((0.80, 0.90, 0.9004), (0.80, 0.85, 0.85, 0.85), (100, 0)),
        # by 0.011, and the error is 0.0115
        ((0.80, 0.90, 0.80), (0.85, 0.85, 0.85, 0.911), (100, 0)),
        ((0.80, 0.90, 0.80), (0.85, 0.85, 0.85, 0.912), (400, FILL)),
        ((0.80, 0.90, 0.80), (0.85, 0.85, 0.9296, 0.93), (200, FILL)),
    ],
)
def test_the_least_refining_is_chosen_that_is_as_good_by_hand(plain, mixed, expected):
    """Of three families: gains of mixtures are two points on each side of their mean."""
    spread = torch.tensor([-0.02, 0.0, 0.02], dtype=torch.float64)
    found = {c: s + spread * bool(c[1]) for c, s in zip(REFINING, plain + mixed, strict=True)}
    assert chosen(found) == expected


@pytest.mark.parametrize(("gain", "expected"), [(0.0009, (0, 0)), (0.0011, (0, FILL))])
def test_mixtures_have_to_be_worth_their_time(gain, expected):
    """Every family gains as much, so the error is 0."""
    found = {c: torch.full((3,), 0.5 + gain * bool(c[1])).double() for c in REFINING}
    assert chosen(found) == expected


def test_one_family_alone_is_no_reason_for_mixtures():
    found = {choice: torch.tensor([0.5 + 0.4 * bool(choice[1])]) for choice in REFINING}
    assert chosen(found) == (0, 0)


@pytest.mark.parametrize(
    ("harmful", "expected"),
    [
        ((), (200, FILL)),
        (((200, FILL),), (100, 0)),
        (((100, 0), (200, FILL)), (0, 0)),
        (((0, 0), (100, 0), (200, FILL)), (0, 0)),
    ],
)
def test_refining_that_breaks_a_gate_is_not_chosen(monkeypatch, harmful, expected):
    def gates_of(merger, group):
        way = (merger.config.refine, merger.config.mixtures)
        return [Gate("poisoned_member", 0.03 if way in harmful else 0.01, 0.02)]

    monkeypatch.setattr(finishing, "gates_of", gates_of)
    best = {(100, 0): 0.9, (200, FILL): 0.95}
    refined = {choice: torch.full((3,), best.get(choice, 0.8)).double() for choice in REFINING}
    merger = SimpleNamespace(config=GNNConfig())
    found, gates = settle(merger, refined, [SimpleNamespace(name="k3")])
    assert found == (merger.config.refine, merger.config.mixtures) == expected
    assert gates["k3"][0].passed == (expected not in harmful)


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
