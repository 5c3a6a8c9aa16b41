"""What a zoo survives: kills, builders that meet, full disks and damage of all kinds.

Builders are real processes. A server that has imported everything forks them, so that each starts
within milliseconds and a test can afford to kill many.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from metamerge import merge
from metamerge.errors import Unreadable, ZooError
from zoo.build import build
from zoo.files import is_whole
from zoo.recipe import ZooOptions
from zoo.shards import train_shard
from zoo.store import load_zoo
from zoo.trainable import check_trainable
from zoo.writing import Building

ROOT = Path(__file__).resolve().parents[2]
SMALL = ZooOptions(
    widths=(4,),
    segment_size=40,
    members=(2, 3),
    train_families=3,
    validation_families=2,
    test_families=2,
    epochs=12.0,
    shard=3,  # one family
)
SHARDS = 2 * (3 + 2 + 2)
TINY = replace(
    SMALL,
    members=(2,),
    train_families=1,
    validation_families=1,
    test_families=0,
    epochs=0.1,
)
KILLS = 10

SERVER = """
import gc, json, os, resource, signal, sys
import torch
from zoo import build as building
from zoo import shards
from zoo.recipe import options_from

torch.set_num_threads(1)
os.fsync = lambda descriptor: None  # a kill takes nothing from the system, and tests wait for disks
check, programs = building.check_trainable, []

def once(*network):  # all networks here have one architecture
    programs[:] = programs or [check(*network)]
    return programs[0]

building.check_trainable = once
building.build(options_from(json.loads(sys.argv[1])))  # whatever is imported late is imported now
gc.freeze()
CHANGES = {"open", "os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir", "ctypes.dlsym"}

def forked(job):
    options = options_from(job["options"])

    def spy(asked, split, program, place, families, *others):
        if job.get("shards", -1) == 0:
            os.kill(os.getpid(), job["signal"])
        job["shards"] = job.get("shards", -1) - 1
        line = f"{place[0]} {place[1]} {families[0]}\\n"
        with open(job["trained"], "a") as file:
            file.write(line)
        return shards.train_shard(asked, split, program, place, families, *others)

    building.train_shard = spy
    if "largest_file" in job:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"],) * 2)
    left = [job.get("changes", -1)]

    def audit(event, arguments):
        if event not in CHANGES or left[0] < 0:
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        if event == "ctypes.dlsym" and arguments[1] != "renameat2":
            return
        if event == "open" and os.fspath(arguments[0]) == job["trained"]:
            return
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1

    sys.addaudithook(audit)
    try:
        building.build(options)
    except Exception as error:
        with open(job["told"], "w") as file:
            file.write(f"{type(error).__name__}: {error}")
        return 1
    return 0

for line in sys.stdin:
    job = json.loads(line)
    if "wait" in job:
        print(os.waitpid(job["wait"], 0)[1], flush=True)
        continue
    child = os.fork()
    if child == 0:
        os._exit(forked(job))
    print(child, flush=True)
