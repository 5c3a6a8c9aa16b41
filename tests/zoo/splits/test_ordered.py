from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metamerge.errors import ConfigError
from zoo.splits import bins, difficulty

TARGETS = torch.arange(3000) * 7 % 10
ROWS = torch.arange(500, 2500)
SCORES = torch.rand(3000, generator=torch.Generator().manual_seed(0))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_five_rows_are_cut_from_easy_to_hard_by_hand():
    scores = torch.tensor([0.5, 9.0, 0.1, 0.3, 0.2, 0.4])
    segments = difficulty(
        torch.zeros(6).long(), torch.tensor([0, 2, 3, 4, 5]), 2, scores=scores, generator=seeded()
    )
    assert [set(segment.tolist()) for segment in segments] == [{2, 4, 3}, {5, 0}]


@given(members=st.integers(1, 9), size=st.none() | st.integers(1, 200))
def test_no_member_has_a_row_easier_than_those_before_it(members, size):
    segments = difficulty(TARGETS, ROWS, members, scores=SCORES, size=size, generator=seeded())
    for easier, harder in pairwise(segments):
        assert SCORES[easier].max() <= SCORES[harder].min()
    counts = [len(segment) for segment in segments]
    assert max(counts) - min(counts) <= 1


def test_a_size_is_drawn_from_the_whole_quantile():
    scores = torch.arange(3000).float()
    first, second = difficulty(TARGETS, ROWS, 2, scores=scores, size=500, generator=seeded())
    for segment, middle in ((first, 999.5), (second, 1999.5)):
        assert abs(segment.double().mean() - middle) < 5 * 1000 / 12**0.5 / 500**0.5


def test_rows_that_are_equally_hard_are_dealt_at_random():
    one, other = difficulty(TARGETS, ROWS, 2, scores=torch.ones(3000), generator=seeded())
    for segment in (one, other):
        assert abs(segment.double().mean() - 1499.5) < 5 * 2000 / 12**0.5 / 1000**0.5


def test_one_output_is_cut_from_low_to_high():
    targets = torch.tensor([[5.0], [-1.0], [3.0], [0.0]])
    segments = bins(targets, torch.arange(4), 2, generator=seeded())
    assert [set(segment.tolist()) for segment in segments] == [{1, 3}, {0, 2}]


def test_several_outputs_are_cut_along_their_largest_direction():
    along, across = torch.arange(100).float(), torch.arange(100).float().sin()
    targets = torch.stack([along + across, 2 * along - across], 1)
    segments = bins(targets, torch.arange(100), 4, generator=seeded())
    assert [segment.sort().values.tolist() for segment in segments] == [
        list(range(first, first + 25)) for first in (0, 25, 50, 75)
    ]


def test_bins_of_classes_are_refused():
    with pytest.raises(ConfigError, match=r"bins: .* Use the split 'classes' or 'dirichlet'"):
        bins(TARGETS, ROWS, 2, generator=seeded())
