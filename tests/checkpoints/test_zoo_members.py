"""Members of a zoo: the part that is asked for, checked against the manifest."""

import hashlib
import json
import os

import pytest
import torch
from safetensors.torch import save_file

from metamerge.checkpoints import read_checkpoints, zoo_members
from metamerge.errors import CheckpointError, ConfigError, TooLarge, Truncated, Unreadable

FAMILIES, MEMBERS = 3, 2
SHARDS = ((0, 1, 2), (3, 4), (5,))  # families of the group, shard by shard


def tensors_of(families):
    """Weights and records that say of every number which family and member it belongs to."""
    place = torch.tensor([[10 * f + k for k in range(MEMBERS)] for f in families])  # [f, m]
    weights = {
        "w": (4.0 * place)[..., None, None] + torch.arange(4.0).reshape(2, 2),
        "steps": place.clone(),
    }
    records = {
        "accuracy": place / 100,
        "augmented": place > 10,
        "init_seed": place + 2**60,
        "losses": place[..., None] * torch.ones(3),  # a curve, which is no provenance
        "rows_per_class": torch.stack([place, place + 1], -1),
    }
    return {"weights": weights, "records": records}


def entry(folder, name):
    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    return {"file": name, "sha256": digest}


def write_shard(folder, place, families):
    shard = {"families": len(families)}
    for kind, tensors in tensors_of(families).items():
        save_file(tensors, folder / f"{kind}-{place}.safetensors")
        shard[kind] = entry(folder, f"{kind}-{place}.safetensors")
    return shard


def write_manifest(folder, group, **changes):
    files = {path.name: entry(folder, path.name) for path in folder.glob("*.safetensors")}
    manifest = {
        "format": "metamerge-zoo-2",
        "program": {"nodes": []},
        "groups": {"test-k2": group},
        "files": {name: {"sha256": told["sha256"]} for name, told in files.items()},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))


@pytest.fixture
def group(tmp_path):
    """Six families of two members in three shards, and what the manifest says of them."""
    shards = [write_shard(tmp_path, place, families) for place, families in enumerate(SHARDS)]
    group = {"part": "test", "families": 6, "members": MEMBERS, "shards": shards}
    write_manifest(tmp_path, group)
    return group


@pytest.fixture
def zoo(group, tmp_path):
    return tmp_path


def flip(path, place=-1):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


# ------------------------------------------------------------------------------- what is read


def test_a_family_gives_all_its_members_in_order(zoo):
    members = read_checkpoints(f"{zoo}#test-k2/1")
    assert [member.name for member in members] == [f"{zoo}#test-k2/1/{k}" for k in range(MEMBERS)]
    assert [member.weights["steps"].item() for member in members] == [10, 11]
    assert members[1].weights["w"].tolist() == [[44.0, 45.0], [46.0, 47.0]]
    assert all(member.program == {"nodes": []} and member.verified for member in members)


@pytest.mark.parametrize("family", range(6))
@pytest.mark.parametrize("member", range(MEMBERS))
def test_every_member_is_found_in_whatever_shard_it_lies(zoo, family, member):
    (found,) = read_checkpoints(f"{zoo}#test-k2/{family}/{member}")
    assert found.name.endswith(f"#test-k2/{family}/{member}")
    assert found.weights["steps"] == 10 * family + member
    assert found.metadata["init_seed"] == 10 * family + member + 2**60


def test_a_zoo_without_a_family_is_refused_with_addresses_that_can_be_read(zoo):
    told = r"is a zoo. Address a family as .*#<group>/<family>, with <group> one of \['test-k2'\]"
    with pytest.raises(Unreadable, match=told):
        read_checkpoints(zoo)
    assert len(read_checkpoints(f"{zoo}#test-k2/0")) == MEMBERS


def test_what_is_recorded_of_a_member_is_its_metadata(zoo):
    (member,) = read_checkpoints(f"{zoo}#test-k2/3/1")
    assert member.metadata == {
        "accuracy": pytest.approx(0.31, abs=2**-26),  # float32, relative precision 2**-24
        "augmented": True,
        "init_seed": 2**60 + 31,
        "rows_per_class": [31, 32],
    }
    assert json.loads(json.dumps(member.metadata)) == member.metadata


def test_what_is_not_known_of_a_member_is_none(zoo, group):
    path = zoo / "records-0.safetensors"
    save_file({"accuracy": torch.tensor([[0.5, torch.nan]] * 3)}, path)
    write_manifest(zoo, group)
    told = [member.metadata for member in read_checkpoints(f"{zoo}#test-k2/2")]
    assert told == [{"accuracy": 0.5}, {"accuracy": None}]


