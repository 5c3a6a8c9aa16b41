"""Building a zoo: what is in it, when it is built anew, and what survives a kill."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from evaluation.metrics import accuracy, family_logits
from metamerge import merge
from metamerge.errors import ConfigError, ZooError
from zoo.build import ZooOptions, build, main, options_from, split_of
from zoo.parts import split_task
from zoo.store import FAMILY_PARTS, load_zoo
from zoo.tasks import load_task
from zoo.training import train_networks

ROOT = Path(__file__).resolve().parents[2]
SMALL = ZooOptions(
    widths=(8,),
    segment_size=60,
    members=(2, 3),
    train_families=3,
    validation_families=2,
    test_families=2,
    epochs=20.0,
)
NETWORKS = (2 + 3) * (3 + 2 + 2)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return build(small(tmp_path_factory.mktemp("small")))


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def small(folder, **changes):
    return replace(SMALL, out=str(folder / "zoo"), **changes)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def state(folder):
    """Bytes and times of everything in a folder."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def left_over(folder):
    """What lies in a folder beside zoos and their locks."""
    kept = {"work", *(p.parent.name for p in folder.glob("*/manifest.json"))}
    return {p.name for p in folder.iterdir() if p.suffix != ".lock"} - {*kept}


def groups(zoo):
    """Every set of families: part, members, rows and provenance."""
    for part in FAMILY_PARTS:
        for members in zoo.sizes:
            yield part, members, zoo.rows(part, members), zoo.provenance(part, members)


def run(*arguments, **settings):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *arguments], env=environment, text=True, **settings)


def flags(options):
    """A command line for options."""
    line = []
    for field in fields(options):
        value = getattr(options, field.name)
        if value is not None:
            values = value if isinstance(value, tuple) else (value,)
            line += [f"--{field.name.replace('_', '-')}", *map(str, values)]
    return line


def never(*_, **__):
    raise AssertionError("a network was trained")


# ------------------------------------------------------------------------------- what is in it


def test_a_zoo_holds_what_was_asked_for(zoo):
    expected = {"train": 3, "validation": 2, "test": 2}
    for part, members, rows, provenance in groups(zoo):
        families = zoo.families(part, members)
        shapes = {key: tuple(t.shape[:2]) for key, t in families.items()}
        assert set(shapes.values()) == {(expected[part], members)}
        assert families["1.weight"].shape[2:] == (8, 64)
        assert rows.shape[:2] == (expected[part], members)
        assert [len(family) for family in provenance] == [members] * expected[part]
    assert zoo.manifest["task"]["name"] == "digits"
    assert options_from(zoo.options) == small(zoo.folder.parent)


def test_members_have_learned_and_their_recorded_accuracy_is_true(zoo):
    split = split_of(zoo)
    inputs, targets = split.images("validation")
    scores = []
    for part, members, _, provenance in groups(zoo):
        logits = family_logits(zoo.layout.program, zoo.families(part, members), inputs)
        found = accuracy(logits, targets)
        told = torch.tensor([[m["validation_accuracy"] for m in family] for family in provenance])
        torch.testing.assert_close(told, found, rtol=0, atol=5.1e-5)  # told to four places
        scores.append(found.flatten())
    assert torch.cat(scores).mean() > 0.15  # chance is 0.1


def test_segments_hold_no_image_of_another_part(zoo):
    split = split_of(zoo)
    for _, _, rows, _ in groups(zoo):
        used = rows[rows >= 0].unique()
        assert torch.isin(used, split.rows("segments")).all()
        for other in ("objective", "validation", "test"):
            assert not torch.isin(used, split.rows(other)).any()


def test_test_images_are_refused_while_members_are_trained(tmp_path, monkeypatch):
    split = split_task(load_task("digits"), objective=SMALL.objective)

    def curious(*_, **__):
        split.images("test")

    monkeypatch.setattr("zoo.build.split_task", lambda *_, **__: split)
    monkeypatch.setattr("zoo.build.train_networks", curious)
    with pytest.raises(ZooError, match="training"):
        build(small(tmp_path))


def test_a_zoo_whose_task_holds_other_data_now_is_refused(zoo, monkeypatch):
    task = load_task("digits")
    altered = replace(task, inputs=1 - task.inputs)
    monkeypatch.setattr("zoo.build.load_task", lambda *_: altered)
    with pytest.raises(ZooError, match=f"other data.*{task.digest[:12]}.*{altered.digest[:12]}"):
        split_of(zoo)


