"""A zoo on disk: what was written is read, shards as one, and damage is told."""

import json
import os
import shutil
import stat
import time
from functools import cache

import pytest
import torch

from metamerge import merge
from metamerge.errors import Unreadable, ZooError
from zoo import architectures
from zoo.store import FORMAT, SEGMENT, Zoo, files_of, group_name, load_zoo
from zoo.writing import Building

MEMBERS = 2
SHARDS = (2, 1, 3)  # families per shard
FAMILIES = sum(SHARDS)
LONGEST = (4, 6, 3)  # rows of the largest segment, and epochs, per shard


def network():
    return architectures.build("mlp", (1, 2, 2), 2, widths=(3,))


@cache
def program():
    return architectures.program_of(network(), (1, 2, 2)).to_json()


def shard(place, seed):
    """Random networks 4-3-2 and where they come from."""
    generator = torch.Generator().manual_seed(100 * seed + place)
    families, longest = SHARDS[place], LONGEST[place]
    weights = {
        key: torch.randn(families, MEMBERS, *t.shape, generator=generator)
        for key, t in network().state_dict().items()
    }
    records = {
        "init_seed": torch.randint(2**61, (families, MEMBERS), generator=generator),
        "validation_accuracy": torch.rand(families, MEMBERS, generator=generator),
        "augmented": torch.rand(families, MEMBERS, generator=generator) < 0.5,
        "rows_per_class": torch.randint(9, (families, MEMBERS, 2), generator=generator),
        "losses": torch.rand(families, MEMBERS, longest, generator=generator),
        SEGMENT: torch.randint(50, (families, MEMBERS, longest), generator=generator).int(),
    }
    snapshots = {k: torch.stack([t / 2, t], 2) for k, t in weights.items()}
    return {"weights": weights, "records": records, "snapshots": snapshots}


def write(folder, seed=0, kinds=("weights", "records", "snapshots"), groups=("test",)):
    """A zoo, and the tensors of its shards."""
    building = Building(folder, f"{seed:016x}")
    building.open()
    told, tensors = {}, []
    for part in groups:
        entries = []
        for place in range(len(SHARDS)):
            tensors.append({kind: shard(place, seed)[kind] for kind in kinds})
            building.add(f"{part}{place}", tensors[-1], members=MEMBERS)
            entries.append(f"{part}{place}")
        told[group_name(part, MEMBERS)] = entries
    manifest = {
        "digest": f"{seed:016x}",
        "options": {"members": (MEMBERS,), "seed": seed},  # a tuple, which JSON does not know
        "task": {"name": "digits"},
        "program": program(),
        "source": None,
    }
    return building.finish(told, manifest), tensors[: len(SHARDS)]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write(tmp_path_factory.mktemp("original") / "zoo")