def test_members_share_no_memory(zoo):
    first, second = read_checkpoints(f"{zoo}#test-k2/0")
    first.weights["w"].fill_(-1)
    assert second.weights["w"].tolist() == [[4.0, 5.0], [6.0, 7.0]]


def test_only_the_shard_that_is_asked_for_is_opened(zoo):
    for kind in ("weights", "records"):
        (zoo / f"{kind}-0.safetensors").unlink()
        flip(zoo / f"{kind}-2.safetensors")
    assert read_checkpoints(f"{zoo}#test-k2/4/0")[0].verified


def test_the_limit_counts_only_what_is_read(zoo):
    """A member holds four float32 and one int64: 24 bytes."""
    assert len(read_checkpoints(f"{zoo}#test-k2/0/0", max_bytes=24)) == 1
    assert len(read_checkpoints(f"{zoo}#test-k2/5", max_bytes=48)) == 2
    with pytest.raises(TooLarge, match="24 bytes"):
        read_checkpoints(f"{zoo}#test-k2/0/0", max_bytes=23)
    with pytest.raises(TooLarge, match="48 bytes"):
        read_checkpoints(f"{zoo}#test-k2/0", max_bytes=47)


def test_a_large_file_is_read_without_its_checksum(zoo, group, monkeypatch):
    monkeypatch.setattr(zoo_members, "VERIFY_BELOW_BYTES", 1)
    wrong = {f"{kind}-0.safetensors": {"sha256": "0" * 64} for kind in ("weights", "records")}
    write_manifest(zoo, group, files=wrong)
    assert read_checkpoints(f"{zoo}#test-k2/0/0")[0].verified is False


def test_a_file_without_a_checksum_is_not_called_verified(zoo, group):
    write_manifest(zoo, group, files={})
    assert read_checkpoints(f"{zoo}#test-k2/0/0")[0].verified is False


# ------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("address", "match"),
    [
        ("6", r"family 6 does not exist, there are 6 families, numbered from 0 to 5"),
        ("0/2", "member 2 does not exist, there are 2 members, numbered from 0 to 1"),
        ("999999999/0", "family 999999999 does not exist"),
    ],
)
def test_an_index_out_of_range_says_how_many_there_are(zoo, address, match):
    with pytest.raises(ConfigError, match=match):
        read_checkpoints(f"{zoo}#test-k2/{address}")


@pytest.mark.parametrize("address", ["-1", "x", "1.0", "", "0/-1", "0/", "²", "٣", "9" * 30])
def test_an_index_that_is_no_number_is_refused(zoo, address):
    with pytest.raises(ConfigError, match="numbers from 0 on"):
        read_checkpoints(f"{zoo}#test-k2/{address}")


@pytest.mark.parametrize("rest", ["", "test-k2", "test-k2/0/0/0", "/0"])
def test_an_address_of_another_form_is_refused(zoo, rest):
    with pytest.raises(ConfigError, match="expected <zoo folder>#<group>/<family>"):
        read_checkpoints(f"{zoo}#{rest}")


@pytest.mark.parametrize("name", ["train", "test-k02", "test-k2.safetensors", "..", "shards"])
def test_an_unknown_group_says_which_there_are(zoo, name):
    with pytest.raises(ConfigError, match=rf"no group '{name}'; it has \['test-k2'\]"):
        read_checkpoints(f"{zoo}#{name}/0")


def test_a_folder_that_is_no_zoo_is_unreadable(tmp_path):
    with pytest.raises(Unreadable, match="is not a zoo"):
        read_checkpoints(f"{tmp_path}#test-k2/0")


def test_a_whole_zoo_and_a_file_of_it_ask_for_an_address(zoo):
    for source in (zoo, zoo / "weights-0.safetensors"):
        with pytest.raises(Unreadable, match=r"#.*<family>"):
            read_checkpoints(source)


@pytest.mark.parametrize("version", ["1", "3"])
def test_a_zoo_of_another_version_is_refused_and_says_which_are_known(zoo, group, version):
    write_manifest(zoo, group, format=f"metamerge-zoo-{version}")
    told = f"format 'metamerge-zoo-{version}'.*'metamerge-zoo-2'.*with this version"
    with pytest.raises(Unreadable, match=told):
        read_checkpoints(f"{zoo}#test-k2/0")


