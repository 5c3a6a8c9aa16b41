import gzip
import hashlib
import os
import struct
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.datasets

from metamerge.errors import ZooError
from zoo.parts import PARTS, split_task
from zoo.tasks import idx, load_task

STEMS = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


def idx_bytes(array):
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def small_arrays(train=6, test=4, size=(3, 5)):
    rng = np.random.default_rng(0)
    arrays = []
    for rows in (train, test):
        arrays.append(rng.integers(0, 256, (rows, *size)))
        arrays.append(np.arange(rows) % 10)
    return arrays


def write_idx_folder(folder, arrays=None, names="{}-ubyte", pack=lambda content: content):
    folder.mkdir(parents=True, exist_ok=True)
    for stem, array in zip(STEMS, arrays or small_arrays(), strict=True):
        (folder / names.format(stem)).write_bytes(pack(idx_bytes(array)))
    return folder


# ---------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("names", "pack"),
    [
        ("{}-ubyte", bytes),
        ("{}-ubyte.gz", gzip.compress),
        ("{}-ubyte", gzip.compress),  # some tools keep the name when they pack
        ("{}-ubyte.gz", bytes),  # and browsers keep it when they unpack
    ],
)
def test_idx_files_are_read_raw_and_gzipped(tmp_path, names, pack):
    arrays = small_arrays()
    task = load_task("mnist", write_idx_folder(tmp_path, arrays, names, pack))
    expected = np.concatenate([arrays[0], arrays[2]])
    np.testing.assert_array_equal((task.inputs[:, 0] * 255).round().numpy(), expected)
    assert task.targets.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    assert task.test_rows == range(6, 10)
    assert task.inputs.shape == (10, 1, 3, 5)


def test_idx_files_are_found_under_their_dotted_names(tmp_path):
    write_idx_folder(tmp_path)
    for path in list(tmp_path.iterdir()):
        path.rename(tmp_path / path.name.replace("-idx", ".idx"))
    assert (tmp_path / "train-images.idx3-ubyte").is_file()
    assert len(load_task("mnist", str(tmp_path)).targets) == 10


def test_the_largest_byte_becomes_exactly_one(tmp_path):
    arrays = small_arrays()
    arrays[0][0, 0, 0], arrays[0][0, 0, 1] = 255, 0
    task = load_task("mnist", write_idx_folder(tmp_path, arrays))
    assert task.inputs[0, 0, 0, :2].tolist() == [1.0, 0.0]


