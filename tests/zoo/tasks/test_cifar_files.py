import gzip
import io
import json
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from metamerge.errors import ZooError
from zoo.tasks import load_task

TRAIN = [f"data_batch_{i}" for i in range(1, 6)]
NAMES = [*TRAIN, "test_batch"]
ROWS = 4  # of one batch


def small_batches():
    """Six batches of four images, bytes [4, 3, 32, 32], with their labels."""
    rng = np.random.default_rng(0)
    return [
        (
            rng.integers(0, 256, (ROWS, 3, 32, 32), dtype=np.uint8),
            [(7 * i + j) % 10 for j in range(4)],
        )
        for i in range(6)
    ]


def pickled(images, labels):
    """The official form: protocol 2, keys of bytes, a row of red, then green, then blue."""
    batch = {
        b"batch_label": b"some batch",
        b"labels": labels,
        b"data": images.reshape(len(images), 3072),
        b"filenames": [b"leptodactylus_pentadactylus_s_000004.png"] * len(images),
    }
    return pickle.dumps(batch, protocol=2)


def write_pickles(folder, batches=None):
    folder.mkdir(parents=True, exist_ok=True)
    for name, (images, labels) in zip(NAMES, batches or small_batches(), strict=True):
        (folder / name).write_bytes(pickled(images, labels))
    return folder


def write_pngs(folder, batches=None):
    folder.mkdir(parents=True, exist_ok=True)
    batches = batches or small_batches()
    for name, (images, _) in zip(NAMES, batches, strict=True):
        pixels = images.transpose(0, 2, 3, 1).reshape(len(images), 1024, 3)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    labels = [labels for _, labels in batches]
    (folder / "train_lables.json").write_text(
        json.dumps([label for batch in labels[:5] for label in batch])
    )
    (folder / "test_lables.json").write_text(json.dumps(labels[5]))
    return folder


def write_archive(folder, members=None):
    folder.mkdir(parents=True, exist_ok=True)
    if members is None:
        members = {n: pickled(*b) for n, b in zip(NAMES, small_batches(), strict=True)}
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return folder


