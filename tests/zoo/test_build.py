"""Building a zoo: what is in it, when members are trained and when not, and who trains them."""

import json
import os
import shutil
import sys
import threading
import time
from collections import Counter
from dataclasses import fields, replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from evaluation.metrics import accuracy, family_logits
from metamerge import merge
from metamerge.errors import ConfigError, ZooError
from metamerge.structure import Program
from zoo.build import build, main, split_of
from zoo.parts import split_task
from zoo.recipe import ZooOptions, options_from
from zoo.shards import train_shard
from zoo.store import FAMILY_PARTS, SEGMENT
from zoo.tasks import load_task

SMALL = ZooOptions(
    widths=(8,),
    segment_size=60,
    members=(2, 3),
    train_families=3,
    validation_families=2,
    test_families=2,
    epochs=20.0,
    shard=6,  # three families of two, two families of three
)
NETWORKS = (2 + 3) * (3 + 2 + 2)
PLACES = {  # part, members, first and last family of every shard of the small zoo
    *(("train", 2, 0, 3), ("validation", 2, 0, 2), ("test", 2, 0, 2)),
    *(("train", 3, 0, 2), ("train", 3, 2, 3), ("validation", 3, 0, 2), ("test", 3, 0, 2)),
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return build(small(tmp_path_factory.mktemp("small")))


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def trained(monkeypatch):
    """Places of the shards that are trained from now on."""
    places = []

    def spy(options, split, program, place, families, *others):
        places.append((*place, families[0], families[-1] + 1))
        return train_shard(options, split, program, place, families, *others)

    monkeypatch.setattr("zoo.build.train_shard", spy)
    return places


def small(folder, **changes):
    return replace(SMALL, out=str(folder / "zoo"), **changes)


def content(folder):
    """Bytes of every file; of the manifest all but where the zoo lies."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    manifest = json.loads(files.pop("manifest.json"))
    del manifest["options"]["out"]
    return files | {"manifest.json": manifest}


def state(folder):
    """Bytes, times and identity of everything in a folder."""
    stats = {path.name: path.stat() for path in folder.iterdir()}
    return {
        name: ((folder / name).read_bytes(), told.st_mtime_ns, told.st_ino)
        for name, told in stats.items()
    }


def left_over(folder):
    """What lies in a folder beside zoos and their locks."""
    kept = {"work", *(p.parent.name for p in folder.glob("*/manifest.json"))}
    return {p.name for p in folder.iterdir() if p.suffix != ".lock"} - {*kept}


def groups(zoo):
    """Every set of families: part, members and records."""
    for part in FAMILY_PARTS:
        for members in zoo.sizes:
            yield part, members, zoo.records(part, members)


def flags(options):
    """A command line for options."""
    line = []
    for field in fields(options):
        value = getattr(options, field.name)
        name = field.name.replace("_", "-")
        if isinstance(value, bool):
            line.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None and value != ():
            values = value if isinstance(value, tuple) else (value,)
            line += [f"--{name}", *map(str, values)]
    return line


def never(*_, **__):
    raise AssertionError("a shard was trained")


# ------------------------------------------------------------------------------- what is in it


def test_a_zoo_holds_what_was_asked_for(zoo):
    expected = {"train": 3, "validation": 2, "test": 2}
    assert zoo.groups.keys() == {f"{part}-k{k}" for part in expected for k in (2, 3)}
    for part, members, records in groups(zoo):
        families = zoo.families(part, members)
        for tensor in (*families.values(), *records.values()):
            assert tensor.shape[:2] == (expected[part], members)
        assert families["1.weight"].shape[2:] == (8, 64)
        assert records[SEGMENT].shape[2:] == (SMALL.segment_size,)
        assert records["losses"].shape[2:] == (20,)
    assert zoo.manifest["task"]["name"] == "digits"
    assert options_from(zoo.options) == small(zoo.folder.parent)


def test_members_have_learned_and_their_recorded_accuracy_is_true(zoo):
    inputs, targets = split_of(zoo).images("validation")
    scores = []
    for part, members, records in groups(zoo):
        logits = family_logits(zoo.layout.program, zoo.families(part, members), inputs)
        found = accuracy(logits, targets)
        # one image that two programs put on the two sides of a tie
        told, image = records["validation_accuracy"], 1 / len(targets)
        torch.testing.assert_close(told, found, rtol=0, atol=1.01 * image)
        scores.append(found.flatten())
    assert torch.cat(scores).mean() > 0.15  # chance is 0.1


def test_segments_hold_no_image_of_another_part(zoo):
    split = split_of(zoo)
    for *_, records in groups(zoo):
        used = records[SEGMENT].unique()
        assert torch.isin(used, split.rows("segments")).all()
        for other in ("objective", "validation", "test"):
            assert not torch.isin(used, split.rows(other)).any()


def test_test_images_are_refused_while_members_are_trained(tmp_path, monkeypatch):
    split = split_task(load_task("digits"), objective=SMALL.objective)
    asked = []

    def curious(*_, **__):
        asked.append(True)
        split.images("test")

    monkeypatch.setattr("zoo.build.split_task", lambda *_, **__: split)
    monkeypatch.setattr("zoo.shards.train_networks", curious)
    with pytest.raises(ZooError, match="training"):
        build(small(tmp_path))
    assert asked == [True]
    split.images("test")  # and given again afterwards


def test_a_zoo_whose_task_holds_other_data_now_is_refused(zoo, monkeypatch):
    task = load_task("digits")
    altered = replace(task, inputs=1 - task.inputs)
    monkeypatch.setattr("zoo.build.load_task", lambda *_, **__: altered)
    with pytest.raises(ZooError, match=f"other data.*{task.digest[:12]}.*{altered.digest[:12]}"):
        split_of(zoo)


def test_rows_and_records_agree(zoo):
    targets = split_of(zoo).task.targets
    for _, members, records in groups(zoo):
        for family in range(len(records[SEGMENT])):
            for member in range(members):
                own = records[SEGMENT][family, member].long()
                assert records["rows"][family, member] == len(own.unique()) == SMALL.segment_size
                counts = targets[own].bincount(minlength=10)
                assert torch.equal(records["rows_per_class"][family, member], counts)


def test_every_member_has_an_init_and_an_order_of_its_own(zoo):
    for name in ("init_seed", "order_seed"):
        seeds = torch.cat([records[name].flatten() for *_, records in groups(zoo)])
        assert len(seeds.unique()) == len(seeds) == NETWORKS


def test_a_shared_init_is_shared_within_a_family_only(tmp_path):
    zoo = build(small(tmp_path, init="shared", lr=1e-9))  # members stay at their inits
    seen = Counter()
    for part, members, records in groups(zoo):
        weights = zoo.families(part, members)["1.weight"]
        # 40 steps of AdamW, each not longer than the rate
        torch.testing.assert_close(weights, weights[:, :1].expand_as(weights), rtol=0, atol=1e-7)
        for seeds in records["init_seed"]:
            (seed,) = set(seeds.tolist())
            seen[seed] += 1
        first = weights[:, 0].flatten(1)
        assert torch.pdist(first).min() > 0.1
    assert set(seen.values()) == {1}


@pytest.mark.parametrize("init", ["own", "shared"])
def test_parts_share_no_init_seed_and_no_segment(tmp_path, zoo, init):
    built = zoo if init == "own" else build(small(tmp_path, init="shared", epochs=0.1))
    seeds = {part: set() for part in FAMILY_PARTS}
    segments = {part: set() for part in FAMILY_PARTS}
    for part, _, records in groups(built):
        seeds[part] |= set(records["init_seed"].flatten().tolist())
        segments[part] |= {frozenset(own.tolist()) for own in records[SEGMENT].flatten(0, 1)}
    for found in (seeds, segments):
        assert all(found.values())
        assert all(one.isdisjoint(other) for one, other in combinations(found.values(), 2))
    assert sum(map(len, segments.values())) == NETWORKS


def test_disjoint_segments_share_no_image(tmp_path):
    zoo = build(small(tmp_path, split="disjoint", epochs=0.1))
    for *_, records in groups(zoo):
        for family in records[SEGMENT]:
            assert len(family.unique()) == family.numel() == len(family) * SMALL.segment_size


@pytest.mark.parametrize("split", ["disjoint", "dirichlet"])
def test_segments_without_a_size_deal_out_every_image_once(tmp_path, split):
    zoo = build(small(tmp_path, split=split, segment_size=0, alpha=5.0, epochs=0.1))
    segments = split_of(zoo).rows("segments")
    for *_, records in groups(zoo):
        for family in records[SEGMENT].long():
            assert torch.equal(family[family >= 0].sort().values, segments)


def test_a_small_alpha_skews_classes(tmp_path):
    classes = {}
    for alpha in (0.1, 100.0):
        zoo = build(small(tmp_path / str(alpha), alpha=alpha, epochs=0.1))
        counts = [(records["rows_per_class"] > 0).sum(-1).flatten() for *_, records in groups(zoo)]
        classes[alpha] = torch.cat(counts).double().mean()
    assert classes[0.1] < 5 < 9 < classes[100.0]


def test_members_draw_their_hyper_parameters_from_ranges(tmp_path):
    ranges = {"lr": (0.001, 0.1), "weight_decay": (0.01, 0.1), "epochs": (0.2, 2.0)}
    zoo = build(small(tmp_path, **ranges))
    for name, (low, high) in ranges.items():
        drawn = torch.cat([records[name].flatten() for *_, records in groups(zoo)])
        assert len(drawn.unique()) == NETWORKS
        # float64 rounded to float32
        assert low * (1 - 2**-24) <= drawn.min() < drawn.max() <= high * (1 + 2**-24)
    steps = torch.cat([records["steps"].flatten() for *_, records in groups(zoo)])
    assert steps.min() == 1
    assert steps.max() > 1


def test_snapshots_lead_from_the_start_to_the_end(tmp_path):
    zoo = build(small(tmp_path, snapshots=2, epochs=4.0))
    for part, members, _ in groups(zoo):
        weights, way = zoo.families(part, members), zoo.snapshots(part, members)
        assert way.keys() == weights.keys()
        for key, tensor in way.items():
            assert tensor.shape == (*weights[key].shape[:2], 2, *weights[key].shape[2:])
        left = (way["1.weight"] - weights["1.weight"][:, :, None]).flatten(3).norm(dim=-1)
        assert (left[..., 0] > left[..., 1]).all()


def test_a_family_can_be_merged_by_its_address(zoo):
    merged = merge(zoo.address("train", 3, 2), method="average", align=None)  # the second shard
    assert merged.report["verified"] == [True] * 3
    mean = zoo.families("train", 3)["1.weight"][2].double().mean(0).float()
    # three additions of float32 and a division, each rounded to 2**-24 of the largest term
    torch.testing.assert_close(merged.weights["1.weight"], mean, rtol=2**-22, atol=2**-22)


def test_convolutional_networks_are_built(tmp_path):
    zoo = build(small(tmp_path, architecture="cnn", widths=(2, 3), epochs=0.1))
    assert zoo.families("test", 2)["0.weight"].shape == (2, 2, 2, 1, 3, 3)
    assert len(zoo.layout.layers) == 3


@pytest.fixture
def one_thread():
    """Threads that wait for each other on a busy machine would be measured, not the building."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_a_zoo_of_360_networks_is_built_in_seconds(tmp_path):
    """Networks 64-32-10 on 300 digits each, 30 epochs: two or three seconds of one thread."""
    options = ZooOptions(
        out=str(tmp_path / "zoo"),
        members=(6,),
        train_families=40,
        validation_families=10,
        test_families=10,
    )
    clock = time.process_time()  # what other processes take of a core is not ours
    zoo = build(options)
    seconds = time.process_time() - clock
    assert zoo.families("train", 6)["1.weight"].shape == (40, 6, 32, 64)
    rows = torch.cat([records["rows"].flatten() for *_, records in groups(zoo)])
    assert len(rows) == 360
    assert set(rows.tolist()) == {300}
    scores = torch.cat([records["validation_accuracy"].flatten() for *_, records in groups(zoo)])
    assert scores.mean() > 0.5  # skewed: few see all classes
    assert seconds < 20


# ------------------------------------------------------------------------------- the same zoo


def test_the_same_options_give_the_same_bytes(zoo, tmp_path, trained):
    again = build(small(tmp_path))
    assert content(again.folder) == content(zoo.folder)
    assert set(trained) == PLACES
    assert len(trained) == len(PLACES)


def test_another_seed_gives_other_members(zoo, tmp_path):
    other = build(small(tmp_path, seed=2**31 - 1))
    for part, members, records in groups(other):
        known = zoo.records(part, members)
        for name in (SEGMENT, "validation_accuracy", "losses"):
            assert not torch.equal(records[name], known[name])
        for name in ("init_seed", "order_seed"):
            assert not torch.isin(records[name], known[name]).any()
        weights = other.families(part, members)["1.weight"]
        assert not torch.equal(weights, zoo.families(part, members)["1.weight"])


def test_every_shard_can_be_made_alone(zoo):
    """The last first, as no build would."""
    options, split = options_from(zoo.options), split_of(zoo)
    program = Program.from_json(zoo.manifest["program"])
    for part, members, first, last in sorted(PLACES, reverse=True):
        made = train_shard(
            options, split, program, (part, members), range(first, last), {}, "cpu", None
        )
        for kind, stored in (
            ("weights", zoo.families(part, members)),
            ("records", zoo.records(part, members)),
        ):
            assert made[kind].keys() == stored.keys()
            for key, tensor in made[kind].items():
                assert torch.equal(tensor, stored[key][first:last]), (part, members, key)


def test_the_size_of_shards_decides_nothing_about_families(zoo, tmp_path):
    other = build(small(tmp_path, shard=0))
    assert [len(group["shards"]) for group in other.groups.values()] == [1] * 6
    for part, members, records in groups(other):
        known = zoo.records(part, members)
        for name in ("init_seed", "order_seed", SEGMENT, "lr", "rows_per_class", "steps"):
            assert torch.equal(records[name], known[name]), name


# ------------------------------------------------------------------------------- built anew or not


def test_unchanged_options_train_nothing(zoo, monkeypatch):
    before = state(zoo.folder)
    monkeypatch.setattr("zoo.build.train_shard", never)
    again = build(small(zoo.folder.parent))
    assert state(zoo.folder) == before
    assert again == zoo


def test_a_zoo_that_was_moved_is_opened_and_trained_no_more(zoo, tmp_path, monkeypatch):
    shutil.copytree(zoo.folder, tmp_path / "zoo")
    before = state(tmp_path / "zoo")
    monkeypatch.setattr("zoo.build.train_shard", never)
    assert build(small(tmp_path)).digest == zoo.digest
    assert state(tmp_path / "zoo") == before


GROWN = {"members": (3, 2), "train_families": 5, "validation_families": 2, "test_families": 4}


def test_a_zoo_grows_in_place_and_is_what_it_would_have_been_at_once(tmp_path, trained):
    """Shards of two families fill up whole numbers of them, so none has to be trained again."""
    few = {"members": (2,), "train_families": 4, "validation_families": 2, "test_families": 2}
    build(small(tmp_path / "grown", shard=4, **few))
    before = state(tmp_path / "grown" / "zoo")
    trained.clear()
    grown = build(small(tmp_path / "grown", shard=4, **GROWN))
    assert set(trained) == {
        *(("train", 2, 4, 5), ("test", 2, 2, 4)),
        *(("train", 3, first, first + 1) for first in range(5)),
        *(("validation", 3, first, first + 1) for first in range(2)),
        *(("test", 3, first, first + 1) for first in range(4)),
    }
    assert len(trained) == len(set(trained))
    after = state(grown.folder)
    kept = before.keys() - {"manifest.json"}
    assert len(kept) == 2 * 4
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert left_over(tmp_path / "grown") == set()
    at_once = build(small(tmp_path / "once", shard=4, **GROWN))
    assert content(at_once.folder) == content(grown.folder)


def test_a_last_shard_that_is_not_full_is_trained_again_when_the_zoo_grows(zoo, tmp_path, trained):
    shutil.copytree(zoo.folder, tmp_path / "zoo")
    grown = build(small(tmp_path, train_families=4))
    assert trained == [("train", 2, 3, 4), ("train", 3, 2, 4)]
    for members in (2, 3):
        old, new = zoo.records("train", members), grown.records("train", members)
        for name in ("init_seed", "order_seed", SEGMENT):
            assert torch.equal(new[name][:3], old[name])
    assert content(grown.folder) == content(build(small(tmp_path / "x", train_families=4)).folder)


def test_members_in_another_order_are_the_same_families(zoo, tmp_path, monkeypatch):
    shutil.copytree(zoo.folder, tmp_path / "zoo")
    monkeypatch.setattr("zoo.build.train_shard", never)
    assert build(small(tmp_path, members=(3, 2))).groups == zoo.groups


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train_families": 2}, "train_families"),
        ({"validation_families": 1, "train_families": 9}, "train_families, validation_families"),
        ({"test_families": 0}, "test_families"),
        ({"members": (2,)}, "members"),
        ({"members": (2, 4)}, "members"),
        ({"epochs": 3.0}, "epochs"),
        ({"seed": 1, "train_families": 9}, "train_families, seed"),
        ({"shard": 7}, "shard"),
        ({"architecture": "cnn", "widths": None}, "architecture, widths"),
    ],
    ids=str,
)
def test_fewer_families_and_other_options_are_refused(zoo, monkeypatch, changes, named):
    before = state(zoo.folder)
    monkeypatch.setattr("zoo.build.train_shard", never)
    with pytest.raises(ZooError) as caught:
        build(small(zoo.folder.parent, **changes))
    assert f"{zoo.folder} holds a zoo with other options ({named})" in str(caught.value)
    assert "--out, or delete it" in str(caught.value)
    assert state(zoo.folder) == before
    assert left_over(zoo.folder.parent) == set()


