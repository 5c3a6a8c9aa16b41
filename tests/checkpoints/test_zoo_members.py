"""Members of a zoo: the part that is asked for, checked against the manifest."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import save_file

from metamerge.checkpoints import read_checkpoints, zoo_members
from metamerge.errors import ConfigError, TooLarge, Truncated, Unreadable

FAMILIES, MEMBERS = 3, 2


def write_manifest(folder, **changes):
    content = (folder / "test-k2.safetensors").read_bytes()
    entry = {
        "sha256": hashlib.sha256(content).hexdigest(),
        "families": FAMILIES,
        "members": MEMBERS,
        "provenance": [[{"seed": 10 * f + k} for k in range(MEMBERS)] for f in range(FAMILIES)],
    }
    manifest = {
        "format": "metamerge-zoo-1",
        "program": {"nodes": []},
        "files": {"test-k2.safetensors": entry | changes},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def zoo(tmp_path):
    tensors = {
        "w": torch.arange(FAMILIES * MEMBERS * 4.0).reshape(FAMILIES, MEMBERS, 2, 2),
        "steps": torch.arange(FAMILIES * MEMBERS).reshape(FAMILIES, MEMBERS),
    }
    save_file(tensors, tmp_path / "test-k2.safetensors")
    write_manifest(tmp_path)
    return tmp_path


def test_a_family_gives_all_its_members_in_order(zoo):
    members = read_checkpoints(f"{zoo}#test-k2/1")
    assert [member.name for member in members] == [f"{zoo}#test-k2/1/{k}" for k in range(MEMBERS)]
    assert [member.weights["steps"].item() for member in members] == [2, 3]
    assert members[1].weights["w"].tolist() == [[12.0, 13.0], [14.0, 15.0]]
    assert [member.metadata for member in members] == [{"seed": 10}, {"seed": 11}]
    assert all(member.program == {"nodes": []} and member.verified for member in members)


def test_a_member_is_read_alone(zoo):
    (member,) = read_checkpoints(f"{zoo}#test-k2/2/0")
    assert member.name.endswith("#test-k2/2/0")
    assert member.weights["steps"] == 4


def test_members_share_no_memory(zoo):
    first, second = read_checkpoints(f"{zoo}#test-k2/0")
    first.weights["w"].fill_(-1)
    assert second.weights["w"].tolist() == [[4.0, 5.0], [6.0, 7.0]]


@pytest.mark.parametrize(
    ("address", "match"),
    [
        ("3", "family 3 does not exist, there are 3 families"),
        ("0/2", "member 2 does not exist, there are 2 members"),
        ("999999999/0", "family 999999999 does not exist"),
    ],
)
def test_an_index_out_of_range_says_how_many_there_are(zoo, address, match):
    with pytest.raises(ConfigError, match=match):
        read_checkpoints(f"{zoo}#test-k2/{address}")


@pytest.mark.parametrize("address", ["-1", "x", "1.0", "", "0/-1", "0/", "²", "9" * 30])
def test_an_index_that_is_no_number_is_refused(zoo, address):
    with pytest.raises(ConfigError, match="numbers from 0 on"):
        read_checkpoints(f"{zoo}#test-k2/{address}")


@pytest.mark.parametrize("rest", ["", "test-k2", "test-k2/0/0/0", "/0"])
def test_an_address_of_another_form_is_refused(zoo, rest):
    with pytest.raises(ConfigError, match="expected <zoo folder>#<file>/<family>"):
        read_checkpoints(f"{zoo}#{rest}")


def test_an_unknown_file_says_which_there_are(zoo):
    with pytest.raises(ConfigError, match=r"no file 'train'; it has \['test-k2'\]"):
        read_checkpoints(f"{zoo}#train/0")


def test_a_folder_that_is_no_zoo_is_unreadable(tmp_path):
    with pytest.raises(Unreadable, match="is not a zoo"):
        read_checkpoints(f"{tmp_path}#test-k2/0")


def test_a_whole_zoo_and_a_file_of_it_ask_for_an_address(zoo):
    for source in (zoo, zoo / "test-k2.safetensors"):
        with pytest.raises(Unreadable, match=r"#.*<family>"):
            read_checkpoints(source)


def test_a_flipped_bit_contradicts_the_manifest(zoo):
    path = zoo / "test-k2.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(Unreadable, match="sha256"):
        read_checkpoints(f"{zoo}#test-k2/0/0")


def test_a_large_file_is_read_without_its_checksum(zoo, monkeypatch):
    monkeypatch.setattr(zoo_members, "VERIFY_BELOW_BYTES", 1)
    write_manifest(zoo, sha256="0" * 64)
    assert read_checkpoints(f"{zoo}#test-k2/0/0")[0].verified is False


@pytest.mark.parametrize("field", ["families", "members"])
@pytest.mark.parametrize("value", [0, -1, "3", None, 2.0, True, 7])
def test_counts_that_contradict_the_file_are_unreadable(zoo, field, value):
    write_manifest(zoo, **{field: value})
    with pytest.raises(Unreadable, match="test-k2"):
        read_checkpoints(f"{zoo}#test-k2/0/0")


@pytest.mark.parametrize("provenance", [None, [], [[]], {}, [[7, 7]], "abc"])
def test_missing_provenance_gives_empty_metadata(zoo, provenance):
    write_manifest(zoo, provenance=provenance)
    assert read_checkpoints(f"{zoo}#test-k2/0/0")[0].metadata == {}


def test_a_shortened_file_is_truncated(zoo):
    path = zoo / "test-k2.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    write_manifest(zoo)
    with pytest.raises(Truncated):
        read_checkpoints(f"{zoo}#test-k2/0/0")


def test_the_limit_counts_only_what_is_read(zoo):
    assert len(read_checkpoints(f"{zoo}#test-k2/0/0", max_bytes=24)) == 1
    with pytest.raises(TooLarge, match="48 bytes"):
        read_checkpoints(f"{zoo}#test-k2/0", max_bytes=24)
