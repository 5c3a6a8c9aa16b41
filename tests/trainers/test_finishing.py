"""What is left to do once a merger is trained."""

import pytest
import torch

from trainers.finishing import FILL, REFINING, chosen


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ((0.90, 0.90, 0.90, 0.90, 0.90, 0.90, 0.90), (0, 0)),
        ((0.80, 0.85, 0.9, 0.9004, 0.9, 0.85, 0.85), (50, 0)),  # more steps add next to nothing
        ((0.80, 0.90, 0.8, 0.80, 0.8, 0.85, 0.911), (25, 0)),  # by 0.011, and the error is 0.0115
        ((0.80, 0.90, 0.8, 0.80, 0.8, 0.85, 0.912), (400, FILL)),
        ((0.80, 0.90, 0.8, 0.80, 0.8, 0.9296, 0.93), (200, FILL)),
    ],
)
def test_the_least_refining_is_chosen_that_is_as_good_by_hand(scores, expected):
    """Of three families: gains of mixtures are two points on each side of their mean."""
    spread = torch.tensor([-0.02, 0.0, 0.02], dtype=torch.float64)
    found = {c: s + spread * bool(c[1]) for c, s in zip(REFINING, scores, strict=True)}
    assert chosen(found) == expected


@pytest.mark.parametrize(("gain", "expected"), [(0.0019, (0, 0)), (0.0021, (200, FILL))])
def test_mixtures_have_to_be_worth_their_time(gain, expected):
    """Every family gains as much, so the error is 0."""
    found = {c: torch.full((3,), 0.5 + gain * bool(c[1])).double() for c in REFINING}
    assert chosen(found) == expected


def test_one_family_alone_is_no_reason_for_mixtures():
    found = {choice: torch.tensor([0.5 + 0.4 * bool(choice[1])]) for choice in REFINING}
    assert chosen(found) == (0, 0)
