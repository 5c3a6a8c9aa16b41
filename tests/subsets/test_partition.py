"""Two groups of kernels, beside all groups there are."""

from itertools import combinations, product

import pytest
import torch

from metamerge.subsets import cut, two_groups


def drawn(kernels, seed):
    matrix = torch.rand(kernels, kernels, generator=torch.Generator().manual_seed(seed)).double()
    return matrix + matrix.T


def every_side(counts, live):
    chosen = [list(combinations(range(count), k)) for count, k in zip(counts, live, strict=True)]
    for each in product(*chosen):
        side = torch.zeros(sum(counts), dtype=torch.bool)
        first = 0
        for count, own in zip(counts, each, strict=True):
            side[[first + i for i in own]] = True
            first += count
        yield side


def test_a_cut_by_hand():
    affinity = torch.tensor([[9.0, 1, 2], [1, 9, 4], [2, 4, 9]])
    assert cut(affinity, torch.tensor([True, False, False])) == 1 + 2
    both = torch.tensor([[True, False, False], [True, False, True]])
    assert cut(affinity, both).tolist() == [3, 5]


def test_blocks_that_have_nothing_to_do_with_each_other_are_found():
    """Kernels 0, 3 of one layer and 4, 7 of the other are one block, the rest is the other."""
    side = torch.tensor([1, 0, 0, 1, 1, 0, 0, 1]).double()
    affinity = torch.outer(side, side) + torch.outer(1 - side, 1 - side)
    found = two_groups(affinity, [4, 4], generator=torch.Generator())
    assert found.tolist() in (side.bool().tolist(), (~side.bool()).tolist())
    assert cut(affinity, found) == 0


@pytest.mark.parametrize("strong", [False, True])
@pytest.mark.parametrize(("share", "live"), [(0.5, (3, 2)), (0.25, (2, 1))])
def test_no_other_groups_are_better(strong, share, live):
    counts = (6, 4)
    for seed in range(5):
        affinity = drawn(10, seed)
        given = {"share": share, "strong": strong, "generator": torch.Generator()}
        found = two_groups(affinity, counts, **given)
        assert [int(own.sum()) for own in found.split(counts)] == list(live)
        cuts = [float(cut(affinity, side)) for side in every_side(counts, live)]
        best = max(cuts) if strong else min(cuts)
        assert float(cut(affinity, found)) == pytest.approx(best, rel=1e-12)


def test_the_diagonal_has_no_say():
    affinity = drawn(8, 0)
    sides = [
        two_groups(affinity + factor * torch.eye(8), [8], generator=torch.Generator())
        for factor in (0, 100)
    ]
    assert torch.equal(*sides)