# ------------------------------------------------------------------------------- damaged files


@pytest.mark.parametrize("kind", ["weights", "records"])
@pytest.mark.parametrize("place", [8, -1], ids=["header", "content"])
def test_a_flipped_bit_contradicts_the_manifest(zoo, kind, place):
    flip(zoo / f"{kind}-1.safetensors", place)
    with pytest.raises(Unreadable, match=rf"{kind}-1\.safetensors: has sha256"):
        read_checkpoints(f"{zoo}#test-k2/3/0")


@pytest.mark.parametrize("kind", ["weights", "records"])
def test_a_missing_file_is_named(zoo, kind):
    (zoo / f"{kind}-1.safetensors").unlink()
    with pytest.raises(Unreadable, match=rf"{kind}-1\.safetensors: cannot be opened"):
        read_checkpoints(f"{zoo}#test-k2/3/0")


@pytest.mark.timeout(10)
@pytest.mark.parametrize("kind", ["weights", "records"])
def test_a_pipe_instead_of_a_file_is_not_waited_for(zoo, kind):
    (zoo / f"{kind}-1.safetensors").unlink()
    os.mkfifo(zoo / f"{kind}-1.safetensors")
    with pytest.raises(Unreadable, match="not a file"):
        read_checkpoints(f"{zoo}#test-k2/3/0")


@pytest.mark.parametrize("kind", ["weights", "records"])
def test_a_file_that_was_shortened_before_its_checksum_was_taken_is_truncated(zoo, group, kind):
    path = zoo / f"{kind}-1.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    write_manifest(zoo, group)
    with pytest.raises(Truncated, match=path.name):
        read_checkpoints(f"{zoo}#test-k2/3/0")


@pytest.mark.parametrize("kind", ["weights", "records"])
def test_a_file_without_tensors_is_unreadable(zoo, group, kind):
    path = zoo / f"{kind}-1.safetensors"
    path.write_text("no tensors")
    write_manifest(zoo, group)
    with pytest.raises(CheckpointError, match=path.name):
        read_checkpoints(f"{zoo}#test-k2/3/0")


@pytest.mark.parametrize("kind", ["weights", "records"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (3, 2), (2,), ()], ids=str)
def test_a_tensor_that_has_no_room_for_all_members_is_unreadable(zoo, group, kind, shape):
    """Its shard holds two families of two members."""
    path = zoo / f"{kind}-1.safetensors"
    tensors = tensors_of(SHARDS[1])[kind]
    name = "w" if kind == "weights" else "rows_per_class"
    save_file(tensors | {name: torch.zeros(shape)}, path)
    write_manifest(zoo, group)
    with pytest.raises(Unreadable, match=rf"{path.name}.*'{name}' has shape"):
        read_checkpoints(f"{zoo}#test-k2/4/1")


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 2), (3, 2)], ids=str)
def test_a_record_of_other_members_is_never_told(zoo, group, shape):
    path = zoo / "records-1.safetensors"
    save_file({"accuracy": torch.zeros(shape), "other": torch.ones(2, 2)}, path)
    write_manifest(zoo, group)
    with pytest.raises(Unreadable, match=rf"{path.name}.*'accuracy' has shape"):
        read_checkpoints(f"{zoo}#test-k2/4/1")


# ------------------------------------------------------------------------------- manifests that lie

COUNTS = [0, -1, "3", None, 2.0, True, [], 10**30]


@pytest.mark.parametrize("value", [*COUNTS, 7], ids=str)
def test_members_that_contradict_the_file_are_unreadable(zoo, group, value):
    write_manifest(zoo, group | {"members": value})
    with pytest.raises(Unreadable, match=r"test-k2|weights-0.safetensors"):
        read_checkpoints(f"{zoo}#test-k2/0/0")


@pytest.mark.parametrize("value", [*COUNTS, 1, 4], ids=str)
def test_families_of_a_shard_that_contradict_its_file_are_unreadable(zoo, group, value):
    group["shards"][0]["families"] = value
    write_manifest(zoo, group)
    with pytest.raises(Unreadable, match=r"test-k2|weights-0.safetensors"):
        read_checkpoints(f"{zoo}#test-k2/0/0")


@pytest.mark.parametrize("value", [7, "7", None, {}], ids=str)
def test_families_are_counted_in_shards_whatever_the_group_claims(zoo, group, value):
    write_manifest(zoo, group | {"families": value})
    assert read_checkpoints(f"{zoo}#test-k2/5/0")[0].weights["steps"] == 50
    with pytest.raises(ConfigError, match="family 6 does not exist, there are 6 families"):
        read_checkpoints(f"{zoo}#test-k2/6")