FORMS = {
    "pickles": write_pickles,
    "pickles one folder down": lambda f: write_pickles(f / "cifar-10-batches-py").parent,
    "archive": write_archive,
    "PNG files": write_pngs,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_images_in_the_same_order(tmp_path, form):
    task = load_task("cifar-10", FORMS[form](tmp_path / "files"))
    images = np.concatenate([images for images, _ in small_batches()])
    np.testing.assert_array_equal((task.inputs * 255).round().byte().numpy(), images)
    assert task.targets.tolist() == [label for _, labels in small_batches() for label in labels]
    assert task.inputs.dtype == torch.float32
    assert task.inputs.shape == (24, 3, 32, 32)
    assert task.test_rows == range(20, 24)
    assert (task.classes, len(task.labels), task.standardise) == (10, 10, False)


def test_a_batch_as_python_2_wrote_it_is_read(tmp_path):
    def array(images):  # opcode by opcode: Python 3 writes bytes in another way
        return (
            b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
            b"(K\x01K\x04M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
            b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
            b"T" + images.size.to_bytes(4, "little") + images.tobytes() + b"tb"
        )

    images, _ = small_batches()[0]
    content = b"\x80\x02}(U\x04data" + array(images) + b"U\x06labels](K\x03K\x01K\x04K\x01eu."
    assert pickle.loads(content, encoding="bytes")[b"data"].shape == (4, 3072)
    folder = write_pickles(tmp_path)
    (folder / "data_batch_1").write_bytes(content)
    task = load_task("cifar-10", folder)
    np.testing.assert_array_equal((task.inputs[:4] * 255).round().byte().numpy(), images)
    assert task.targets[:4].tolist() == [3, 1, 4, 1]


def test_the_largest_byte_becomes_exactly_one(tmp_path):
    batches = small_batches()
    batches[0][0][0, 0, 0, :2] = 255, 0
    task = load_task("cifar-10", write_pickles(tmp_path, batches))
    assert task.inputs[0, 0, 0, :2].tolist() == [1.0, 0.0]


# ---------------------------------------------------------------------------- pickled batches


class Intruder:
    """Unpickled freely, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("wrap", ["alone", "beside the images", "as the images"])
def test_a_batch_that_would_run_code_is_refused_and_nothing_is_run(tmp_path, wrap):
    trap = tmp_path / "trap"
    images, labels = small_batches()[0]
    batch = {
        "alone": Intruder(trap),
        "beside the images": {b"x": Intruder(trap), b"data": images, b"labels": labels},
        "as the images": {b"data": Intruder(trap), b"labels": labels},
    }[wrap]
    content = pickle.dumps(batch, protocol=2)
    pickle.loads(content)  # it would
    assert trap.exists()
    trap.rmdir()

    folder = write_pickles(tmp_path / "files")
    (folder / "data_batch_3").write_bytes(content)
    with pytest.raises(ZooError, match=r"data_batch_3.*would run posix\.mkdir.*nothing.*was run"):
        load_task("cifar-10", folder)
    assert not trap.exists()


@pytest.mark.parametrize(
    "function", [eval, exec, getattr, __import__, os.system, np.load, pickle.loads, np.zeros]
)
def test_no_function_outside_the_list_is_known(tmp_path, function):
    folder = write_pickles(tmp_path)
    (folder / "test_batch").write_bytes(pickle.dumps(function, protocol=2))
    with pytest.raises(ZooError, match="would run"):
        load_task("cifar-10", folder)


def test_only_the_encoding_of_bytes_is_known(tmp_path):
    folder = write_pickles(tmp_path)
    crafted = b"\x80\x02c_codecs\nencode\nX\x01\0\0\0aX\x04\0\0\0zlib\x86R."
    (folder / "test_batch").write_bytes(crafted)
    with pytest.raises(ZooError, match="encodes in 'zlib'"):
        load_task("cifar-10", folder)


GOOD_IMAGES, GOOD_LABELS = small_batches()[0]
WHOLE = pickled(GOOD_IMAGES, GOOD_LABELS)
FLAT = GOOD_IMAGES.reshape(ROWS, 3072)


def batch_of(data, labels=GOOD_LABELS):
    return pickle.dumps({b"data": data, b"labels": labels}, protocol=2)


BROKEN = {
    "nothing": (b"", "EOFError"),
    "half a pickle": (WHOLE[:-100], "is no batch of CIFAR-10"),
    "a web page": (b"<!DOCTYPE html>", "is no batch of CIFAR-10"),
    "a list": (pickle.dumps([1, 2]), "is no batch of CIFAR-10"),
    "keys of text": (pickle.dumps({"data": 1, "labels": 2}, protocol=2), "KeyError"),
    "floats": (batch_of(FLAT.astype(np.float32)), "is no batch|expected images as bytes"),
    "objects": (batch_of(np.array([[1, "a"]], object)), "is no batch of CIFAR-10"),
    "column by column": (batch_of(np.asfortranarray(FLAT)), "expected images as bytes"),
    "signed bytes": (batch_of(FLAT.astype(np.int8)), "expected images as bytes"),
    "another width": (batch_of(FLAT[:, :3000].copy()), r"got \(4, 3000\)"),
    "a label too few": (pickled(GOOD_IMAGES, [1, 2, 3]), "4 images but 3 labels"),
    "a label too many": (pickled(GOOD_IMAGES, [1, 2, 3, 4, 5]), "4 images but 5 labels"),
    "a label of ten": (pickled(GOOD_IMAGES, [1, 2, 3, 10]), r"integers in \[0, 10\)"),
    "a label of text": (pickled(GOOD_IMAGES, [1, 2, 3, b"4"]), r"integers in \[0, 10\)"),
    "labels in a tuple": (pickled(GOOD_IMAGES, (1, 2, 3, 4)), r"integers in \[0, 10\)"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_batch_is_refused_by_name(tmp_path, case):
    content, message = BROKEN[case]
    path = write_pickles(tmp_path) / "data_batch_2"
    path.write_bytes(content)
    with pytest.raises(ZooError, match=message) as caught:
        load_task("cifar-10", tmp_path)
    assert str(path) in str(caught.value)


def test_a_batch_of_a_gigabyte_is_not_read(tmp_path):
    with open(write_pickles(tmp_path) / "data_batch_1", "wb") as file:
        file.truncate(2**30)
    with pytest.raises(ZooError, match="is larger than 67108864 bytes"):
        load_task("cifar-10", tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_batch_is_named(tmp_path, name):
    (write_pickles(tmp_path) / name).unlink()
    with pytest.raises(ZooError, match=f"{name}: cannot be read"):
        load_task("cifar-10", tmp_path)


# ---------------------------------------------------------------------------- archive


def test_an_archive_without_a_batch_is_refused(tmp_path):
    write_archive(tmp_path, {"data_batch_1": WHOLE})
    with pytest.raises(ZooError, match="data_batch_2"):
        load_task("cifar-10", tmp_path)


def test_half_an_archive_is_refused(tmp_path):
    path = write_archive(tmp_path) / "cifar-10-python.tar.gz"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ZooError, match=r"cifar-10-python\.tar\.gz: cannot be read"):
        load_task("cifar-10", tmp_path)


def test_an_archive_that_unpacks_without_end_is_refused(tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(gzip.compress(bytes(2**28 + 1), 1, mtime=0))
    with pytest.raises(ZooError, match="unpacks to more than 268435456 bytes"):
        load_task("cifar-10", tmp_path)


def test_an_archive_is_not_extracted_and_its_links_lead_nowhere(tmp_path):
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        entry = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(entry)
    with pytest.raises(ZooError, match="cannot be read"):
        load_task("cifar-10", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["cifar-10-python.tar.gz"]


# ---------------------------------------------------------------------------- PNG files


def test_a_truncated_png_is_refused_by_name(tmp_path):
    path = write_pngs(tmp_path) / "data_batch_4.png"
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(ZooError, match=r"data_batch_4\.png: cannot be read"):
        load_task("cifar-10", tmp_path)


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html>", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_png_is_refused(tmp_path, content):
    (write_pngs(tmp_path) / "test_batch.png").write_bytes(content)
    with pytest.raises(ZooError, match=r"test_batch\.png: cannot be read"):
        load_task("cifar-10", tmp_path)


@pytest.mark.parametrize(
    ("size", "mode"), [((1023, 4), "RGB"), ((1024, 4), "L"), ((1024, 10_001), "RGB")]
)
def test_a_png_of_another_form_is_refused_before_it_is_decoded(tmp_path, size, mode):
    Image.new(mode, size).save(write_pngs(tmp_path) / "data_batch_1.png")
    with pytest.raises(ZooError, match=rf"got {mode} of {size[0]} x {size[1]}"):
        load_task("cifar-10", tmp_path)


def test_the_pixel_limit_of_pillow_stays_as_it_was(tmp_path):
    before = Image.MAX_IMAGE_PIXELS
    load_task("cifar-10", write_pngs(tmp_path))
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize(
    ("part", "labels", "message"),
    [
        ("train", "[1, 2, 3]", "holds 3 labels, the train files 20 images"),
        ("train", json.dumps([1] * 21), "holds 21 labels, the train files 20 images"),
        ("test", "[1, 2, 3]", "holds 3 labels, the test files 4 images"),
        ("test", "[1, 2, 3, 10]", r"integers in \[0, 10\)"),
        ("test", "[1, 2, 3, 4.0]", r"integers in \[0, 10\)"),
        ("test", "[1, 2, 3, true]", r"integers in \[0, 10\)"),
        ("test", '{"labels": [1, 2, 3, 4]}', r"integers in \[0, 10\)"),
        ("test", "[1, 2", "is no JSON"),
        ("test", "[" * 100_000, "is no JSON"),
    ],
)
def test_wrong_labels_are_refused(tmp_path, part, labels, message):
    (write_pngs(tmp_path) / f"{part}_lables.json").write_text(labels)
    with pytest.raises(ZooError, match=message) as caught:
        load_task("cifar-10", tmp_path)
    assert f"{part}_lables.json" in str(caught.value)