@pytest.fixture
def zoo(original, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(original[0].folder, tmp_path / "zoo")
    return load_zoo(tmp_path / "zoo")


@pytest.fixture
def shards(original):
    return original[1]


def content(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def file_of(zoo, kind, place=1):
    return zoo.folder / zoo.group("test", MEMBERS)["shards"][place][kind]["file"]


# ------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("kind", ["weights", "records", "snapshots"])
def test_shards_are_read_as_one_in_their_order(zoo, shards, kind):
    read = {"weights": Zoo.families, "records": Zoo.records, "snapshots": Zoo.snapshots}[kind]
    found = read(load_zoo(str(zoo.folder)), "test", MEMBERS)
    assert found.keys() == shards[0][kind].keys()
    for key, tensor in found.items():
        assert len(tensor) == FAMILIES
        assert tensor.dtype == shards[0][kind][key].dtype
        pieces = tensor.split(SHARDS)
        for piece, own in zip(pieces, (s[kind][key] for s in shards), strict=True):
            assert torch.equal(piece[tuple(map(slice, own.shape))], own)


def test_shorter_segments_and_curves_are_padded(zoo):
    rows, losses = zoo.rows("test", MEMBERS), zoo.records("test", MEMBERS)["losses"]
    assert rows.shape == losses.shape == (FAMILIES, MEMBERS, max(LONGEST))
    assert rows.dtype == torch.int32
    families = torch.tensor(LONGEST).repeat_interleave(torch.tensor(SHARDS))
    beyond = torch.arange(max(LONGEST)) >= families[:, None, None]  # [f, 1, longest]
    assert torch.equal(rows == -1, beyond.expand_as(rows))
    assert torch.equal(losses.isnan(), beyond.expand_as(losses))


def test_tensors_have_the_same_order_whenever_they_are_read(zoo):
    """Sums over keys come out the same to the last bit, so trainings can be repeated."""
    orders = {
        tuple(read(load_zoo(zoo.folder), "test", MEMBERS))
        for read in (Zoo.families, Zoo.snapshots)
        for _ in range(8)
    }
    assert len(orders) == 1  # four keys by chance sixteen times: 24**-15


def test_provenance_tells_of_every_member_what_is_a_number(zoo, shards):
    told = zoo.provenance("test", MEMBERS)
    assert [len(family) for family in told] == [MEMBERS] * FAMILIES
    assert json.loads(json.dumps(told)) == told
    names = {"init_seed", "validation_accuracy", "augmented", "rows_per_class"}
    assert {frozenset(member) for family in told for member in family} == {frozenset(names)}
    last = shards[-1]["records"]
    assert told[-1][1] == {name: last[name][-1, 1].tolist() for name in names}


def test_an_address_leads_to_the_family(zoo):
    for family in (0, 2, FAMILIES - 1):
        address = zoo.address("test", MEMBERS, family)
        assert address == f"{zoo.folder}#test-k2/{family}"
        merged = merge(address, method="average", align=None)
        assert merged.report["verified"] == [True] * MEMBERS
        for key, tensor in zoo.families("test", MEMBERS).items():
            expected = tensor[family].double().mean(0).float()
            # the mean of two float32 numbers takes one rounding of the sum, which halving keeps
            torch.testing.assert_close(merged.weights[key], expected, rtol=2**-23, atol=2**-24)


def test_a_zoo_says_what_is_in_it(tmp_path):
    zoo, _ = write(tmp_path / "zoo", seed=3, groups=("train", "test"))
    assert zoo.digest == f"{3:016x}"
    assert zoo.options == {"members": [MEMBERS], "seed": 3}
    assert zoo.sizes == (MEMBERS,)
    assert zoo.groups.keys() == {"train-k2", "test-k2"}
    group = zoo.group("train", MEMBERS)
    assert (group["part"], group["members"], group["families"]) == ("train", MEMBERS, FAMILIES)
    assert [shard["families"] for shard in group["shards"]] == list(SHARDS)


def test_equal_shards_of_two_groups_share_their_files(tmp_path):
    zoo, _ = write(tmp_path / "zoo", groups=("train", "test"))
    listed = [entry["file"] for entry in files_of(zoo.groups)]
    assert len(listed) == 2 * len(set(listed)) == 2 * 3 * len(SHARDS)
    assert content(zoo.folder).keys() == {*listed, "manifest.json"}


def test_a_zoo_that_was_just_written_is_the_zoo_that_is_read(original):
    assert original[0] == load_zoo(original[0].folder)


def test_the_layout_is_that_of_the_networks(zoo):
    layout = zoo.layout
    assert dict(layout.spec.groups) == {"1": 3}
    assert [layer.weight for layer in layout.layers] == ["1.weight", "3.weight"]


def test_an_architecture_that_nobody_told_is_not_made_up(zoo):
    unknown = Zoo(zoo.folder, {**zoo.manifest, "program": None})
    with pytest.raises(ZooError, match="architecture of these networks is not known"):
        _ = unknown.layout


def test_the_same_zoo_gives_the_same_bytes(zoo, tmp_path):
    again, _ = write(tmp_path / "again")
    assert content(again.folder) == content(zoo.folder)


def test_nothing_in_a_zoo_is_pickled(zoo):
    assert len(content(zoo.folder)) == 1 + 3 * len(SHARDS)
    for name, data in content(zoo.folder).items():
        start = data if name.endswith(".json") else data[8 : 8 + int.from_bytes(data[:8], "little")]
        assert isinstance(json.loads(start), dict)


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    before = os.umask(0o027)
    try:
        zoo, _ = write(tmp_path / "zoo")
    finally:
        os.umask(before)
    assert stat.S_IMODE(zoo.folder.stat().st_mode) == 0o750
    assert {stat.S_IMODE(path.stat().st_mode) for path in zoo.folder.iterdir()} == {0o640}


def test_without_snapshots_there_are_none(tmp_path):
    zoo, _ = write(tmp_path / "zoo", kinds=("weights", "records"))
    assert zoo.snapshots("test", MEMBERS) == {}
    assert not list(zoo.folder.glob("snapshots-*"))


def test_rows_that_nobody_recorded_are_not_made_up(tmp_path):
    zoo, _ = write(tmp_path / "zoo", kinds=("weights",))
    assert zoo.records("test", MEMBERS) == {}
    with pytest.raises(ZooError, match="nobody recorded which rows"):
        zoo.rows("test", MEMBERS)


# ------------------------------------------------------------------------------- damage

READS = {"weights": Zoo.families, "records": Zoo.records, "snapshots": Zoo.snapshots}


@pytest.mark.parametrize("kind", READS)
@pytest.mark.parametrize("how", ["bit", "end", "more", "empty"])
def test_a_damaged_file_is_refused_with_its_name_and_a_way_out(zoo, kind, how):
    path = file_of(zoo, kind)
    data = bytearray(path.read_bytes())
    if how == "bit":
        data[-3] ^= 1
    path.write_bytes({"end": data[:-10], "more": data + b"\0", "empty": b""}.get(how, data))
    with pytest.raises(ZooError, match=rf"{path.name}: sha256 is .*Build the zoo again"):
        READS[kind](load_zoo(zoo.folder), "test", MEMBERS)


@pytest.mark.parametrize("kind", READS)
def test_a_missing_file_is_named(zoo, kind):
    file_of(zoo, kind).unlink()
    with pytest.raises(ZooError, match=rf"{kind}-\w+\.safetensors: cannot be read \(No such file"):
        READS[kind](load_zoo(zoo.folder), "test", MEMBERS)


@pytest.mark.parametrize("kind", ["weights", "records"])
def test_a_damaged_file_is_refused_by_address_too(zoo, kind):
    path = file_of(zoo, kind)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    address = zoo.address("test", MEMBERS, 2)  # the family of the second shard
    with pytest.raises(Unreadable, match=rf"{path.name}: has sha256"):
        merge(address, method="average", align=None)
    merge(zoo.address("test", MEMBERS, 3), method="average", align=None)  # the others are whole


def test_a_file_of_somebody_else_is_refused(zoo):
    shards = zoo.group("test", MEMBERS)["shards"]
    path = zoo.folder / shards[0]["weights"]["file"]
    path.write_bytes((zoo.folder / shards[1]["weights"]["file"]).read_bytes())
    with pytest.raises(ZooError, match=rf"{path.name}: sha256"):
        zoo.families("test", MEMBERS)


@pytest.mark.parametrize("read", [*READS.values(), Zoo.rows, Zoo.provenance, Zoo.group])
def test_families_that_were_not_built_are_refused_with_those_that_were(zoo, read):
    with pytest.raises(ZooError, match=r"no families 'train-k8'; there are \['test-k2'\]"):
        read(zoo, "train", 8)


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "{",
        "[]",
        "null",
        "\N{SNOWMAN}",
        json.dumps({"format": "other-1"}),
        json.dumps({"format": ["metamerge-zoo-2"]}),
        json.dumps({"format": FORMAT, "digest": "0"}),
    ],
    ids=["missing", "empty", "cut off", "list", "null", "no JSON", "foreign", "odd", "incomplete"],
)
def test_a_folder_without_a_whole_manifest_is_no_zoo(zoo, text):
    manifest = zoo.folder / "manifest.json"
    manifest.unlink()
    if text is not None:
        manifest.write_text(text)
    with pytest.raises(ZooError, match=rf"no zoo here.*zoo\.build --out {zoo.folder}"):
        load_zoo(zoo.folder)