def test_changed_options_make_a_new_folder_where_none_was_named(work):
    one = build(replace(SMALL, epochs=0.1))
    before = state(one.folder)
    other = build(replace(SMALL, epochs=0.1, seed=1))
    assert one.folder != other.folder
    assert {zoo.folder.parent for zoo in (one, other)} == {Path("zoos")}
    assert all(zoo.folder.name.startswith("digits-") for zoo in (one, other))
    assert state(one.folder) == before
    assert left_over(work / "zoos") == set()


def test_other_data_under_the_same_options_are_not_taken_for_the_old(zoo, tmp_path, trained):
    """Growing on other data trains all of it anew: no shard of the old data stays."""
    shutil.copytree(zoo.folder, tmp_path / "zoo")
    task = load_task("digits")
    altered = replace(task, inputs=1 - task.inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zoo.build.load_task", lambda *_, **__: altered)
        grown = build(small(tmp_path, test_families=3))
    assert len(trained) == len(PLACES) + 1
    assert grown.manifest["task"]["digest"] == altered.digest
    assert content(grown.folder).keys() & content(zoo.folder).keys() == {"manifest.json"}


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_place_that_holds_something_else_is_refused_before_any_work(tmp_path, monkeypatch, kind):
    place = tmp_path / "zoo"
    note = place / "note" if kind == "folder" else place
    note.parent.mkdir(exist_ok=True)
    note.write_text("mine")
    monkeypatch.setattr("zoo.build.load_task", never)
    with pytest.raises(ZooError, match=r"zoo is (not empty and holds no zoo|a file).*--out"):
        build(small(tmp_path))
    assert note.read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"zoo", "work"}  # not even a lock


