"""A zoo on disk is there whole or not at all, and says so when it is not what was written."""

import json
import os
import stat

import pytest
import torch

from metamerge.errors import ZooError
from zoo import architectures, store
from zoo.store import FORMAT, Zoo, load_zoo, pad_rows, write_zoo

FAMILIES, MEMBERS = 3, 2


def make(seed=0):
    """Arguments of ``write_zoo`` behind the folder: random networks 4-3-2 and their rows."""
    generator = torch.Generator().manual_seed(seed)
    net = architectures.build("mlp", (1, 2, 2), 2, widths=(3,))
    weights = {
        key: torch.randn(FAMILIES, MEMBERS, *t.shape, generator=generator)
        for key, t in net.state_dict().items()
    }
    origin = [[{"init_seed": MEMBERS * f + m} for m in range(MEMBERS)] for f in range(FAMILIES)]
    rows = torch.randint(50, (FAMILIES, MEMBERS, 5), generator=generator).int()
    manifest = {
        "digest": f"{seed:016x}",
        "options": {"members": [MEMBERS], "seed": seed},
        "task": {"name": "digits"},
        "program": architectures.program_of(net, (1, 2, 2)).to_json(),
    }
    return {"test-k2": (weights, origin)}, {"test-k2": rows}, manifest


@pytest.fixture
def zoo(tmp_path):
    return write_zoo(tmp_path / "zoo", *make())


def content(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "bit":
        data[-3] ^= 1
    path.write_bytes(data[:-10] if how == "end" else data)


def test_what_was_written_is_read(zoo):
    files, rows, manifest = make()
    found = load_zoo(str(zoo.folder))
    assert found.digest == manifest["digest"]
    assert found.options == manifest["options"]
    assert found.sizes == (MEMBERS,)
    weights, origin = files["test-k2"]
    families = found.families("test", MEMBERS)
    assert families.keys() == weights.keys()
    assert all(torch.equal(families[key], weights[key]) for key in weights)
    assert found.provenance("test", MEMBERS) == origin
    assert torch.equal(found.rows("test", MEMBERS), rows["test-k2"])
    assert found.address("test", MEMBERS, 1) == f"{zoo.folder}#test-k2/1"


def test_a_zoo_that_was_just_written_is_the_zoo_that_is_read(tmp_path):
    files, rows, manifest = make()
    manifest["options"]["members"] = (MEMBERS,)  # a tuple, which JSON does not know
    written = write_zoo(tmp_path / "zoo", files, rows, manifest)
    assert written == load_zoo(tmp_path / "zoo")


def test_the_layout_is_that_of_the_networks(zoo):
    layout = zoo.layout
    assert dict(layout.spec.groups) == {"1": 3}
    assert [layer.weight for layer in layout.layers] == ["1.weight", "3.weight"]


def test_the_same_zoo_gives_the_same_bytes(zoo, tmp_path):
    again = write_zoo(tmp_path / "again", *make())
    assert content(again.folder) == content(zoo.folder)


def test_nothing_in_a_zoo_is_pickled(zoo):
    names = sorted(content(zoo.folder))
    assert names == ["manifest.json", "rows.safetensors", "test-k2.safetensors"]
    for name, data in content(zoo.folder).items():
        start = data if name.endswith(".json") else data[8 : 8 + int.from_bytes(data[:8], "little")]
        assert isinstance(json.loads(start), dict)


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    before = os.umask(0o027)
    try:
        zoo = write_zoo(tmp_path / "zoo", *make())
    finally:
        os.umask(before)
    assert stat.S_IMODE(zoo.folder.stat().st_mode) == 0o750
    assert {stat.S_IMODE(path.stat().st_mode) for path in zoo.folder.iterdir()} == {0o640}


# ------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("how", ["bit", "end"])
def test_a_damaged_file_of_families_is_refused(zoo, how):
    damage(zoo.folder / "test-k2.safetensors", how)
    with pytest.raises(ZooError, match=r"test-k2\.safetensors: sha256 .* build it again"):
        load_zoo(zoo.folder).families("test", MEMBERS)


@pytest.mark.parametrize("how", ["bit", "end"])
def test_damaged_rows_are_refused(zoo, how):
    damage(zoo.folder / "rows.safetensors", how)
    with pytest.raises(ZooError, match=r"rows\.safetensors: sha256 .* build it again"):
        load_zoo(zoo.folder).rows("test", MEMBERS)


def test_a_missing_file_is_named(zoo):
    (zoo.folder / "test-k2.safetensors").unlink()
    with pytest.raises(ZooError, match=r"test-k2\.safetensors is missing"):
        load_zoo(zoo.folder).families("test", MEMBERS)


@pytest.mark.parametrize("read", [Zoo.families, Zoo.rows, Zoo.provenance])
def test_families_that_were_not_built_are_refused_with_those_that_were(zoo, read):
    with pytest.raises(ZooError, match=r"'train-k8\.safetensors'.*'test-k2\.safetensors'"):
        read(zoo, "train", 8)


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "{",
        "[]",
        "\N{SNOWMAN}",
        json.dumps({"format": "other-1"}),
        json.dumps({"format": FORMAT, "digest": "0"}),
    ],
    ids=["missing", "empty", "cut off", "list", "no JSON", "foreign", "incomplete"],
)
def test_a_folder_without_a_whole_manifest_is_no_zoo(zoo, text):
    manifest = zoo.folder / "manifest.json"
    manifest.unlink()
    if text is not None:
        manifest.write_text(text)
    with pytest.raises(ZooError, match=rf"no zoo here.*zoo\.build --out {zoo.folder}"):
        load_zoo(zoo.folder)