def test_rows_and_provenance_agree(zoo):
    targets = split_of(zoo).task.targets
    for _, members, rows, provenance in groups(zoo):
        for family in range(len(rows)):
            for member in range(members):
                own = rows[family, member]
                own = own[own >= 0].long()
                told = provenance[family][member]
                assert told["rows"] == len(own) == len(own.unique()) == SMALL.segment_size
                assert told["rows_per_class"] == targets[own].bincount(minlength=10).tolist()


def test_every_member_has_an_init_of_its_own(zoo):
    seeds = [m["init_seed"] for *_, families in groups(zoo) for own in families for m in own]
    assert len(set(seeds)) == len(seeds) == NETWORKS


def test_a_shared_init_is_shared_within_a_family_only(tmp_path):
    zoo = build(small(tmp_path, init="shared", lr=1e-9))  # members stay at their inits
    seen = Counter()
    for part, members, _, provenance in groups(zoo):
        weights = zoo.families(part, members)["1.weight"]
        torch.testing.assert_close(weights, weights[:, :1].expand_as(weights))
        for family in provenance:
            (seed,) = {member["init_seed"] for member in family}
            seen[seed] += 1
        first = weights[:, 0].flatten(1)
        assert torch.pdist(first).min() > 0.1
    assert set(seen.values()) == {1}


def test_parts_share_no_init_seed(tmp_path, zoo):
    for built in (zoo, build(small(tmp_path, init="shared"))):
        by_part = {
            part: {
                member["init_seed"]
                for own, _, _, families in groups(built)
                if own == part
                for family in families
                for member in family
            }
            for part in FAMILY_PARTS
        }
        train, validation, test = by_part.values()
        assert train.isdisjoint(validation | test)
        assert validation.isdisjoint(test)


def test_disjoint_segments_share_no_image(tmp_path):
    zoo = build(small(tmp_path, split="disjoint"))
    for _, _, rows, _ in groups(zoo):
        for family in rows:
            assert len(family.unique()) == family.numel() == len(family) * SMALL.segment_size


@pytest.mark.parametrize("split", ["disjoint", "dirichlet"])
def test_segments_without_a_size_deal_out_every_image_once(tmp_path, split):
    zoo = build(small(tmp_path, split=split, segment_size=0, alpha=5.0, epochs=0.1))
    segments = split_of(zoo).rows("segments")
    for _, _, rows, _ in groups(zoo):
        for family in rows.long():
            assert torch.equal(family[family >= 0].sort().values, segments)


def test_a_small_alpha_skews_classes(tmp_path):
    classes = {}
    for alpha in (0.1, 100.0):
        zoo = build(small(tmp_path / str(alpha), alpha=alpha))
        counts = [
            sum(count > 0 for count in member["rows_per_class"])
            for *_, families in groups(zoo)
            for family in families
            for member in family
        ]
        classes[alpha] = sum(counts) / len(counts)
    assert classes[0.1] < 5 < 9 < classes[100.0]


def test_a_family_can_be_merged_by_its_address(zoo):
    merged = merge(zoo.address("test", 3, 1), method="average")
    assert merged.report["verified"] == [True] * 3
    assert merged.weights["1.weight"].shape == (8, 64)


def test_convolutional_networks_are_built(tmp_path):
    zoo = build(small(tmp_path, architecture="cnn", widths=(2, 3)))
    assert zoo.families("test", 2)["0.weight"].shape == (2, 2, 2, 1, 3, 3)
    assert len(zoo.layout.layers) == 3


def test_the_same_options_give_the_same_bytes(zoo, tmp_path):
    again = build(small(tmp_path))
    one, other = content(zoo.folder), content(again.folder)
    manifests = [json.loads(files.pop("manifest.json")) for files in (one, other)]
    assert one == other
    for manifest in manifests:
        manifest["options"].pop("out")
    assert manifests[0] == manifests[1]


