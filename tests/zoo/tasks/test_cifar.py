import hashlib
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.datasets
from PIL import Image

from metamerge.errors import ZooError
from zoo.parts import PARTS, split_task
from zoo.tasks import cifar, load_task


def write_pngs(folder, first):
    """One black image per file, all of class 0 but the first."""
    folder.mkdir(parents=True)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        Image.new("RGB", (1024, 1)).save(folder / f"{name}.png")
    (folder / "train_lables.json").write_text(json.dumps([first, 0, 0, 0, 0]))
    (folder / "test_lables.json").write_text("[0]")


def test_folder_then_variable_then_data_are_looked_at(nowhere, monkeypatch):
    for place, first in (("data/cifar-10", 0), ("variable", 1), ("folder", 2)):
        write_pngs(nowhere / place, first)
    assert load_task("cifar-10").targets[0] == 0
    monkeypatch.setenv("METAMERGE_CIFAR_10", str(nowhere / "variable"))
    assert load_task("cifar-10").targets[0] == 1
    assert load_task("cifar-10", "folder").targets[0] == 2


def test_a_variable_that_names_no_data_is_not_passed_over(nowhere, monkeypatch):
    write_pngs(nowhere / "data" / "cifar-10", 0)
    monkeypatch.setenv("METAMERGE_CIFAR_10", str(nowhere / "nothing"))
    with pytest.raises(ZooError, match=r"nothing holds neither data_batch_1\.png"):
        load_task("cifar-10")


def test_without_files_and_network_both_ways_are_told(nowhere):
    with pytest.raises(ZooError, match=r"no network here.*METAMERGE_CIFAR_10.*run once with"):
        load_task("cifar-10")
    assert not (nowhere / "data").exists()


def fake_openml(monkeypatch, rows=10_002):
    """OpenML with a few small rows more than the official test rows; returns who asked."""
    labels = np.arange(rows, dtype=np.uint8) % 10
    images = np.zeros((rows, 3072), dtype=np.uint8)
    images[:, 1024] = np.arange(rows) % 251  # the first green pixel
    monkeypatch.setattr(cifar, "OFFICIAL_LABELS", hashlib.sha256(labels).hexdigest())
    monkeypatch.setattr(cifar, "OFFICIAL_PIXELS", hashlib.sha256(images).hexdigest())
    calls = []

    def fetch(name, **options):
        calls.append((name, options["version"]))
        answer = np.array([str(label) for label in labels], object)
        return SimpleNamespace(data=images.astype(np.float64), target=answer)

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch)
    return calls


def test_openml_is_asked_once_and_kept(nowhere, monkeypatch):
    calls = fake_openml(monkeypatch)
    first, second = load_task("cifar-10"), load_task("cifar-10")
    assert calls == [("CIFAR_10", 1)]
    assert first.digest == second.digest
    assert first.test_rows == range(2, 10_002)
    assert first.targets[:12].tolist() == [*range(10), 0, 1]
    assert (first.inputs[250:252, 1, 0, 0] * 255).round().tolist() == [250, 0]
    assert [path.name for path in (nowhere / "data/cifar-10").iterdir()] == ["cifar-10.npz"]


@pytest.mark.parametrize(
    ("digest", "message"),
    [
        ("OFFICIAL_LABELS", "does not list its rows"),
        ("OFFICIAL_PIXELS", "does not store its pixels"),
    ],
)
def test_openml_in_another_order_is_refused_and_not_kept(nowhere, monkeypatch, digest, message):
    fake_openml(monkeypatch)
    monkeypatch.setattr(cifar, digest, "0" * 64)
    with pytest.raises(ZooError, match=message):
        load_task("cifar-10")
    assert not (nowhere / "data").exists()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((10_002, 3, 32, 32), np.uint8)}, "as many labels"),
        ({"images": np.zeros((9, 3, 32, 32), np.uint8), "labels": np.zeros(9)}, "n > 10000"),
        ({"images": np.zeros((10_002, 2)), "labels": np.zeros(10_002)}, r"uint8 \[n, 3, 32, 32\]"),
        ({"images": np.array([{}]), "labels": np.zeros(1)}, "holds objects"),
    ],
)
def test_what_was_kept_and_then_changed_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "cifar-10.npz", **arrays)
    with pytest.raises(ZooError, match=message):
        load_task("cifar-10", tmp_path)


# ---------------------------------------------------------------------------- real data


def test_the_real_files_are_read_and_split():
    folder = os.environ.get("METAMERGE_CIFAR_10")
    if not folder:
        message = "METAMERGE_CIFAR_10 names no folder with CIFAR-10"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    task = load_task("cifar-10", folder)
    assert task.inputs.shape == (60_000, 3, 32, 32)
    assert task.targets[:50_000].bincount().tolist() == [5000] * 10
    assert task.targets[50_000:].bincount().tolist() == [1000] * 10
    assert task.targets[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]  # a frog, two trucks, ...
    assert hashlib.sha256(task.targets.byte().numpy()).hexdigest() == cifar.OFFICIAL_LABELS
    pixels = (task.inputs * 255).round_().byte().numpy()
    assert hashlib.sha256(pixels).hexdigest() == cifar.OFFICIAL_PIXELS
    # The means of the training images to the eight digits that everybody normalises with.
    means = pixels[:50_000].mean(axis=(0, 2, 3), dtype=np.float64) / 255
    np.testing.assert_allclose(means, [0.49139968, 0.48215841, 0.44653091], rtol=0, atol=5e-9)

    split = split_task(task, objective=5000)
    assert split.test.tolist() == list(range(50_000, 60_000))
    assert [len(split.rows(part)) for part in PARTS] == [45_000, 3750, 1250, 10_000]
