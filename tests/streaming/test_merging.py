import errno
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from metamerge import merge, merge_files
from metamerge.checkpoints import read_checkpoints, save_checkpoint
from metamerge.errors import (
    ConfigError,
    IncompatibleWeights,
    NonFinite,
    Truncated,
    Unreadable,
    Unsafe,
)
from metamerge.registry import get_method, list_methods
from metamerge.streaming import pipeline

CHECKOUT = Path(__file__).resolve().parents[2]
SHARD = "model.safetensors.index.json"


def member(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    made = {
        "embedding": torch.randn(50, 16, generator=generator),
        "layer.weight": torch.randn(16, 16, generator=generator),
        "norm.running_mean": torch.randn(16, generator=generator),
        "norm.running_var": torch.rand(16, generator=generator) + 0.5,
        "scale": torch.randn((), generator=generator),
        "nothing": torch.zeros(0, 4),
    }
    made = {key: tensor.to(dtype) for key, tensor in made.items()}
    return {**made, "norm.num_batches_tracked": torch.tensor(5 + seed)}


def put(folder, weights, shards=1):
    """Write a checkpoint of one or several files, as other programs do."""
    folder.mkdir()
    names = list(weights)
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    weight_map = {key: f"part-{i % shards}.safetensors" for i, key in enumerate(names)}
    for shard in set(weight_map.values()):
        save_file({k: weights[k] for k in names if weight_map[k] == shard}, folder / shard)
    (folder / SHARD).write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture
def paths(tmp_path):
    """Three members and a base, of one, two and three files."""
    made = [put(tmp_path / f"m{i}", member(i), shards=i + 1) for i in range(3)]
    return [*made, put(tmp_path / "base", member(9))]


def result(folder):
    return read_checkpoints(folder)[0]


def streamable():
    records = map(get_method, list_methods())
    at_hand = {"base", "generator"}
    return [r.name for r in records if r.per_tensor is not None and r.required <= at_hand]


@pytest.fixture(params=[None, 100], ids=["whole tensors", "cut tensors"])
def cut(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(pipeline, "_PART", request.param)


def test_average_of_four_numbers(tmp_path):
    one = put(tmp_path / "one", {"w": torch.tensor([1.0, 2.0])})
    other = put(tmp_path / "other", {"w": torch.tensor([3.0, -4.0])})
    report = merge_files([one, other / "model.safetensors"], tmp_path / "out")
    assert result(tmp_path / "out").weights["w"].tolist() == [2.0, -1.0]
    assert (report["tensors"], report["shards"]) == (1, 1)
    assert (report["bytes_read"], report["bytes_written"]) == (16, 8)


@pytest.mark.parametrize("shard_size", ["5GB", 1500])
@pytest.mark.parametrize("name", streamable())
def test_files_get_what_state_dicts_get(tmp_path, paths, name, shard_size, cut):
    record = get_method(name)
    members = paths[: record.most or 3]
    options = {"coefficients": [1, 2, 3]} if name == "weighted_average" else {}
    base = paths[3] if "base" in record.resources else None
    merge_files(members, tmp_path / "out", method=name, base=base, shard_size=shard_size, **options)
    found = result(tmp_path / "out")
    assert found.verified
    options |= record.per_tensor
    expected = merge(members, method=name, base=base, align=None, **options).weights
    assert found.weights.keys() == expected.keys()
    if name != "dare":  # draws in the order of the files
        assert all(torch.equal(found.weights[key], t) for key, t in expected.items())


def test_the_usual_methods_can_stream():
    assert set(streamable()) >= {"average", "weighted_average", "slerp", "karcher_mean", "ties"}
    assert set(streamable()) >= {"task_arithmetic", "dare", "breadcrumbs", "model_stock"}


def test_shards_are_named_and_listed_as_others_expect_it(tmp_path, paths, caplog):
    with caplog.at_level("INFO", logger="metamerge"):
        report = merge_files(paths[:3], tmp_path / "out", shard_size=1500)
    names = sorted(os.listdir(tmp_path / "out"))
    count = report["shards"]
    shards = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    assert count > 1
    assert names == ["manifest.json", *shards, SHARD]
    index = json.loads((tmp_path / "out" / SHARD).read_text())
    assert index["metadata"]["total_size"] == report["bytes_written"]
    told = [f"{name} is written, {i + 1} of {count}" for i, name in enumerate(shards)]
    assert caplog.messages == told
    loaded = {k: t for s in shards for k, t in load_file(tmp_path / "out" / s).items()}
    assert loaded.keys() == index["weight_map"].keys() == member().keys()


def test_a_damaged_result_is_noticed(tmp_path, paths):
    merge_files(paths[:2], tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(Unreadable, match="sha256"):
        read_checkpoints(tmp_path / "out")


def test_one_checkpoint_is_copied_whatever_the_method(tmp_path, paths):
    for method in ("average", "slerp", "ties"):
        merge_files(paths[0], tmp_path / method, method=method, base=paths[3])
        found = result(tmp_path / method).weights
        assert all(torch.equal(found[key], tensor) for key, tensor in member().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes_are_kept_and_sums_do_not_overflow(tmp_path, dtype):
    value = 60000.0 if dtype == torch.float16 else 1e30
    large = torch.full((3,), value, dtype=dtype)
    paths = [put(tmp_path / name, {"w": large}) for name in "abc"]
    merge_files(paths, tmp_path / "out")
    assert torch.equal(result(tmp_path / "out").weights["w"], large)


def test_mixed_dtypes_are_promoted(tmp_path):
    paths = [
        put(tmp_path / str(dtype), member(1, dtype)) for dtype in (torch.float16, torch.bfloat16)
    ]
    merge_files(paths, tmp_path / "out")
    assert result(tmp_path / "out").weights["embedding"].dtype == torch.float32


def test_wrappers_are_stripped_from_names(tmp_path):
    bare = put(tmp_path / "bare", member(0))
    wrapped = put(tmp_path / "wrapped", {f"module.{k}": t for k, t in member(1).items()})
    merge_files([wrapped, bare], tmp_path / "out")
    assert result(tmp_path / "out").weights.keys() == member().keys()


def test_same_seed_same_draws(tmp_path, paths):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        merge_files(paths[:3], tmp_path / name, method="dare", base=paths[3], seed=seed)
    one, same, other = (result(tmp_path / name).weights["embedding"] for name in "abc")
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_thousand_checkpoints_need_few_open_files(tmp_path):
    weights = {"w": torch.arange(4.0)}
    save_file(weights, tmp_path / "one.safetensors")
    paths = [tmp_path / f"{i}.safetensors" for i in range(1000)]
    for path in paths:
        os.link(tmp_path / "one.safetensors", path)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 80, before[1]))
    try:
        merge_files(paths, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    found = result(tmp_path / "out").weights["w"]
    assert torch.allclose(found, weights["w"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_with_file_and_tensor(tmp_path, paths, value, cut):
    spoiled = member(5)
    spoiled["layer.weight"][15, 15] = value
    bad = put(tmp_path / "bad", spoiled)
    with pytest.raises(NonFinite, match=r"bad.model\.safetensors: 'layer.weight' holds 1 values"):
        merge_files([paths[0], bad], tmp_path / "out")
    assert not any("out" in name for name in os.listdir(tmp_path))


def test_negative_variances_and_results_out_of_range_are_refused(tmp_path, paths):
    spoiled = member(5)
    spoiled["norm.running_var"][3] = -1
    bad = put(tmp_path / "bad", spoiled)
    with pytest.raises(NonFinite, match=r"checkpoints\[1\].*running_var.*below 0"):
        merge_files([paths[0], bad], tmp_path / "out")
    half = [put(tmp_path / n, {"w": torch.full((2,), v).half()}) for n, v in (("a", 6e4), ("b", 0))]
    with pytest.raises(NonFinite, match="the fused weights: 'w'"):
        merge_files(half[:1] * 2, tmp_path / "out", method="task_arithmetic", base=half[1], scale=2)
    assert not any("out" in name for name in os.listdir(tmp_path))


def test_members_that_differ_are_refused_before_anything_is_read(tmp_path, paths, monkeypatch):
    monkeypatch.setattr("metamerge.checkpoints.lazy.read_tensor", None)
    narrow = member(1)
    narrow["layer.weight"] = torch.zeros(16, 15)
    lacking = {k: t for k, t in member(1).items() if k != "scale"}
    for name, weights, told in (
        ("narrow", narrow, r"narrow.*'layer.weight' has shape \(16, 15\)"),
        ("lacking", lacking, "lacking.*misses 'scale'"),
    ):
        bad = put(tmp_path / name, weights)
        with pytest.raises(IncompatibleWeights, match=told):
            merge_files([paths[0], bad], tmp_path / "out")
        with pytest.raises(IncompatibleWeights, match=told):
            merge_files(paths[:2], tmp_path / "out", method="ties", base=bad)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"method": "slerp", "scope": "model"}, "scope='model' looks at all tensors at once"),
        ({"method": "slerp", "t": 2}, r"t must be a number in \[0, 1\]"),
        ({"method": "slerp"}, "karcher_mean"),
        ({"method": "cluster"}, "cannot work tensor by tensor"),
        ({"method": "rank_average"}, "cannot work tensor by tensor"),
        ({"method": "ties"}, "needs 'base'"),
        ({"method": "weighted_average", "coefficients": [1, 2]}, "2 coefficients and 3 members"),
        ({"scale": 2}, "has no option 'scale'"),
        ({"shard_size": "5 parsecs"}, "shard_size"),
        ({"shard_size": 0}, "shard_size"),
        ({"shard_size": True}, "shard_size"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_before_work(tmp_path, paths, arguments, told):
    with pytest.raises(ConfigError, match=told):
        merge_files(paths[:3], tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_no_checkpoints_or_such_in_memory_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="got none"):
        merge_files([], tmp_path / "out")
    with pytest.raises(ConfigError, match="expected a path"):
        merge_files([member()], tmp_path / "out")


def test_files_of_other_kinds_are_refused(tmp_path, paths):
    torch.save(member(), tmp_path / "m.pt")
    with pytest.raises(Unreadable, match=r"torch\.save.*Use merge"):
        merge_files([paths[0], tmp_path / "m.pt"], tmp_path / "out")
    with pytest.raises(Unreadable, match="cannot be opened"):
        merge_files([paths[0], tmp_path / "missing"], tmp_path / "out")
    (tmp_path / "evil").mkdir()
    index = {"weight_map": {"w": "../m0/model.safetensors"}}
    (tmp_path / "evil" / SHARD).write_text(json.dumps(index))
    with pytest.raises(Unsafe, match="of its own folder"):
        merge_files([tmp_path / "evil"], tmp_path / "out")


def test_a_file_that_changes_meanwhile_is_an_error_and_not_a_crash(tmp_path, paths, monkeypatch):
    file = paths[0] / "model.safetensors"
    real = pipeline.TensorReader.read

    def shortened(*arguments):
        os.truncate(file, file.stat().st_size - 8)
        return real(*arguments)

    monkeypatch.setattr(pipeline.TensorReader, "read", shortened)
    with pytest.raises((Truncated, Unreadable), match=r"m0.model\.safetensors"):
        merge_files(paths[:1] * 2, tmp_path / "out")
    assert not any("out" in name for name in os.listdir(tmp_path))


def test_input_as_output_and_what_exists_are_refused(tmp_path, paths):
    for target in (paths[0], tmp_path):
        with pytest.raises(ConfigError, match=r"holds .* which is read"):
            merge_files(paths[:2], target, overwrite=True)
    save_checkpoint({"w": torch.zeros(2)}, tmp_path / "old")
    with pytest.raises(ConfigError, match="not empty"):
        merge_files(paths[:2], tmp_path / "old")
    merge_files(paths[:2], tmp_path / "old", overwrite=True, shard_size=1500)
    merge_files(paths[:2], tmp_path / "old", overwrite=True)
    assert sorted(os.listdir(tmp_path / "old")) == ["manifest.json", "model.safetensors"]


@pytest.mark.parametrize("step", ["read", "write", "sync"])
def test_a_failure_leaves_the_old_result_and_nothing_else(tmp_path, paths, monkeypatch, step):
    merge_files(paths[:2], tmp_path / "out")
    before = result(tmp_path / "out").weights
    names = {
        "read": "metamerge.streaming.pipeline.TensorReader.read",
        "write": "metamerge.checkpoints.shard_writing.ShardWriter.append",
        "sync": "metamerge.checkpoints.shard_writing.os.fsync",
    }

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(names[step], fail)
        with pytest.raises(OSError, match="No space left"):
            merge_files(paths[1:3], tmp_path / "out", overwrite=True)
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".partial")]
    assert all(torch.equal(result(tmp_path / "out").weights[k], t) for k, t in before.items())


def test_a_disk_that_is_too_small_is_noticed_before_work(tmp_path, paths, monkeypatch):
    class Full:
        free = 10

    monkeypatch.setattr("metamerge.streaming.merging.shutil.disk_usage", lambda _: Full)
    with pytest.raises(OSError, match="10 are free") as raised:
        merge_files(paths[:2], tmp_path / "out")
    assert raised.value.errno == errno.ENOSPC


def test_a_killed_process_leaves_nothing_visible(tmp_path):
    paths = [put(tmp_path / n, {f"{i}": torch.randn(2**20) for i in range(8)}) for n in "ab"]
    code = (
        "import sys, metamerge; from metamerge.streaming import pipeline; pipeline._PART = 2**16; "
        "print('on', flush=True); metamerge.merge_files(sys.argv[2:], sys.argv[1])"
    )
    command = [sys.executable, "-c", code, tmp_path / "out", *paths]
    process = subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE)
    process.stdout.readline()
    while process.poll() is None and not any(n.endswith(".partial") for n in os.listdir(tmp_path)):
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert not (tmp_path / "out").exists()


def test_large_tensors_need_little_memory(tmp_path):
    weights = {"w": torch.ones(2**24)}  # 64 MiB
    path = put(tmp_path / "a", weights)
    code = (
        "import sys, metamerge; from evaluation.benchmarks.memory import peak; before = peak(); "
        "metamerge.merge_files(sys.argv[2:], sys.argv[1]); print((peak() - before) // 2**20)"
    )
    command = [sys.executable, "-c", code, tmp_path / "out", *[path] * 4]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 80  # MiB; the members are 256