def test_another_seed_gives_other_members(zoo, tmp_path):
    other = build(small(tmp_path, seed=2**31 - 1))
    for part, members, rows, provenance in groups(other):
        assert not torch.equal(rows, zoo.rows(part, members))
        weights = other.families(part, members)["1.weight"]
        assert not torch.equal(weights, zoo.families(part, members)["1.weight"])
        told = {m["init_seed"] for family in zoo.provenance(part, members) for m in family}
        assert told.isdisjoint(m["init_seed"] for family in provenance for m in family)


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
    assert (options.widths, options.segment_size, options.epochs) == ((32,), 300, 30.0)
    clock = time.process_time()  # what other processes take of a core is not ours
    zoo = build(options)
    seconds = time.process_time() - clock
    members = [m for *_, families in groups(zoo) for family in families for m in family]
    assert len(members) == 360
    assert {m["rows"] for m in members} == {300}
    assert zoo.families("train", 6)["1.weight"].shape == (40, 6, 32, 64)
    assert sum(m["validation_accuracy"] for m in members) / 360 > 0.5  # skewed: few see all classes
    assert seconds < 20


# ------------------------------------------------------------------------------- built anew or not


def test_unchanged_options_build_nothing(zoo, monkeypatch):
    before = state(zoo.folder)
    monkeypatch.setattr("zoo.build.train_networks", never)
    again = build(small(zoo.folder.parent))
    assert state(zoo.folder) == before
    assert again.digest == zoo.digest


def test_changed_options_are_refused_in_a_folder_that_was_named(zoo):
    before = state(zoo.folder)
    with pytest.raises(ZooError) as caught:
        build(small(zoo.folder.parent, epochs=3.0, members=(2,)))
    assert f"{zoo.folder} holds a zoo with other options (members, epochs)" in str(caught.value)
    assert "--out" in str(caught.value)
    assert state(zoo.folder) == before


def test_changed_options_make_a_new_folder_where_none_was_named(work):
    one = build(SMALL)
    before = state(one.folder)
    other = build(replace(SMALL, seed=1))
    assert one.folder != other.folder
    assert {zoo.folder.parent for zoo in (one, other)} == {Path("zoos")}
    assert all(zoo.folder.name.startswith("digits-") for zoo in (one, other))
    assert state(one.folder) == before
    assert left_over(work / "zoos") == set()


def test_the_usual_zoo_of_a_task_bears_its_name():
    assert ZooOptions().folder == Path("zoos/digits")
    assert ZooOptions(task="mnist").folder == Path("zoos/mnist")
    assert ZooOptions(seed=1).folder.name.startswith("digits-")


def test_where_things_lie_does_not_shape_a_zoo():
    assert ZooOptions(out="elsewhere", data="there").digest == ZooOptions().digest
    assert ZooOptions(epochs=30, lr=0.01).digest == ZooOptions(epochs=30.0).digest


CHANGED = {
    "task": "mnist",
    "objective": 300,
    "architecture": "cnn",
    "widths": (16,),
    "split": "disjoint",
    "alpha": 0.5,
    "segment_size": 200,
    "init": "shared",
    "members": (2, 4),
    "train_families": 10,
    "validation_families": 10,
    "test_families": 10,
    "epochs": 10.0,
    "batch_size": 16,
    "lr": 0.02,
    "weight_decay": 0.1,
    "seed": 1,
}


def test_every_other_option_shapes_a_zoo():
    names = {field.name for field in fields(ZooOptions)}
    assert names - {"out", "data"} == CHANGED.keys()
    digests = {replace(ZooOptions(), **{k: v}).digest for k, v in CHANGED.items()}
    assert len(digests | {ZooOptions().digest}) == len(CHANGED) + 1


def test_options_of_another_version_are_refused(zoo):
    with pytest.raises(ZooError, match=r"another version.*'momentum'"):
        options_from({**zoo.options, "momentum": 0.9})


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_place_that_holds_something_else_is_refused_before_any_work(tmp_path, monkeypatch, kind):
    place = tmp_path / "zoo"
    note = place / "note" if kind == "folder" else place
    note.parent.mkdir(exist_ok=True)
    note.write_text("mine")
    monkeypatch.setattr("zoo.build.train_networks", never)
    with pytest.raises(ZooError, match=r"zoo is (not empty and holds no zoo|a file).*--out"):
        build(small(tmp_path))
    assert note.read_text() == "mine"
    assert left_over(tmp_path) == {"zoo"}


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ZooError, match=r"cannot be written.*--out"):
        build(small(tmp_path / "file"))


def test_members_that_diverge_are_refused(tmp_path):
    with pytest.raises(ZooError, match="diverged at lr=1e\\+30"):
        build(small(tmp_path, lr=1e30))
    assert left_over(tmp_path) == set()


def test_a_damaged_zoo_is_refused_and_not_built_over(tmp_path):
    zoo = build(small(tmp_path))
    path = zoo.folder / "train-k2.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ZooError, match=r"train-k2\.safetensors: sha256"):
        build(small(tmp_path)).families("train", 2)
    assert path.read_bytes() == data