WHOLE = idx_bytes(small_arrays()[0])
BROKEN = {
    "nothing": (b"", "got magic nothing"),
    "half a magic number": (WHOLE[:3], "got magic 000008"),
    "labels in place of images": (idx_bytes(np.arange(6)), "got magic 00000801"),
    "floats in place of bytes": (b"\0\0\x0d\3" + WHOLE[4:], "got magic 00000d03"),
    "a web page": (b"<!DOCTYPE html>", "Is it another file under this name"),
    "half a header": (WHOLE[:11], "ends inside its header"),
    "one byte too few": (
        WHOLE[:-1],
        r"ends early: the header claims \(6, 3, 5\), 90 bytes, got 89",
    ),
    "one byte too many": (WHOLE + b"\0", "goes on after its last row.* got 91 or more"),
    "a header without rows": (b"\0\0\x08\3" + struct.pack(">3I", 0, 3, 5), r"claims \(0, 3, 5\)"),
    "a header of terabytes": (b"\0\0\x08\3" + b"\xff" * 12 + WHOLE[16:], "the header claims"),
    "a header of gigabytes": (
        b"\0\0\x08\3" + struct.pack(">3I", 2**16, 2**8, 2**7) + WHOLE[16:],
        "ends early.* got 90",
    ),
    "half a gzip file": (gzip.compress(WHOLE, mtime=0)[:-20], "cannot be read"),
    "gzip with a wrong checksum": (
        gzip.compress(WHOLE, mtime=0)[:-8] + b"\0" * 8,
        "cannot be read",
    ),
    "gzip with damaged content": (
        gzip.compress(WHOLE, mtime=0)[:10] + b"\xff" * 40,
        "cannot be read",
    ),
    "gzip of too little": (gzip.compress(WHOLE[:-1], mtime=0), "ends early"),
    "gzip of too much": (
        gzip.compress(WHOLE + b"\0" * 1000, mtime=0),
        "goes on after its last row",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_idx_file_is_refused_by_name(tmp_path, case):
    content, message = BROKEN[case]
    path = write_idx_folder(tmp_path) / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(ZooError, match=message) as caught:
        load_task("mnist", tmp_path)
    assert str(path) in str(caught.value)


def test_as_many_labels_as_images_are_demanded(tmp_path):
    arrays = small_arrays()
    arrays[3] = np.arange(3)
    with pytest.raises(ZooError, match="t10k has 4 images but 3 labels"):
        load_task("mnist", write_idx_folder(tmp_path, arrays))


def test_images_of_two_sizes_are_refused(tmp_path):
    arrays = small_arrays()[:2] + small_arrays(size=(5, 3))[2:]
    with pytest.raises(ZooError, match=r"train images are \(3, 5\), t10k images \(5, 3\)"):
        load_task("mnist", write_idx_folder(tmp_path, arrays))


def test_labels_above_nine_are_refused(tmp_path):
    arrays = small_arrays()
    arrays[1][2] = 10
    with pytest.raises(ZooError, match=r"must lie in \[0, 10\), got 0 to 10"):
        load_task("mnist", write_idx_folder(tmp_path, arrays))


@pytest.mark.parametrize("stem", STEMS)
def test_a_missing_file_is_named_with_the_way_to_get_it(tmp_path, stem):
    (write_idx_folder(tmp_path) / f"{stem}-ubyte").unlink()
    with pytest.raises(ZooError, match=f"holds no {stem}-ubyte.*METAMERGE_FASHION_MNIST"):
        load_task("fashion-mnist", tmp_path)


# ---------------------------------------------------------------------------- where files are


def test_folder_then_variable_then_data_then_package_are_looked_at(nowhere, monkeypatch):
    rows = {}
    for train, place in enumerate(("package", "data/fashion-mnist", "variable", "folder"), 1):
        write_idx_folder(nowhere / place, small_arrays(train=train))
        rows[place] = train

    def found(folder=None):
        return load_task("fashion-mnist", folder).test_rows.start

    source = replace(idx.SOURCES["fashion-mnist"], system=nowhere / "package")
    monkeypatch.setitem(idx.SOURCES, "fashion-mnist", source)
    assert found() == rows["data/fashion-mnist"]
    monkeypatch.setenv("METAMERGE_FASHION_MNIST", str(nowhere / "variable"))
    assert found() == rows["variable"]
    assert found("folder") == rows["folder"]
    monkeypatch.setenv("METAMERGE_FASHION_MNIST", "")
    (nowhere / "data").rename(nowhere / "elsewhere")
    assert found() == rows["package"]


def test_a_variable_that_names_no_data_is_not_passed_over(nowhere, monkeypatch):
    write_idx_folder(nowhere / "data" / "mnist")
    monkeypatch.setenv("METAMERGE_MNIST", str(nowhere / "nothing"))
    with pytest.raises(ZooError, match="nothing holds no train-images"):
        load_task("mnist")


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_without_files_and_network_both_ways_are_told(nowhere, name):
    with pytest.raises(ZooError, match="no network here") as caught:
        load_task(name)
    message = str(caught.value)
    assert "METAMERGE_" in message
    assert "run once with a network" in message
    assert not (nowhere / "data").exists()


def fake_openml(labels):
    images = np.zeros((len(labels), 784), dtype=np.uint8)
    images[:, 0] = np.arange(len(labels)) % 251
    return SimpleNamespace(data=images, target=np.array([str(label) for label in labels], object))


def test_openml_is_asked_once_and_kept_as_idx_files(nowhere, monkeypatch):
    labels = np.arange(60_010, dtype=np.uint8) % 10
    calls = []

    def fetch(name, **options):
        calls.append(name)
        return fake_openml(labels)

    official = hashlib.sha256(labels).hexdigest()
    source = replace(idx.SOURCES["mnist"], labels=official)
    monkeypatch.setitem(idx.SOURCES, "mnist", source)
    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch)
    first, second = load_task("mnist"), load_task("mnist")
    assert calls == ["mnist_784"]
    assert first.digest == second.digest
    assert first.test_rows == range(60_000, 60_010)
    np.testing.assert_array_equal(first.targets.numpy(), labels)
    assert (first.inputs[:, 0, 0, 0] * 255).round()[[250, 251]].tolist() == [250, 0]
    kept = sorted(path.name for path in (nowhere / "data" / "mnist").iterdir())
    assert kept == sorted(f"{stem}-ubyte" for stem in STEMS)


def test_openml_rows_in_another_order_are_refused_and_not_kept(nowhere, monkeypatch):
    bunch = fake_openml(np.arange(20) % 10)
    monkeypatch.setattr(sklearn.datasets, "fetch_openml", lambda *a, **k: bunch)
    with pytest.raises(ZooError, match="official order"):
        load_task("mnist")
    assert not (nowhere / "data").exists()


# ---------------------------------------------------------------------------- real data


def real_folder(variable):
    folder = os.environ.get(variable)
    if not folder:
        message = f"{variable} names no folder with the official IDX files"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return folder


@pytest.mark.parametrize(
    ("name", "test_counts", "first_targets"),
    [
        (
            "mnist",
            [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
            [5, 0, 4, 1, 9, 2, 1, 3, 1, 4],
        ),
        ("fashion-mnist", [1000] * 10, [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]),
    ],
)
def test_the_official_files_are_read_and_split(name, test_counts, first_targets):
    source = idx.SOURCES[name]
    task = load_task(name, real_folder(source.variable))
    assert task.inputs.shape == (70_000, 1, 28, 28)
    assert task.inputs.max() == 1
    assert task.inputs.min() == 0
    assert task.targets[:10].tolist() == first_targets
    assert task.targets[60_000:].bincount().tolist() == test_counts
    assert hashlib.sha256(task.targets.byte().numpy()).hexdigest() == source.labels

    split = split_task(task, objective=5000)
    assert split.test.tolist() == list(range(60_000, 70_000))
    assert [len(split.rows(part)) for part in PARTS] == [55_000, 3750, 1250, 10_000]