def test_the_working_folder_is_refused_since_it_cannot_be_replaced(work, monkeypatch):
    monkeypatch.setattr("zoo.build.train_shard", never)
    with pytest.raises(ZooError, match="--out"):
        build(replace(SMALL, out="."))
    assert list(work.iterdir()) == []


def test_members_that_diverge_are_refused(tmp_path):
    with pytest.raises(ZooError, match="diverged at lr=1e\\+30"):
        build(small(tmp_path, lr=1e30))
    assert not (tmp_path / "zoo").exists()
    assert all(name.startswith(".zoo.") for name in left_over(tmp_path))


# ------------------------------------------------------------------------------- processes


def test_two_processes_share_the_work_and_give_the_bytes_of_one(
    zoo, tmp_path, on_two_processes, monkeypatch
):
    def spy(options, split, program, place, families, *others):
        line = f"{os.environ['RANK']} {place[0]} {place[1]} {families[0]} {families[-1] + 1}\n"
        with (tmp_path / "trained").open("a") as file:
            file.write(line)
        return train_shard(options, split, program, place, families, *others)

    monkeypatch.setattr("zoo.build.train_shard", spy)
    monkeypatch.setattr(sys, "argv", ["zoo.build", *flags(small(tmp_path))])
    said = on_two_processes(main)
    assert content(tmp_path / "zoo") == content(zoo.folder)
    lines = [line.split() for line in (tmp_path / "trained").read_text().splitlines()]
    places = [(part, int(k), int(a), int(b)) for _, part, k, a, b in lines]
    assert set(places) == PLACES
    assert len(places) == len(PLACES)
    assert {rank for rank, *_ in lines} == {"0", "1"}
    assert said.count("networks ready") == 1  # one of the two speaks
    assert left_over(tmp_path) == {"trained"}


