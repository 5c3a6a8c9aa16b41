"""Families before their training: what they are made of, and that nothing else has a say."""

import math
from dataclasses import replace

import pytest
import torch

from metamerge.errors import ConfigError, ZooError
from zoo.families import draw_families
from zoo.recipe import ZooOptions
from zoo.splits import SHARING, SPLITS

OPTIONS = ZooOptions(split="disjoint", segment_size=20)
VARIED = {
    "alpha": (0.1, 10.0),
    "epochs": (1.0, 9.0),
    "lr": (1e-3, 1e-1),
    "weight_decay": (0.0, 0.1),
    "augment": ("noise=0.1",),
    "augment_share": 0.5,
    "relabel": True,
    "classes_per_family": 7,
    "permute_pixels": True,
    "flip_families": True,
    "pool": 0.8,
    "patience": 2,
}


def drawn(task, families=range(3), *, part="train", members=4, given=None, **changes):
    options = replace(OPTIONS, **changes)
    return draw_families(options, task, (part, members), families, given or {})


def told(found, members=4):
    """Everything about each family, as numbers that can be compared."""
    families = []
    for family in range(len(found.segments) // members):
        own = slice(family * members, (family + 1) * members)
        families.append(
            {
                "segments": [rows.tolist() for rows in found.segments[own]],
                "held_back": found.held_back and [r.tolist() for r in found.held_back[own]],
                "init_seeds": found.init_seeds[own],
                "order_seeds": found.order_seeds[own],
                "augmented": found.augmented[own].tolist(),
                **{name: values[own].tolist() for name, values in found.hyper.items()},
                **{
                    name: None if maps is None else maps[family].tolist()
                    for name, maps in vars(found.variants).items()
                },
            }
        )
    return families


# ---------------------------------------------------------------------------- what has a say


@pytest.mark.parametrize("split", ["disjoint", "dirichlet", "quantity", "everything"])
def test_a_family_does_not_depend_on_the_shard_that_it_is_drawn_in(digits, split):
    options = {**VARIED, "split": split}
    whole = told(drawn(digits, range(6), **options))
    for shard in ([4], [5, 2], range(1, 4)):
        assert told(drawn(digits, shard, **options)) == [whole[family] for family in shard]


@pytest.mark.parametrize("change", [{"seed": 1}, {"part": "test"}, {"members": 5}, {}], ids=str)
def test_families_differ_by_seed_part_members_and_number(digits, change):
    one = told(drawn(digits, [3], **VARIED))[0]
    place = {"part": "train", "members": 4} | change
    families = [3] if change else [2]
    other = told(drawn(digits, families, **VARIED, **place), place["members"])[0]
    fixed = {"augmented", "places"}  # few values, so two families may well share them
    same = [name for name in one.keys() - fixed if one[name] == other[name]]
    assert same == []


def test_drawing_leaves_the_global_generator_and_the_task_alone(digits):
    before, rows = torch.get_rng_state(), digits.segments.clone()
    drawn(digits, **VARIED)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(digits.segments, rows)


def test_seeds_are_different_everywhere(digits):
    found = drawn(digits, range(50))
    seeds = found.init_seeds + found.order_seeds
    assert len(set(seeds)) == len(seeds) == 400
    assert 0 <= min(seeds) <= max(seeds) < 2**61


def test_a_shared_init_is_one_seed_per_family(digits):
    own = drawn(digits, range(5))
    shared = drawn(digits, range(5), init="shared")
    assert shared.order_seeds == own.order_seeds
    assert shared.init_seeds == [own.init_seeds[4 * (i // 4)] for i in range(20)]
    assert len(set(shared.init_seeds)) == 5


# ---------------------------------------------------------------------------- hyper-parameters


@pytest.mark.parametrize("name", ["epochs", "lr", "weight_decay"])
def test_ranges_above_zero_are_drawn_evenly_on_a_log_scale(digits, name):
    values = drawn(digits, range(300), **{name: (1e-3, 10.0)}).hyper[name]
    assert values.dtype == torch.float64
    assert 1e-3 <= values.min() < values.max() <= 10.0
    logs = values.log10()  # between -3 and 1
    for share in (0.1, 0.25, 0.5, 0.75, 0.9):
        below = float((logs < -3 + 4 * share).double().mean())
        assert abs(below - share) < 5 * math.sqrt(share * (1 - share) / 1200)  # five deviations
    assert len(values.unique()) == 1200  # every member has its own


def test_a_range_from_zero_is_drawn_evenly(digits):
    values = drawn(digits, range(300), weight_decay=(0.0, 0.5)).hyper["weight_decay"]
    assert 0 <= values.min() < values.max() <= 0.5
    for share in (0.25, 0.5, 0.75):
        below = float((values < 0.5 * share).double().mean())
        assert abs(below - share) < 5 * math.sqrt(share * (1 - share) / 1200)


@pytest.mark.parametrize("value", [0.02, (0.02,), (0.02, 0.02)], ids=str)
def test_a_single_number_is_that_of_every_member(digits, value):
    found = drawn(digits, lr=value, weight_decay=0.0)
    assert found.hyper["lr"].tolist() == [0.02] * 12
    assert found.hyper["weight_decay"].tolist() == [0.0] * 12


def test_hyper_parameters_are_not_tied_to_each_other(digits):
    hyper = drawn(digits, range(200), lr=(1e-3, 1e-1), epochs=(1.0, 9.0)).hyper
    pair = torch.stack([hyper["lr"].log(), hyper["epochs"].log()])
    assert abs(float(torch.corrcoef(pair)[0, 1])) < 5 / math.sqrt(800)


def test_alphas_are_drawn_for_each_family_between_their_ends(digits, monkeypatch):
    asked = []
    original = SPLITS["dirichlet"]

    def spy(targets, rows, members, *, alpha, size, overlap, generator):
        asked.append(alpha)
        return original(
            targets, rows, members, alpha=alpha, size=size, overlap=overlap, generator=generator
        )

    monkeypatch.setitem(SPLITS, "dirichlet", spy)
    drawn(digits, range(200), split="dirichlet", alpha=(0.01, 100.0))
    assert len(set(asked)) == 200
    logs = torch.tensor(asked, dtype=torch.float64).log10()
    assert -2 <= logs.min() < logs.max() <= 2
    assert abs(float((logs < 0).double().mean()) - 0.5) < 5 * 0.5 / math.sqrt(200)


def test_members_are_augmented_by_their_share(digits):
    augment = ("flip",)
    share = drawn(digits, range(300), augment=augment, augment_share=0.3).augmented
    assert abs(float(share.double().mean()) - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 1200)
    assert drawn(digits, augment=augment).augmented.all()
    assert not drawn(digits, augment=augment, augment_share=0.0).augmented.any()
    assert not drawn(digits).augmented.any()  # nothing was asked for


# ---------------------------------------------------------------------------- rows


def test_a_pool_is_drawn_anew_for_every_family(digits):
    found = drawn(digits, range(8), segment_size=0, pool=0.25)
    everything = set(digits.segments.tolist())
    pools = [
        sorted(row for segment in found.segments[4 * i : 4 * i + 4] for row in segment.tolist())
        for i in range(8)
    ]
    for pool in pools:
        assert len(pool) == len(set(pool)) == round(0.25 * len(everything))
        assert set(pool) <= everything
    assert len(set(map(tuple, pools))) == 8
    assert len({row for pool in pools for row in pool}) > 0.8 * len(everything)  # 1 - 0.75**8 = 0.9


def test_a_tiny_pool_has_a_row(digits):
    found = drawn(digits, [0], segment_size=0, pool=1e-9, members=1)
    assert [len(segment) for segment in found.segments] == [1]


@pytest.mark.parametrize(("share", "count"), [(0.1, 2), (0.5, 10), (0.01, 1), (0.12, 2)])
def test_rows_held_back_are_a_share_of_every_segment(digits, share, count):
    whole = drawn(digits)
    found = drawn(digits, patience=1, hold_back=share)
    assert whole.held_back is None
    for segment, learned, kept in zip(whole.segments, found.segments, found.held_back, strict=True):
        assert len(kept) == count
        assert torch.equal(torch.cat([kept, learned]), segment)


def test_unequal_segments_hold_back_unequal_numbers(digits):
    found = drawn(digits, split="quantity", patience=1, hold_back=0.2)
    pairs = list(zip(found.segments, found.held_back, strict=True))
    sizes = [len(learned) + len(kept) for learned, kept in pairs]
    assert [len(kept) for kept in found.held_back] == [max(1, round(0.2 * s)) for s in sizes]
    assert len(set(sizes)) > 6


def test_segments_of_one_row_cannot_hold_any_back(digits):
    assert len(drawn(digits, segment_size=1).segments) == 12
    with pytest.raises(ZooError, match=r"A segment has 1 row, and --patience holds rows back"):
        drawn(digits, segment_size=1, patience=1)


@pytest.mark.parametrize(("size", "share"), [(2, 0.8), (4, 0.9)])
def test_a_row_is_left_to_learn_from(digits, size, share):
    found = drawn(digits, segment_size=size, patience=1, hold_back=share)
    assert min(map(len, found.segments)) == 1


# ---------------------------------------------------------------------------- variants


def test_segments_hold_only_classes_that_their_family_knows(digits):
    found = drawn(digits, range(6), classes_per_family=3)
    known = []
    for family in range(6):
        classes = found.variants.classes[family]
        assert sorted(classes.tolist()) == [-1] * 7 + [0, 1, 2]
        for segment in found.segments[4 * family : 4 * family + 4]:
            assert (classes[digits.task.targets[segment]] >= 0).all()
        known.append(tuple((classes >= 0).nonzero().flatten().tolist()))
        assert classes[classes >= 0].tolist() == [0, 1, 2]  # in their order
    assert len(set(known)) > 1


def test_families_have_maps_of_their_own_where_they_are_asked_for(digits):
    plain = drawn(digits).variants
    assert plain.classes is None
    assert plain.places is None
    renamed = drawn(digits, range(5), relabel=True).variants
    assert renamed.places is None
    assert renamed.classes.sort(1).values.tolist() == [list(range(10))] * 5
    assert len(renamed.classes.unique(dim=0)) == 5
    permuted = drawn(digits, range(5), permute_pixels=True).variants
    assert permuted.classes is None
    assert permuted.places.sort(1).values.tolist() == [list(range(64))] * 5
    assert len(permuted.places.unique(dim=0)) == 5
    mirrored = drawn(digits, range(40), flip_families=True).variants.places
    straight = torch.arange(64)
    both = torch.stack([straight, straight.reshape(8, 8).flip(1).flatten()])
    assert torch.equal(mirrored.unique(dim=0), both.unique(dim=0))


def test_places_of_a_table_are_its_features(diabetes):
    found = drawn(diabetes, permute_pixels=True).variants.places
    assert found.sort(1).values.tolist() == [list(range(10))] * 3


# ---------------------------------------------------------------------------- splits

CLASSES_ONLY = {"dirichlet", "classes"}


def given_for(name, task):
    """What a split asks for beside rows: numbers that follow the inputs."""
    values = task.task.inputs.flatten(1)
    asked = {"clusters": {"features": values}, "difficulty": {"scores": values.sum(1)}}
    return asked.get(name)


@pytest.mark.parametrize("name", SPLITS)
def test_every_split_but_that_of_numbers_cuts_a_classification(digits, name):
    given = given_for(name, digits)
    if name == "bins":
        with pytest.raises(ConfigError, match="targets are classes"):
            drawn(digits, split=name, pool=0.9)
        return
    check_segments(drawn(digits, members=2, split=name, given=given), digits, name)


@pytest.mark.parametrize("name", SPLITS)
def test_every_split_but_those_by_class_cuts_a_regression(diabetes, name):
    given = given_for(name, diabetes)
    if name in CLASSES_ONLY:
        with pytest.raises(ConfigError, match="needs classes"):
            drawn(diabetes, split=name)
        return
    check_segments(drawn(diabetes, members=2, split=name, given=given), diabetes, name)


def check_segments(found, task, name):
    assert len(found.segments) == 6
    assert len({tuple(segment.tolist()) for segment in found.segments}) == 6
    for family in range(3):
        own = found.segments[2 * family : 2 * family + 2]
        assert torch.isin(torch.cat(own), task.segments).all()
        if name == "quantity":  # deals out everything there is
            assert torch.equal(torch.cat(own).sort().values, task.segments)
        elif name == "everything":
            assert all(torch.equal(rows.sort().values, task.segments) for rows in own)
        else:
            assert [len(rows) for rows in own] == [20, 20]
        if name not in SHARING:
            assert len(torch.cat(own).unique()) == sum(map(len, own))


def test_segments_that_break_the_rules_of_their_split_are_refused(digits, monkeypatch):
    def greedy(targets, rows, members, *, generator):
        return [rows[:5]] * members

    monkeypatch.setitem(SPLITS, "disjoint", greedy)
    with pytest.raises(ZooError, match="also in other segments"):
        drawn(digits)

    def strange(targets, rows, members, *, generator):
        return [digits.test[:5]] * members

    monkeypatch.setitem(SPLITS, "everything", strange)
    with pytest.raises(ZooError, match="rows"):
        drawn(digits, split="everything")
