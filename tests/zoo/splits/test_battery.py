"""What every registered split must do. A new split is tested before its author writes a test."""

import inspect

import numpy as np
import pytest
import torch

from metamerge.errors import ConfigError, ZooError
from zoo.splits import SHARING, SPLITS, validate

TASK_ROWS, CLASSES = 3000, 10
ROWS = torch.arange(500, 2500)  # 200 of each class
CLASS_TARGETS = torch.arange(TASK_ROWS) * 7 % CLASSES
REGRESSION_TARGETS = torch.randn(TASK_ROWS, 3, generator=torch.Generator().manual_seed(1))
RESOURCES = {
    "features": torch.randn(TASK_ROWS, 6, generator=torch.Generator().manual_seed(2)),
    "scores": torch.rand(TASK_ROWS, generator=torch.Generator().manual_seed(3)),
}

# Every split in every way it can be asked: what it cuts, its name and its options.
OPTIONS = [
    ("disjoint", {}),
    ("disjoint", {"size": 100}),
    ("overlapping", {"share": 0.25}),
    ("overlapping", {"share": 0.5, "size": 100}),
    ("everything", {}),
    ("dirichlet", {"alpha": 0.5}),
    ("dirichlet", {"alpha": 0.5, "size": 100}),
    ("dirichlet", {"alpha": 0.5, "size": 100, "overlap": True}),
    ("classes", {"classes_per_segment": 5}),
    ("classes", {"classes_per_segment": 5, "size": 100}),
    ("quantity", {"alpha": 0.5}),
    ("clusters", {}),
    ("clusters", {"size": 100}),
    ("difficulty", {}),
    ("difficulty", {"size": 100}),
    ("bins", {}),
    ("bins", {"size": 100}),
]
NEED_CLASSES, NEED_REGRESSION = {"dirichlet", "classes"}, {"bins"}
WAYS = [
    pytest.param(name, options, targets, id=f"{name}-{kind}-{options}")
    for kind, targets, without in (
        ("classes", CLASS_TARGETS, NEED_REGRESSION),
        ("regression", REGRESSION_TARGETS, NEED_CLASSES),
    )
    for name, options in OPTIONS
    if name not in without
]

every_way = pytest.mark.parametrize(("name", "options", "targets"), WAYS)
pytestmark = pytest.mark.filterwarnings("error")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def cut(name, options, targets, members, *, rows=ROWS, generator=None, **resources):
    asked = inspect.signature(SPLITS[name]).parameters
    given = {key: value for key, value in (RESOURCES | resources).items() if key in asked}
    return SPLITS[name](targets, rows, members, **given, **options, generator=generator or seeded())


def asking(parameter):
    return [name for name in SPLITS if parameter in inspect.signature(SPLITS[name]).parameters]


def targets_for(name):
    return REGRESSION_TARGETS if name in NEED_REGRESSION else CLASS_TARGETS


def shares_rows(name, options):
    return name in SHARING and (name != "dirichlet" or options.get("overlap", False))


def test_every_split_is_registered_under_its_name_and_tested():
    assert [split.__name__ for split in SPLITS.values()] == list(SPLITS)
    assert set(SPLITS) == {name for name, _ in OPTIONS}
    assert set(SPLITS) > SHARING


@pytest.mark.parametrize("name", SPLITS)
def test_a_split_asks_only_for_known_things_and_by_keyword(name):
    first, *others = np.split(list(inspect.signature(SPLITS[name]).parameters.values()), [3])
    assert [p.name for p in first] == ["targets", "rows", "members"]
    assert all(p.kind is p.KEYWORD_ONLY for p in others[0])
    without_default = {p.name for p in others[0] if p.default is p.empty}
    assert without_default <= {"features", "scores", "alpha", "generator"}
    assert "generator" in without_default


@every_way
@pytest.mark.parametrize("members", [2, 4, 7])
def test_segments_are_an_honest_cut(name, options, targets, members):
    segments = cut(name, options, targets, members)
    assert len(segments) == members
    validate(segments, ROWS, disjoint=not shares_rows(name, options))
    if "size" in options:
        assert [len(segment) for segment in segments] == [100] * members
    else:
        assert torch.cat(segments).unique().equal(ROWS)


@every_way
def test_one_member_gets_rows_as_well(name, options, targets):
    (segment,) = cut(name, options, targets, 1)
    validate([segment], ROWS)


@every_way
def test_the_same_seed_gives_the_same_segments_and_another_seed_others(name, options, targets):
    one, same, other = (cut(name, options, targets, 4, generator=seeded(s)) for s in (1, 1, 2))
    assert all(map(torch.equal, one, same))
    assert not any(map(torch.equal, one, other))


@every_way
def test_a_generator_moves_on_from_family_to_family(name, options, targets):
    generator = seeded()
    one, other = (cut(name, options, targets, 4, generator=generator) for _ in range(2))
    assert not any(map(torch.equal, one, other))


