"""Where a training in rounds stands: orders of units, and what a kill must not cost."""

import json
from functools import partial

import pytest
import torch

from metamerge.outer import averaging, elastic_averaging, nesterov
from trainers.standing import Standing, order_of
from zoo.adam import Moments

OUTERS = [averaging, partial(nesterov, lr=0.5), elastic_averaging]


@pytest.fixture
def family(digits_zoo):
    """Four members, in an order of units each has for itself."""
    return {key: tensor[0] for key, tensor in digits_zoo.unseen.items()}


def renumbered(spec, weights, seed):
    """Networks ``[n, ...]`` with their hidden units in random order."""
    generator = torch.Generator().manual_seed(seed)
    count = len(next(iter(weights.values())))
    perm = {
        group: torch.rand(count, *index.shape, generator=generator).argsort(-1)
        for group, index in spec.identity().items()
        if not spec.outer(group)
    }
    return spec.permute(weights, perm)


def one(weights, index=0):
    return {key: tensor[index] for key, tensor in weights.items()}


def same(found, expected):
    return all(torch.equal(found[key], expected[key]) for key in expected)


def test_units_are_found_again(family, digits_zoo):
    spec, centre = digits_zoo.layout.spec, one(family)
    copies = {key: t.expand(3, *t.shape) for key, t in centre.items()}
    shuffled = renumbered(spec, copies, seed=0)
    assert not same(one(shuffled), centre)
    assert same(spec.permute(shuffled, order_of(centre, shuffled, spec)), copies)


@pytest.mark.parametrize("outer", OUTERS, ids=["averaging", "nesterov", "elastic"])
def test_renumbering_in_a_merge_changes_nothing(family, digits_zoo, outer):
    """Members hardly differ from the centre, so their units are found without doubt."""
    spec, generator = digits_zoo.layout.spec, torch.Generator().manual_seed(1)
    centre = {key: t[:1].expand(4, *t.shape[1:]) for key, t in family.items()}
    trained = {k: t + 1e-3 * torch.randn(t.shape, generator=generator) for k, t in centre.items()}
    merged = {key: tensor.mean(0) for key, tensor in trained.items()}
    moments = Moments(trained, trained, torch.arange(4))
    known, found = (Standing(centre, shared=True) for _ in range(2))
    known.go_on(trained, merged, moments, outer, None)
    other = one(renumbered(spec, {k: t[None] for k, t in merged.items()}, seed=2))
    shuffled = renumbered(spec, trained, seed=3)
    found.go_on(shuffled, other, Moments(shuffled, shuffled, torch.arange(4)), outer, spec)
    assert same(found.position.centre, known.position.centre)
    assert same(found.position.members, known.position.members)
    assert same(found.moments.first, known.moments.first)


def test_own_inits_have_no_centre_before_they_are_merged(family):
    merged = {key: tensor.mean(0) for key, tensor in family.items()}
    standing = Standing(family, shared=False)
    assert standing.position is None
    assert same(standing.start, family)
    standing.go_on(family, merged, None, nesterov, None)
    assert same(standing.position.centre, merged)  # a first centre has no gradient
    assert same(one(standing.start, 3), merged)


@pytest.mark.parametrize("outer", OUTERS, ids=["averaging", "nesterov", "elastic"])
@pytest.mark.parametrize("kept", [True, False], ids=["moments kept", "moments reset"])
def test_a_snapshot_holds_everything(family, outer, kept):
    standing = Standing(family, shared=False)
    moments = Moments(family, family, torch.arange(4)) if kept else None
    standing.go_on(family, one(family), moments, outer, None)
    standing.note({"validation": 0.5, "test": 0.25}, threshold=0.4)
    standing.seconds = 3.5
    tensors, record = standing.snapshot("mark")
    again = Standing(family, shared=False)
    again.restore((dict(sorted(tensors.items())), json.loads(json.dumps(record))))
    assert list(again.position.centre) == list(family)  # sums go on in the same order
    assert same(again.position.centre, standing.position.centre)
    assert same(again.start, standing.start)
    assert (again.position.momentum is None) == (standing.position.momentum is None)
    assert same(again.position.momentum or {}, standing.position.momentum or {})
    assert (again.moments is None) == (not kept)
    if kept:
        assert same(again.moments.second, family)
        assert again.moments.steps.tolist() == [0, 1, 2, 3]
    assert (again.rounds, again.stopped, again.seconds) == (1, True, 3.5)
    assert again.curve == {"validation": [0.5], "test": [0.25]}


@pytest.mark.parametrize(
    ("threshold", "stopped"), [(0.0, False), (0.5, True), (0.6, False)], ids=str
)
def test_a_threshold_is_compared_with_validation_images(family, threshold, stopped):
    standing = Standing(family, shared=True)
    standing.note({"validation": 0.5, "test": 0.9}, threshold)
    assert standing.stopped is stopped
