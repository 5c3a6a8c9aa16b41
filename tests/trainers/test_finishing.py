"""What is left to do once a merger is trained."""

import pytest

from trainers.finishing import FILL, REFINING, chosen


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ((0.90, 0.90, 0.90, 0.90, 0.90, 0.90), (0, 0)),
        ((0.80, 0.85, 0.9, 0.9004, 0.85, 0.85), (50, 0)),  # twice the steps add next to nothing
        ((0.80, 0.90, 0.8, 0.80, 0.85, 0.9008), (25, 0)),  # nor do mixtures
        ((0.80, 0.90, 0.8, 0.80, 0.85, 0.9012), (200, FILL)),
        ((0.80, 0.90, 0.8, 0.80, 0.9016, 0.9020), (100, FILL)),
    ],
)
def test_the_least_refining_is_chosen_that_is_as_good_by_hand(scores, expected):
    assert chosen(dict(zip(REFINING, scores, strict=True))) == expected