@every_way
def test_splits_change_neither_their_inputs_nor_a_global_generator(name, options, targets):
    inputs = {key: value.clone() for key, value in RESOURCES.items()}
    copy, rows, state, numpy_state = (
        targets.clone(),
        ROWS.clone(),
        torch.get_rng_state(),
        np.random.get_state()[1].copy(),
    )
    for segment in cut(name, options, copy, 4, rows=rows, **inputs):
        segment.fill_(-1)
    assert torch.equal(copy, targets)
    assert torch.equal(rows, ROWS)
    assert all(map(torch.equal, inputs.values(), RESOURCES.values()))
    assert torch.equal(state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()


@every_way
def test_what_other_rows_hold_changes_nothing(name, options, targets):
    other = torch.ones(TASK_ROWS, dtype=torch.bool)
    other[ROWS] = False
    changed = {key: value.clone() for key, value in RESOURCES.items()}
    for tensor in changed.values():
        tensor[other] = torch.nan
    elsewhere = targets.clone()
    elsewhere[other] = torch.nan if targets.is_floating_point() else 99
    assert all(
        map(
            torch.equal,
            cut(name, options, targets, 4),
            cut(name, options, elsewhere, 4, **changed),
        )
    )


@every_way
def test_the_first_rows_of_a_segment_are_a_fair_sample_of_it(name, options, targets):
    values = targets.float().reshape(TASK_ROWS, -1)[:, 0]
    for segment in cut(name, options, targets, 2):
        # In random order ranks and places do not correlate: the standard error is 1 / sqrt(n).
        for ranked in (segment, values[segment], RESOURCES["scores"][segment]):
            table = torch.stack([torch.arange(len(segment)), ranked]).float()
            assert abs(torch.corrcoef(table)[0, 1]) < 5 / len(segment) ** 0.5


@every_way
def test_every_segment_is_spread_over_all_rows(name, options, targets):
    for segment in cut(name, options, targets, 4):
        values = segment.double()
        assert (values.mean() - ROWS.double().mean()).abs() < 5 * values.std() / len(segment) ** 0.5


@every_way
def test_segments_share_no_memory(name, options, targets):
    segments = cut(name, options, targets, 4)
    assert len({segment.untyped_storage().data_ptr() for segment in segments}) == 4
    assert all(len(s) * 8 == s.untyped_storage().nbytes() for s in segments)


@every_way
@pytest.mark.parametrize(
    ("rows", "members", "error", "message"),
    [
        (ROWS, 0, ConfigError, "members must be a whole number above 0, got 0"),
        (ROWS, 2.0, ConfigError, "members must be a whole number"),
        (ROWS, True, ConfigError, "members must be a whole number"),
        (ROWS[:0], 2, ZooError, "do not fit into 0 rows"),
        (ROWS.float(), 2, ZooError, "rows must be an int64 vector"),
        (ROWS + 501, 2, ZooError, "rows 1001 to 3000 .* the task has rows 0 to 2999"),
        (ROWS - 501, 2, ZooError, "rows -1 to 1998"),
        (ROWS.repeat(2), 2, ZooError, "2000 rows are named more than once"),
    ],
)
def test_rows_or_members_that_make_no_sense_are_refused(
    name, options, targets, rows, members, error, message
):
    with pytest.raises(error, match=f"^{name}: .*{message}"):
        cut(name, options, targets, members, rows=rows)


@every_way
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.double(), "targets must be an int64 vector .*, got torch.float64"),
        (lambda t: t.reshape(TASK_ROWS, -1)[:, 0].float(), "targets must be an int64 vector"),
        (lambda t: t.int()[:, None], "targets must be an int64 vector .*, got torch.int32"),
        (lambda t: t.long().reshape(-1)[: len(t)] - 99, "targets must be 0 or above, got -"),
    ],
)
def test_targets_that_make_no_sense_are_refused(name, options, targets, change, message):
    if name == "bins" and "0 or above" in message:
        message = "the targets are classes"
    with pytest.raises((ZooError, ConfigError), match=f"^{name}: .*{message}"):
        cut(name, options, change(targets), 2)


@pytest.mark.parametrize("name", sorted(NEED_CLASSES))
def test_a_split_that_needs_classes_refuses_a_regression_and_says_what_to_use(name):
    options = dict(OPTIONS)[name]
    with pytest.raises(ConfigError, match=f"^{name}: needs classes.*'bins' or 'clusters'"):
        cut(name, options, REGRESSION_TARGETS, 2)


@pytest.mark.parametrize("name", asking("size"))
@pytest.mark.parametrize("size", [0, -1, 1.5, True])
def test_a_size_that_is_no_positive_whole_number_is_refused(name, size):
    with pytest.raises(ConfigError, match=f"^{name}: size must be a whole number above 0"):
        cut(name, dict(OPTIONS)[name] | {"size": size}, targets_for(name), 2)


@pytest.mark.parametrize("name", ["disjoint", "dirichlet", "difficulty", "bins"])
def test_a_size_that_does_not_fit_is_refused_with_the_largest_that_does(name):
    options = {"alpha": 1.0} if name == "dirichlet" else {}
    with pytest.raises(ZooError, match="The largest size is 285, or fewer members"):
        cut(name, options | {"size": 286}, targets_for(name), 7)
    segments = cut(name, options | {"size": 285}, targets_for(name), 7)
    assert [len(segment) for segment in segments] == [285] * 7


@pytest.mark.parametrize(("name", "resource"), [(n, r) for r in RESOURCES for n in asking(r)])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.double(), r"must be float32 \[3000.*got torch.float64"),
        (lambda t: t[:-1], r"must be float32 \[3000.*got torch.float32 \(2999"),
        (lambda t: t.unsqueeze(-1), r"must be float32 \[3000"),
        (lambda t: t.index_fill(0, ROWS[7:9], torch.inf), "must be finite, but 2 .* row 507"),
    ],
)
def test_resources_that_make_no_sense_are_refused(name, resource, change, message):
    with pytest.raises(ZooError, match=f"^{name}: {resource} {message}"):
        cut(name, {}, targets_for(name), 2, **{resource: change(RESOURCES[resource])})