def test_a_manifest_that_is_not_even_text_is_no_zoo(zoo):
    (zoo.folder / "manifest.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ZooError, match="no zoo here"):
        load_zoo(zoo.folder)


@pytest.mark.parametrize("version", ["1", "3"])
def test_a_zoo_of_another_format_says_so(zoo, version):
    manifest = {"format": f"metamerge-zoo-{version}", "files": {}}
    (zoo.folder / "manifest.json").write_text(json.dumps(manifest))
    told = f"is a zoo of format 'metamerge-zoo-{version}', this version has '{FORMAT}'"
    with pytest.raises(ZooError, match=told):
        load_zoo(zoo.folder)


# ------------------------------------------------------------------------------- writing


def test_a_zoo_replaces_an_older_one(zoo):
    write(zoo.folder, seed=1)
    assert load_zoo(zoo.folder).options["seed"] == 1
    assert [path.name for path in zoo.folder.parent.iterdir()] == ["zoo"]


def test_an_empty_folder_is_written_to(tmp_path):
    (tmp_path / "zoo").mkdir()
    write(tmp_path / "zoo")
    assert load_zoo(tmp_path / "zoo").sizes == (MEMBERS,)
    assert [path.name for path in tmp_path.iterdir()] == ["zoo"]


@pytest.mark.parametrize("failing", ["exchange", "write_json", "sync"])
def test_a_last_step_that_fails_leaves_the_old_zoo_and_keeps_the_shards(zoo, monkeypatch, failing):
    def full(*_):
        raise OSError(28, "No space left on device")

    before = content(zoo.folder)
    building = Building(zoo.folder, "1")
    building.open()
    building.add("a", shard(0, seed=1), members=MEMBERS)
    kept = building.shards()
    groups = {"test-k2": list(kept)}
    told = {name: zoo.manifest[name] for name in ("digest", "options", "task", "program")}
    monkeypatch.setattr(f"zoo.writing.{failing}", full)
    match = r"No space left on device\)\. 1 finished shards are kept in .*\.building: make room"
    with pytest.raises(ZooError, match=match):
        building.finish(groups, told)
    assert content(zoo.folder) == before
    monkeypatch.undo()
    assert Building(zoo.folder, "1").open() == kept
    assert Building(zoo.folder, "1").finish(groups, told) == load_zoo(zoo.folder)
    assert load_zoo(zoo.folder).group("test", MEMBERS)["families"] == 2
    assert [path.name for path in zoo.folder.parent.iterdir()] == ["zoo"]


# ------------------------------------------------------------------------------- speed


def test_ten_thousand_members_are_loaded_within_two_seconds(tmp_path):
    """Networks 64-32-10 in five shards, 96 MB, checked against their checksums."""
    families, members, shards = 1250, 8, 5
    weights = {
        "1.weight": torch.rand(families // shards, members, 32, 64),
        "1.bias": torch.rand(families // shards, members, 32),
        "3.weight": torch.rand(families // shards, members, 10, 32),
        "3.bias": torch.rand(families // shards, members, 10),
    }
    building = Building(tmp_path / "zoo", "0")
    building.open()
    for place in range(shards):
        own = {key: tensor + place for key, tensor in weights.items()}
        building.add(str(place), {"weights": own}, members=members)
    told = dict.fromkeys(("options", "task", "program", "source"))
    zoo = building.finish({"train-k8": list(map(str, range(shards)))}, {"digest": "0", **told})
    assert sum(p.stat().st_size for p in zoo.folder.iterdir()) > 10_000 * (32 * 65 + 330) * 4

    seconds = []
    for _ in range(3):  # the best of three: others may use this machine, too
        start = time.perf_counter()
        found = load_zoo(zoo.folder).families("train", members)
        seconds.append(time.perf_counter() - start)
    assert found["1.weight"].shape == (families, members, 32, 64)
    assert torch.equal(found["3.bias"][-families // shards :], weights["3.bias"] + shards - 1)
    assert min(seconds) < 2