"""


class Builders:
    """Starts builders in processes of their own, with one server for all of them."""

    def __init__(self, folder):
        self.folder = folder
        self.started = 0
        first = json.dumps(asdict(replace(TINY, out=str(folder / "warm" / "zoo"))))
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER, first],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            text=True,
        )

    def ask(self, job):
        print(json.dumps(job), file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())

    def start(self, options, **job):
        """A builder that is at work."""
        self.started += 1
        trained = self.folder / f"trained-{self.started}"
        told = self.folder / f"told-{self.started}"
        job |= {"options": asdict(options), "trained": str(trained), "told": str(told)}
        return Builder(self, self.ask(job), trained, told)

    def run(self, options, **job):
        """A builder that has come to its end, whatever that was."""
        builder = self.start(options, **job)
        builder.wait()
        return builder


class Builder:
    """One builder: how it ended, what it said, and what it began to train."""

    def __init__(self, builders, process, trained, told):
        self.builders, self.process = builders, process
        self._trained, self._told = trained, told
        self.code = None

    def kill(self):
        os.kill(self.process, signal.SIGKILL)  # nobody else has its number until it is waited for

    def wait(self):
        self.code = os.waitstatus_to_exitcode(self.builders.ask({"wait": self.process}))
        return self.code

    @property
    def told(self):
        return self._told.read_text() if self._told.exists() else ""

    @property
    def trained(self):
        """Part, members and first family of every shard."""
        lines = self._trained.read_text().splitlines() if self._trained.exists() else []
        return [(part, int(k), int(f)) for part, k, f in map(str.split, lines)]


@pytest.fixture(scope="module")
def builders(tmp_path_factory):
    found = Builders(tmp_path_factory.mktemp("builders"))
    yield found
    found.server.stdin.close()
    found.server.wait(timeout=60)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As many as the builders have, so that bits may be compared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def one_program():
    """All networks here have one architecture: it is traced once."""
    programs = []

    def once(*network):
        programs[:] = programs or [check_trainable(*network)]
        return programs[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zoo.build.check_trainable", once)
        yield


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A zoo that nothing has disturbed."""
    return build(small(tmp_path_factory.mktemp("undisturbed")))


@pytest.fixture(scope="module")
def tiny_zoo(tmp_path_factory):
    return build(replace(TINY, out=str(tmp_path_factory.mktemp("tiny") / "zoo")))


@pytest.fixture
def own(zoo, tmp_path):
    """A copy of the undisturbed zoo, to be damaged."""
    shutil.copytree(zoo.folder, tmp_path / "zoo")
    return load_zoo(tmp_path / "zoo")


@pytest.fixture
def trained(monkeypatch):
    """Part, members and first family of every shard that is trained in this process."""
    places = []

    def spy(options, split, program, place, families, *others):
        places.append((*place, families[0]))
        return train_shard(options, split, program, place, families, *others)

    monkeypatch.setattr("zoo.build.train_shard", spy)
    return places


def small(folder, **changes):
    return replace(SMALL, out=str(folder / "zoo"), **changes)


def sums(folder):
    """Checksum of every file; of the manifest without the place of the zoo."""
    found = {}
    for path in folder.iterdir():
        content = path.read_bytes()
        if path.name == "manifest.json":
            manifest = json.loads(content)
            del manifest["options"]["out"]
            content = json.dumps(manifest, sort_keys=True).encode()
        found[path.name] = sha256(content).hexdigest()
    return found


def keys_of(zoo):
    """Key of a shard -> its part, members and first family."""
    found = {}
    for group in zoo.groups.values():
        first = 0
        for shard in group["shards"]:
            found[shard["key"]] = (group["part"], group["members"], first)
            first += shard["families"]
    return found


def kept(folder):
    """Keys of the shards that need not be trained again, before the zoo has its name and after."""
    found = set()
    for place in (folder / "zoo", *folder.glob(".zoo.*.building")):
        found |= {path.stem.removeprefix("shard-") for path in place.glob("shard-*.json")}
        if (place / "manifest.json").exists():
            found |= keys_of(load_zoo(place)).keys()
    return found


def unfinished(folder):
    """The hidden folder of a build that has begun."""
    (found,) = folder.glob(".zoo.*.building")
    return found


def left_over(folder):
    return {path.name for path in folder.iterdir()} - {"zoo", ".zoo.lock"}


def flip(path, place=-1):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def interrupted(builders, options, shards):
    """Kill a builder that has finished some shards; the keys of these."""
    builder = builders.run(options, shards=shards, signal=signal.SIGKILL)
    assert builder.code == -signal.SIGKILL
    return kept(Path(options.out).parent)


# ------------------------------------------------------------------------------- kills