# ------------------------------------------------------------------------------- writing


def test_a_zoo_replaces_an_older_one(zoo):
    write_zoo(zoo.folder, *make(1))
    assert load_zoo(zoo.folder).options["seed"] == 1
    assert [path.name for path in zoo.folder.parent.iterdir()] == ["zoo"]


def test_an_empty_folder_is_written_to(tmp_path):
    (tmp_path / "zoo").mkdir()
    write_zoo(tmp_path / "zoo", *make())
    assert load_zoo(tmp_path / "zoo").sizes == (MEMBERS,)
    assert [path.name for path in tmp_path.iterdir()] == ["zoo"]


@pytest.mark.parametrize("name", ["thesis.tex", "manifest.json"])
def test_a_folder_that_holds_something_else_is_refused_and_untouched(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ZooError, match="not empty and holds no zoo"):
        write_zoo(tmp_path, *make())
    assert content(tmp_path) == {name: b"{}"}


def test_a_file_is_refused_and_untouched(tmp_path):
    (tmp_path / "zoo").write_text("mine")
    with pytest.raises(ZooError, match="is a file"):
        write_zoo(tmp_path / "zoo", *make())
    assert (tmp_path / "zoo").read_text() == "mine"


def test_a_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ZooError, match="cannot be written"):
        write_zoo(tmp_path / "file" / "zoo", *make())


@pytest.mark.parametrize("failing", ["_write_tensors", "_write_text", "exchange"])
def test_a_write_that_fails_leaves_the_old_zoo_and_nothing_else(zoo, monkeypatch, failing):
    def full(*_):
        raise OSError(28, "No space left on device")

    before = content(zoo.folder)
    monkeypatch.setattr(store, failing, full)
    with pytest.raises(ZooError, match=r"cannot be written.*No space left"):
        write_zoo(zoo.folder, *make(1))
    assert content(zoo.folder) == before
    assert [path.name for path in zoo.folder.parent.iterdir()] == ["zoo"]


def test_rows_of_unequal_length_are_padded():
    rows = [torch.tensor(own) for own in ([3], [1, 4, 1], [5, 9], [2])]
    padded = pad_rows(rows, 2, 2)
    assert padded.dtype == torch.int32
    assert padded.tolist() == [[[3, -1, -1], [1, 4, 1]], [[5, 9, -1], [2, -1, -1]]]