# ------------------------------------------------------------------------------- processes


def test_two_builders_of_one_folder_both_succeed(zoo, tmp_path):
    command = ["-m", "zoo.build", *flags(small(tmp_path))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    builders = [run(*command, **pipes) for _ in range(2)]
    told = [builder.communicate(timeout=120)[0] for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0], told
    assert all(f"{NETWORKS} networks ready" in " ".join(text.split()) for text in told)
    built = load_zoo(tmp_path / "zoo")
    for part, members, *_ in groups(zoo):
        one, other = zoo.families(part, members), built.families(part, members)
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert left_over(tmp_path) == set()


def test_of_two_builders_of_one_folder_only_one_trains(tmp_path, monkeypatch):
    trained = []

    def counted(*arguments, **options):
        trained.append(threading.get_ident())
        return train_networks(*arguments, **options)

    monkeypatch.setattr("zoo.build.train_networks", counted)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(build, [small(tmp_path)] * 2)
    assert first == second
    assert len(set(trained)) == 1
    assert len(trained) == len(FAMILY_PARTS) * len(SMALL.members)


KILLED = """
import os, signal, sys
from zoo import build, options, store

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[1] == "training":
    progress = die
else:
    progress, store._write_text = None, die
build.build(options.parse(build.ZooOptions, sys.argv[2:], prog="killed"), progress=progress)
"""


@pytest.mark.parametrize("moment", ["training", "writing"])
def test_a_kill_leaves_no_half_zoo_and_the_next_start_completes(zoo, tmp_path, moment):
    options = small(tmp_path)
    killed = run("-c", KILLED, moment, *flags(options))
    assert killed.wait(timeout=120) == -signal.SIGKILL
    assert not (tmp_path / "zoo").exists()
    assert (len(left_over(tmp_path)) > 0) == (moment == "writing")  # a hidden folder at most
    assert all(name.startswith(".zoo.") for name in left_over(tmp_path))
    again = build(options)
    assert content(again.folder).keys() == content(zoo.folder).keys()
    assert again.families("test", 3)["1.weight"].isfinite().all()


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
        (["--architecture", "transformer"], "architecture: got 'transformer'"),
        (["--members", "2", "2"], "members: expected different numbers"),
        (["--members", "0"], "members: expected different numbers from 1 on"),
        (["--train-families", "0"], "train_families: expected more than 0"),
        (["--test-families", "-1"], "test_families: expected more than 0"),
        (["--epochs", "0"], "epochs: expected more than 0"),
        (["--epochs", "inf"], "epochs: expected more than 0, got inf"),
        (["--lr", "nan"], "lr: expected more than 0, got nan"),
        (["--alpha", "-0.1"], "alpha: expected more than 0"),
        (["--batch-size", "0"], "batch_size: expected more than 0"),
        (["--segment-size", "-1"], "segment_size: expected 0 or more"),
        (["--weight-decay", "-1"], "weight_decay: expected 0 or more"),
        (["--widths", "32", "0"], "widths: expected numbers from 1 on"),
        (["--seed", "-1"], "seed: expected 0 to"),
        (["--task", "digit"], "did you mean 'digits'?"),
        (["--data", "somewhere"], "'digits' is embedded"),
        (["--objective", "5000"], "objective=5000"),
        (["--epoch", "3"], "unknown option '--epoch'. Did you mean --epochs?"),
        (["--epochs", "many"], "argument --epochs: invalid float value: 'many'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_make_no_sense_end_with_code_2(monkeypatch, capsys, work, arguments, told):
    monkeypatch.setattr("zoo.build.train_networks", never)
    assert command(monkeypatch, *arguments) == 2
    assert told in capsys.readouterr().err
    assert left_over(work) <= {"zoos"}


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


def test_bad_options_are_refused_from_python_too():
    with pytest.raises(ConfigError, match="init"):
        ZooOptions(init="none")


def test_a_refused_folder_gets_no_lock_beside_it(tmp_path):
    folder = tmp_path / "place" / "runs"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("not a zoo")
    with pytest.raises(ZooError, match="holds no zoo"):
        build(replace(SMALL, out=str(folder)))
    assert [path.name for path in folder.parent.iterdir()] == ["runs"]
    assert (folder / "notes.txt").read_text() == "not a zoo"