def test_a_build_that_is_killed_again_and_again_ends_as_if_nothing_had_been(
    builders, zoo, tmp_path
):
    """Whenever one comes to its end before it was killed often enough, the next begins anew."""
    places, moments, kills, resumed = keys_of(zoo), random.Random(), 0, 0
    assert builders.run(small(tmp_path / "first")).code == 0  # the server is there, then
    clock = time.perf_counter()
    assert builders.run(small(tmp_path / "second")).code == 0
    whole = time.perf_counter() - clock
    for start in range(100):
        options = small(tmp_path / str(start))
        folder = tmp_path / str(start)
        folder.mkdir()
        while not (folder / "zoo").exists():
            before = kept(folder)
            builder = builders.start(options)
            if kills < KILLS or not resumed:
                time.sleep(moments.uniform(0, whole / 2))
                builder.kill()
            if builder.wait() == -signal.SIGKILL:
                kills += 1
                assert before <= kept(folder)  # nothing that was finished is ever lost
            else:
                assert builder.code == 0, builder.told
            missing = places.keys() - before
            assert set(builder.trained) <= {places[key] for key in missing}
            assert len(builder.trained) == len(set(builder.trained))
            resumed += bool(before)
        assert sums(folder / "zoo") == sums(zoo.folder)
        assert builders.run(options).trained == []
        if kills >= KILLS and resumed:
            break
    assert kills >= KILLS
    assert resumed > 0


@pytest.mark.parametrize("older", [False, True], ids=["new", "grown"])
def test_a_kill_before_any_change_of_the_disk_leaves_the_old_zoo_or_the_new(
    builders, tiny_zoo, tmp_path, older
):
    """Before the first, second, ... file that is opened, renamed, linked or removed."""
    options = replace(TINY, train_families=2) if older else TINY
    once = replace(options, out=str(tmp_path / "once" / "zoo"))
    build(once)
    expected = {frozenset(sums(tmp_path / "once" / "zoo").items())}
    if older:
        expected.add(frozenset(sums(tiny_zoo.folder).items()))
    for changes in range(200):
        folder = tmp_path / str(changes)
        folder.mkdir()
        if older:
            shutil.copytree(tiny_zoo.folder, folder / "zoo")
        own = replace(options, out=str(folder / "zoo"))
        killed = builders.run(own, changes=changes)
        assert killed.code in (0, -signal.SIGKILL), killed.told
        if older or (folder / "zoo").exists():
            assert frozenset(sums(folder / "zoo").items()) in expected
        again = builders.run(own)
        assert again.code == 0, again.told
        assert sums(folder / "zoo") == sums(tmp_path / "once" / "zoo")
        assert left_over(folder) == set(), changes
        if killed.code == 0:
            break
    assert 20 < changes < 199


def test_what_a_kill_leaves_is_hidden_and_no_zoo(builders, tmp_path):
    assert len(interrupted(builders, small(tmp_path), 2)) == 2
    assert not (tmp_path / "zoo").exists()
    assert all(name.startswith(".zoo.") for name in left_over(tmp_path))
    with pytest.raises(ZooError, match="no zoo here"):
        load_zoo(unfinished(tmp_path))
    with pytest.raises(ZooError, match="no zoo here"):
        load_zoo(tmp_path / "zoo")


