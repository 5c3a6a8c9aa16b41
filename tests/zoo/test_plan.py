"""Shards: every family in one of them, keys that name their content, work by formula."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from metamerge.structure import trace
from zoo import architectures
from zoo.parts import split_task
from zoo.plan import multiply_adds, plan_shards
from zoo.recipe import ZooOptions
from zoo.tasks import load_task

OPTIONS = ZooOptions(members=(2, 3), train_families=7, validation_families=2, test_families=3)


@pytest.fixture(scope="module")
def split():
    return split_task(load_task("digits"), objective=400)


@pytest.fixture(scope="module")
def program():
    return architectures.program_of(architectures.mlp((1, 8, 8), 10), (1, 8, 8))


@pytest.mark.parametrize("shard", [0, 1, 6, 1000])
def test_every_family_is_in_exactly_one_shard(split, program, shard):
    plan = plan_shards(replace(OPTIONS, shard=shard), split, program)
    for part, count in (("train", 7), ("validation", 2), ("test", 3)):
        for members in (2, 3):
            own = [s for s in plan if (s.part, s.members) == (part, members)]
            assert [family for s in own for family in s.families] == list(range(count))
            assert all(s.size <= max(shard, members) for s in own if shard)
    assert len({s.key for s in plan}) == len(plan)


def test_keys_do_not_depend_on_how_many_families_there_are(split, program):
    few = plan_shards(replace(OPTIONS, shard=4), split, program)
    many = plan_shards(
        replace(OPTIONS, shard=4, train_families=20, members=(3, 2, 5)), split, program
    )
    whole = {s.key for s in few if len(s.families) * s.members + s.members > 4}
    assert whole <= {s.key for s in many}


@pytest.mark.parametrize("change", [{"lr": 0.02}, {"seed": 1}, {"epochs": 3}, {"shard": 8}])
def test_keys_depend_on_what_shapes_a_family(split, program, change):
    first = {s.key for s in plan_shards(replace(OPTIONS, shard=4), split, program)}
    other = replace(OPTIONS, **{"shard": 4, **change})
    assert first.isdisjoint(s.key for s in plan_shards(other, split, program))


def test_keys_depend_on_the_network_and_on_the_data(split, program):
    first = {s.key for s in plan_shards(OPTIONS, split, program)}
    wider = architectures.program_of(architectures.mlp((1, 8, 8), 10, widths=(9,)), (1, 8, 8))
    assert first.isdisjoint(s.key for s in plan_shards(OPTIONS, split, wider))
    task = replace(split.task, targets=split.task.targets.flip(0))
    assert first.isdisjoint(s.key for s in plan_shards(OPTIONS, replace(split, task=task), program))


def test_work_is_counted_by_hand():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(),
        nn.Linear(6 * 16, 5),
    )  # fmt: skip
    program = trace(model, torch.zeros(2, 2, 6, 6))
    # 4 maps of 36 places from 2 * 9 inputs, 6 of 16 from 2 * 9 (in two groups), 5 from 96
    assert multiply_adds(program) == 4 * 36 * 18 + 6 * 16 * 18 + 5 * 96