class Process:
    """What ``build`` wants to know of ``accelerate.PartialState``."""

    device = "cpu"
    num_processes = 2

    def __init__(self, index, barrier):
        self.process_index, self.is_main_process = index, index == 0
        self.wait_for_everyone = barrier.wait


def test_processes_that_start_while_another_builder_is_at_work_take_its_zoo(
    zoo, tmp_path, monkeypatch
):
    monkeypatch.setattr("zoo.build.train_shard", never)
    barrier, found = threading.Barrier(2, timeout=5), {}

    def run(index):
        try:
            found[index] = build(small(tmp_path), state=Process(index, barrier)).digest
        except Exception as error:  # told below; the other thread must not wait for this one
            found[index] = error
            barrier.abort()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    with FileLock(tmp_path / ".zoo.lock"):  # another builder ...
        for thread in threads:
            thread.start()
        time.sleep(1.0)
        shutil.copytree(zoo.folder, tmp_path / "zoo")  # ... who is done now
    for thread in threads:
        thread.join(60)
    assert found == {0: zoo.digest, 1: zoo.digest}


# ------------------------------------------------------------------------------- command line


def command(monkeypatch, *arguments):
    """Run the command in this process and give its exit code."""
    monkeypatch.setattr(sys, "argv", ["zoo.build", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--init", "none"], "init: got 'none', expected one of ('own', 'shared')"),
        (["--split", "iid"], "split: got 'iid'"),
        (["--architecture", "transformer"], "'transformer' is unknown"),
        (["--members", "2", "2"], "members: expected different numbers"),
        (["--epochs", "3", "1"], "epochs: expected one number or a range of two"),
        (["--augment", "rotate"], "augment: got 'rotate'"),
        (["--task", "digit"], "did you mean 'digits'?"),
        (["--data", "somewhere"], "'digits' comes with a package and reads no folder"),
        (["--objective", "5000"], "objective=5000"),
        (["--norm", "batch"], "'mlp' has no norm"),
        (["--classes-per-family", "11"], "classes_per_family: got 11, 'digits' has 10 classes"),
        (["--split", "clusters", "--algorithm", "dbscan"], "algorithm: got 'dbscan'"),
        (["--split", "clusters", "--algorithm", "gmm", "--covariance", "x"], "covariance: got"),
        (["--epoch", "3"], "unknown option '--epoch'. Did you mean --epochs?"),
        (["--epochs", "many"], "argument --epochs: invalid float value: 'many'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_make_no_sense_end_with_code_2(monkeypatch, capsys, work, arguments, told):
    monkeypatch.setattr("zoo.shards.train_networks", never)
    assert command(monkeypatch, *arguments) == 2
    assert told in capsys.readouterr().err
    assert left_over(work) <= {"zoos"}
    assert list(work.glob("zoos/[!.]*")) == []


def test_segments_that_do_not_fit_end_with_code_3(monkeypatch, capsys):
    assert command(monkeypatch, "--split", "disjoint", "--segment-size", "900") == 3
    assert "do not fit" in capsys.readouterr().err


def test_the_command_says_where_the_zoo_lies(monkeypatch, capsys, zoo):
    monkeypatch.setattr(sys, "argv", ["zoo.build", *flags(small(zoo.folder.parent))])
    main()
    told = capsys.readouterr().out
    assert str(zoo.folder) in told.replace("\n", "")
    assert f"{NETWORKS} networks ready" in " ".join(told.split())


def test_the_help_text_explains_every_option(monkeypatch, capsys):
    assert command(monkeypatch, "--help") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert all(f"--{field.name.replace('_', '-')}" in told for field in fields(ZooOptions))
    assert "images per segment; 0 deals every image to exactly one member" in told


def test_options_that_do_not_fit_the_task_are_refused_from_python_too(tmp_path):
    with pytest.raises(ConfigError, match="'mlp' has no norm"):
        build(small(tmp_path, norm="batch"))