def test_nothing_gets_its_name_before_it_is_on_the_disk(tmp_path, monkeypatch):
    """What a loss of power leaves: every file is synced before it is renamed, every folder after.

    A folder of a finished zoo is renamed when its files and its list of names are synced.
    """
    synced, named = set(), []
    fsync, replace_file, rename = os.fsync, os.replace, os.rename

    def inode(path):
        return os.stat(path).st_ino

    def spied_fsync(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def spied_replace(source, target):
        assert inode(source) in synced, source
        replace_file(source, target)
        synced.discard(inode(Path(target).parent))
        named.append(target)

    def spied_rename(source, target):
        inside = {inode(path) for path in Path(source).iterdir()}
        assert {inode(source), *inside} <= synced
        rename(source, target)
        synced.discard(inode(Path(target).parent))
        named.append(target)

    monkeypatch.setattr(os, "fsync", spied_fsync)
    monkeypatch.setattr(os, "replace", spied_replace)
    monkeypatch.setattr(os, "rename", spied_rename)
    build(small(tmp_path))
    assert named[-1] == tmp_path / "zoo"
    assert len(named) == 3 * SHARDS + 2  # weights, records and entry of each; manifest; folder
    assert inode(tmp_path) in synced
    assert inode(tmp_path / "zoo") in synced


# ------------------------------------------------------------------------------- who meets


def test_two_builders_at_once_make_one_zoo_and_train_nothing_twice(builders, zoo, tmp_path):
    pair = [builders.start(small(tmp_path)) for _ in range(2)]
    assert [builder.wait() for builder in pair] == [0, 0], [builder.told for builder in pair]
    assert sorted(len(builder.trained) for builder in pair) == [0, SHARDS]
    assert sums(tmp_path / "zoo") == sums(zoo.folder)
    assert left_over(tmp_path) == set()


def test_a_builder_that_waits_goes_on_where_the_other_was_killed(builders, zoo, tmp_path):
    first = builders.start(small(tmp_path), shards=3, signal=signal.SIGSTOP)
    until = time.monotonic() + 60
    while len(kept(tmp_path)) < 3:
        assert time.monotonic() < until
        time.sleep(0.001)
    second = builders.start(small(tmp_path))
    time.sleep(0.2)
    assert second.trained == []
    first.kill()
    assert first.wait() == -signal.SIGKILL
    assert second.wait() == 0, second.told
    assert sums(tmp_path / "zoo") == sums(zoo.folder)
    assert (len(first.trained), len(second.trained)) == (3, SHARDS - 3)


def test_of_two_builders_with_other_options_one_is_told_so(builders, zoo, tmp_path):
    pair = [builders.start(small(tmp_path)), builders.start(small(tmp_path, seed=1))]
    assert sorted(builder.wait() for builder in pair) == [0, 1]
    winner, loser = sorted(pair, key=lambda builder: builder.code)
    assert loser.trained == []
    assert loser.told.startswith(f"ZooError: {tmp_path / 'zoo'} holds a zoo with other options")
    assert "(seed). Choose another --out, or delete it" in loser.told
    if winner is pair[0]:
        assert sums(tmp_path / "zoo") == sums(zoo.folder)
    assert load_zoo(tmp_path / "zoo").options["seed"] == (0 if winner is pair[0] else 1)
    assert left_over(tmp_path) == set()


# ------------------------------------------------------------------------------- full disks

KEPT = r"cannot be written \({reason}\)\. {count} finished shards are kept in .*: make room"


@contextlib.contextmanager
def mounted(folder, options):
    """A file system of its own, where that is allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def remount(folder, options):
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def test_a_full_disk_is_told_and_with_room_the_build_goes_on(zoo, tmp_path, trained):
    """The disk grows by some pages after every failure, so writing fails at many places."""
    page, places, counts = os.sysconf("SC_PAGE_SIZE"), keys_of(zoo), []
    with mounted(tmp_path / "disk", f"size={4 * page}") as disk:
        for pages in range(4, 400, 5):
            remount(disk, f"size={pages * page}")
            trained.clear()
            before = kept(disk)
            try:
                build(small(disk))
            except ZooError as error:
                caught = str(error)
            assert set(trained) <= {places[key] for key in places.keys() - before}
            if (disk / "zoo").exists():
                break
            assert before <= kept(disk)
            told = KEPT.format(reason="No space left on device", count=len(kept(disk)))
            assert re.search(told, caught)
            for entry in Building(disk / "zoo", small(disk).digest).shards().values():
                assert is_whole(unfinished(disk), entry["weights"])
                assert is_whole(unfinished(disk), entry["records"])
            counts.append(len(kept(disk)))
        assert sums(disk / "zoo") == sums(zoo.folder)
        assert left_over(disk) == set()
    assert len(set(counts)) > SHARDS / 2


def test_a_file_that_cannot_be_written_whole_is_no_shard(builders, zoo, tmp_path):
    """Families of three do not fit below the limit of this process, families of two do."""
    sizes = {
        members: max((zoo.folder / shard["weights"]["file"]).stat().st_size for shard in shards)
        for members in (2, 3)
        for shards in [zoo.group("train", members)["shards"]]
    }
    options = small(tmp_path)
    failed = builders.run(options, largest_file=(sizes[2] + sizes[3]) // 2)
    assert failed.code == 1
    assert re.search(KEPT.format(reason="File too large", count=3), failed.told)
    assert not list(unfinished(tmp_path).glob(".unfinished-*"))
    assert len(kept(tmp_path)) == 3
    again = builders.run(options)
    assert (again.code, len(again.trained)) == (0, SHARDS - 3)
    assert sums(tmp_path / "zoo") == sums(zoo.folder)


def test_a_full_disk_leaves_the_older_zoo_as_it_was(tmp_path, zoo):
    with mounted(tmp_path / "disk", "size=1m") as disk:
        shutil.copytree(zoo.folder, disk / "zoo")
        before = sums(disk / "zoo")
        used = sum(-(-path.stat().st_size // 4096) for path in (disk / "zoo").iterdir())
        remount(disk, f"size={4096 * (used + 20)}")  # links take no room, a few shards do
        with pytest.raises(ZooError, match=KEPT.format(reason="No space.*", count=r"\d\d")):
            build(small(disk, train_families=9))
        assert sums(disk / "zoo") == before
        remount(disk, "size=4m")
        build(small(disk, train_families=9))
        assert load_zoo(disk / "zoo").group("train", 2)["families"] == 9
        assert left_over(disk) == set()


def test_a_disk_that_is_read_only_is_told(tmp_path):
    with mounted(tmp_path / "disk", "ro,size=1m") as disk:
        with pytest.raises(ZooError, match=r"zoo cannot be written: .*Read-only.*another --out"):
            build(small(disk))
        with pytest.raises(ZooError, match=r"zoo cannot be written: .*Read-only.*another --out"):
            build(replace(TINY, out=str(disk / "deep" / "zoo")))


def test_a_whole_zoo_on_a_read_only_disk_can_be_read(tmp_path, zoo):
    with mounted(tmp_path / "disk", "size=1m") as disk:
        shutil.copytree(zoo.folder, disk / "zoo")
        remount(disk, "ro")
        found = build(small(disk))  # nothing has to be written
        assert found.families("train", 3)["1.weight"].shape[:2] == (3, 3)
        merge(found.address("train", 3, 2), method="average", align=None)


def test_a_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ZooError, match=r"cannot be written.*--out"):
        build(small(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


# ------------------------------------------------------------------------------- damage of a zoo


def shard_of(zoo, place):
    """The manifest's entry of the shard with that part, members and first family."""
    (key,) = [key for key, found in keys_of(zoo).items() if found == place]
    shards = (shard for group in zoo.groups.values() for shard in group["shards"])
    return next(shard for shard in shards if shard["key"] == key)


@pytest.mark.parametrize("kind", ["weights", "records"])
@pytest.mark.parametrize("how", ["first byte", "last byte", "shortened", "deleted", "folder"])
def test_a_damaged_shard_is_told_and_trained_anew_alone(zoo, own, trained, kind, how):
    place = ("train", 3, 1)
    path = own.folder / shard_of(own, place)[kind]["file"]
    if how in ("first byte", "last byte"):
        flip(path, 0 if how == "first byte" else -1)
    elif how == "shortened":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.unlink()
    if how == "folder":
        path.mkdir()
    read = {"weights": own.families, "records": own.records}[kind]
    with pytest.raises(ZooError, match=rf"{path.name}: .*Build the zoo again with the same opt"):
        read("train", 3)
    with pytest.raises(Unreadable, match=path.name):
        merge(own.address("train", 3, 1), method="average", align=None)
    merge(own.address("train", 3, 0), method="average", align=None)  # its neighbour is whole
    assert build(small(own.folder.parent)).groups == zoo.groups
    assert trained == [place]
    assert sums(own.folder) == sums(zoo.folder)
    assert left_over(own.folder.parent) == set()


def test_a_zoo_all_of_whose_files_are_damaged_is_trained_anew(zoo, own, trained):
    for path in own.folder.glob("*.safetensors"):
        flip(path)
    build(small(own.folder.parent))
    assert len(trained) == SHARDS
    assert sums(own.folder) == sums(zoo.folder)


def test_a_damaged_zoo_that_grows_repairs_itself(own, tmp_path, trained):
    place = ("train", 3, 1)
    flip(own.folder / shard_of(own, place)["weights"]["file"])
    grown = build(small(tmp_path, test_families=3))
    assert sorted(trained) == [("test", 2, 2), ("test", 3, 2), place]
    assert all(is_whole(grown.folder, shard_of(grown, p)["weights"]) for p in trained)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff"])
def test_a_damaged_manifest_is_never_built_over(own, trained, text):
    (own.folder / "manifest.json").write_bytes(text)
    before = {path.name: path.read_bytes() for path in own.folder.iterdir()}
    with pytest.raises(ZooError, match="--out"):
        build(small(own.folder.parent))
    assert {path.name: path.read_bytes() for path in own.folder.iterdir()} == before
    assert trained == []


def test_a_zoo_of_an_older_format_is_refused_and_left_alone(tmp_path, trained):
    """The manifest and the files of version 1."""
    (tmp_path / "zoo").mkdir()
    manifest = {"format": "metamerge-zoo-1", "digest": "0", "options": {}, "files": {}}
    (tmp_path / "zoo" / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "zoo" / "train-k2.safetensors").write_bytes(b"")
    told = "zoo of format 'metamerge-zoo-1', this version has 'metamerge-zoo-2'. Build it again"
    for read in (lambda: build(small(tmp_path)), lambda: load_zoo(tmp_path / "zoo")):
        with pytest.raises(ZooError, match=told):
            read()
    with pytest.raises(Unreadable, match="has format 'metamerge-zoo-1'"):
        merge(f"{tmp_path / 'zoo'}#train-k2/0", method="average")
    assert trained == []
    assert {path.name for path in tmp_path.iterdir()} == {"zoo"}
    assert json.loads((tmp_path / "zoo" / "manifest.json").read_text()) == manifest


def test_a_link_to_another_disk_stays_a_link(tmp_path, zoo):
    (tmp_path / "disk").mkdir()
    (tmp_path / "zoo").symlink_to(tmp_path / "disk")
    build(small(tmp_path))
    assert sums(tmp_path / "zoo") == sums(zoo.folder)
    assert (tmp_path / "zoo").is_symlink()
    assert sums(tmp_path / "disk") == sums(zoo.folder)


# ------------------------------------------------------------------------------- damage on the way


@pytest.fixture
def half(builders, tmp_path):
    """The folder of a build that was killed after some shards, and their keys."""
    keys = interrupted(builders, small(tmp_path), 3)
    return unfinished(tmp_path), sorted(keys)


def journal(folder, key):
    return folder / f"shard-{key}.json"


@pytest.mark.parametrize(
    "text",
    ["", "{", "half", "null", "[]", "3", '"key"', "{}", '{"key": 3}', '{"key": null}', "\xff"],
)
def test_a_damaged_entry_is_no_shard(zoo, half, tmp_path, trained, text):
    folder, keys = half
    path = journal(folder, keys[0])
    if text == "half":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.write_text(text, encoding="latin-1")
    build(small(tmp_path))
    places = keys_of(zoo)
    assert sorted(trained) == sorted(places[key] for key in places.keys() - {*keys[1:]})
    assert sums(tmp_path / "zoo") == sums(zoo.folder)
    assert left_over(tmp_path) == set()


def test_an_entry_without_its_files_is_no_shard(zoo, half, tmp_path, trained):
    folder, keys = half
    path = journal(folder, keys[0])
    entry = json.loads(path.read_text())
    path.write_text(json.dumps({name: entry[name] for name in ("key", "families", "members")}))
    build(small(tmp_path))
    assert keys_of(zoo)[keys[0]] in trained
    assert sums(tmp_path / "zoo") == sums(zoo.folder)


@pytest.mark.parametrize("kind", ["weights", "records"])
@pytest.mark.parametrize("how", ["flipped", "shortened", "deleted"])
def test_a_shard_that_was_damaged_meanwhile_is_trained_anew(
    zoo, half, tmp_path, trained, kind, how
):
    folder, keys = half
    path = folder / json.loads(journal(folder, keys[0]).read_text())[kind]["file"]
    if how == "flipped":
        flip(path)
    elif how == "shortened":
        os.truncate(path, path.stat().st_size - 1)
    else:
        path.unlink()
    build(small(tmp_path))
    places = keys_of(zoo)
    assert sorted(trained) == sorted(places[key] for key in places.keys() - {*keys[1:]})
    assert sums(tmp_path / "zoo") == sums(zoo.folder)


def test_files_that_were_never_finished_do_not_come_along(zoo, half, tmp_path):
    folder, _ = half
    for name in (".unfinished-0123456789abcdef", ".unfinished-x", "weights-0.safetensors"):
        (folder / name).write_bytes(b"half")
    build(small(tmp_path))
    assert sums(tmp_path / "zoo") == sums(zoo.folder)
    assert left_over(tmp_path) == set()


def test_a_shard_that_was_damaged_after_a_kill_in_the_last_step_is_trained_anew(
    zoo, own, tmp_path, trained
):
    """All shards and the manifest are in the hidden folder, which was not renamed any more."""
    hidden = Building(tmp_path / "zoo", small(tmp_path).digest).folder
    os.rename(own.folder, hidden)
    place = ("train", 3, 1)
    flip(hidden / shard_of(zoo, place)["weights"]["file"])
    found = build(small(tmp_path))
    assert trained == [place]
    assert found.families("train", 3)["1.weight"].shape[:2] == (3, 3)
    assert sums(tmp_path / "zoo") == sums(zoo.folder)


def test_a_half_copied_shard_is_copied_again_where_there_are_no_links(
    own, tmp_path, monkeypatch, trained
):
    """A growing zoo takes its old shards along; the copy of one was interrupted by a kill."""

    def no_links(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    options = small(tmp_path, test_families=3)
    hidden = Building(tmp_path / "zoo", options.digest).folder
    hidden.mkdir()
    name = shard_of(own, ("train", 3, 1))["weights"]["file"]
    (hidden / name).write_bytes((own.folder / name).read_bytes()[:100])
    grown = build(options)
    assert trained == [("test", 2, 2), ("test", 3, 2)]
    assert grown.families("train", 3)["1.weight"].shape[:2] == (3, 3)
    assert grown.families("test", 3)["1.weight"].shape[:2] == (3, 3)


def test_what_an_older_build_left_is_cleared_away_by_the_next(own, tmp_path, trained):
    """A kill between the last two steps leaves the older zoo under the hidden name."""
    shutil.copytree(own.folder, Building(own.folder, small(tmp_path).digest).folder)
    build(small(tmp_path))
    assert trained == []
    assert left_over(tmp_path) == set()