@pytest.mark.parametrize("kind", ["weights", "records"])
@pytest.mark.parametrize(
    "name",
    [
        *("../outside.safetensors", "/etc/passwd", "sub/weights-0.safetensors"),
        *("..", "", "./weights-0.safetensors", "weights-0.safetensors/", "nul\0byte"),
        *(7, None, ["weights-0.safetensors"], {}, True),
    ],
    ids=repr,
)
def test_a_file_outside_of_the_zoo_is_never_opened(zoo, group, kind, name):
    (zoo / "sub").mkdir()
    for place in (zoo.parent / "outside.safetensors", zoo / "sub" / "weights-0.safetensors"):
        place.write_bytes((zoo / f"{kind}-0.safetensors").read_bytes())
    group["shards"][0][kind]["file"] = name
    write_manifest(zoo, group, files={})
    with pytest.raises(Unreadable, match=r"names .* as|not a file|cannot be opened"):
        read_checkpoints(f"{zoo}#test-k2/0")


@pytest.mark.parametrize("kind", ["weights", "records"])
@pytest.mark.parametrize("value", [None, 7, "x", [], {"file": None}], ids=str)
def test_a_shard_without_a_file_of_a_kind_is_unreadable(zoo, group, kind, value):
    group["shards"][0][kind] = value
    write_manifest(zoo, group, files={})
    with pytest.raises(Unreadable, match=rf"as {kind} of a shard, expected a file name"):
        read_checkpoints(f"{zoo}#test-k2/0")


@pytest.mark.parametrize("kind", ["weights", "records"])
def test_missing_weights_and_missing_records_are_unreadable(zoo, group, kind):
    del group["shards"][0][kind]
    write_manifest(zoo, group)
    with pytest.raises(Unreadable, match=f"'None' as {kind} of a shard"):
        read_checkpoints(f"{zoo}#test-k2/0")


@pytest.mark.parametrize("value", [None, 0, "x", True, [], [1], {}, {"members": 2}], ids=str)
def test_a_group_that_is_none_is_unreadable(zoo, value):
    write_manifest(zoo, value)
    with pytest.raises(Unreadable, match="describes group 'test-k2'"):
        read_checkpoints(f"{zoo}#test-k2/0")


@pytest.mark.parametrize("value", [None, 3, "x", True, {}, [None], [3], ["x"], [[]]], ids=str)
def test_shards_that_are_none_are_unreadable(zoo, group, value):
    write_manifest(zoo, {"members": MEMBERS, "shards": value})
    with pytest.raises(Unreadable, match="describes group 'test-k2'"):
        read_checkpoints(f"{zoo}#test-k2/0")


@pytest.mark.parametrize(
    "changes",
    [
        *({"groups": value} for value in (None, [], "x", 3)),
        *({"files": value} for value in (None, [], "x", {"weights-0.safetensors": "0"})),
        *({"program": value} for value in ([], "x", 3)),
        *({"metadata": value} for value in (None, [], "x")),
    ],
    ids=str,
)
def test_a_manifest_of_other_types_is_unreadable(zoo, group, changes):
    write_manifest(zoo, group, **changes)
    with pytest.raises(Unreadable, match=f"'{next(iter(changes))}' must"):
        read_checkpoints(f"{zoo}#test-k2/0")


@pytest.mark.parametrize("value", [None, 3, [], {}, "0" * 64], ids=str)
def test_a_checksum_that_is_none_contradicts_every_file(zoo, group, value):
    write_manifest(zoo, group, files={"weights-0.safetensors": {"sha256": value}})
    with pytest.raises(Unreadable, match="sha256"):
        read_checkpoints(f"{zoo}#test-k2/0")


@pytest.mark.parametrize("value", [None, 3, "x", [], ["metamerge-zoo-2"]], ids=str)
def test_a_format_of_somebody_else_is_no_zoo(zoo, group, value):
    write_manifest(zoo, group, format=value)
    with pytest.raises(Unreadable, match="is not a zoo"):
        read_checkpoints(f"{zoo}#test-k2/0")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1, "format": 2}', "\xff"])
def test_a_manifest_that_is_no_json_object_is_unreadable(zoo, text):
    (zoo / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(Unreadable, match=r"manifest\.json"):
        read_checkpoints(f"{zoo}#test-k2/0")
