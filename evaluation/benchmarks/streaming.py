"""How fast are checkpoints of gigabytes merged from files to files, beside mergekit?

``python -m evaluation.benchmarks.streaming`` makes a base and two fine-tuned members with tensors
like those of a language model, and merges them by averaging, SLERP and TIES with ``merge_files``
and with ``mergekit-pytorch``, in turns, each in a process of its own. Times are those of whole
processes, imports included. Ours writes through to the disk and adds checksums; for mergekit,
seconds with its files synced as well are given beside. mergekit reads single files only, so members
are not sharded; what is written is, on both sides alike, which also saves mergekit memory.

Results are compared entry by entry. The last line is JSON; ``value`` is the smallest of the three
ratios of throughput.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from evaluation.benchmarks.memory import memory_of
from evaluation.benchmarks.mergekit_environment import find_python
from metamerge.errors import ConfigError
from zoo.options import command

METHODS = ("average", "slerp", "ties")
DENSITY = 0.2
HIDDEN, INNER, WORDS = 4096, 11008, 16000


@dataclass(frozen=True)
class BenchmarkOptions:
    """Compare merging files with that of mergekit."""

    gigabytes: float = 2.0  # size of the two members together
    dtype: str = "bfloat16"  # of all tensors: bfloat16 or float32
    repeats: int = 3  # runs of each side and method; the median counts
    shard: str = "500MB"  # size of the files that are written
    folder: str = ""  # where files are made; empty for a temporary folder
    python: str = ""  # a Python that has mergekit 0.1.5; empty to make an environment
    cache: str = "~/.cache/metamerge"  # where the environment is made


@dataclass(frozen=True)
class Run:
    """One merge in a process of its own.

    Attributes:
        seconds: Until the process ended.
        syncing: Seconds after that until its files were on the disk.
        working: Seconds of all its threads on processors.
        resident: MiB at most, with parts of files that are mapped.
        anonymous: MiB at most, without them.
    """

    seconds: float
    syncing: float
    working: float
    resident: int
    anonymous: int


def shapes(numbers: int) -> dict[str, tuple[int, ...]]:
    """Tensors of a language model with about so many numbers: whole layers, and one cut short."""
    made: dict[str, tuple[int, ...]] = {}
    left, layer = numbers, 0
    rows = {"q": HIDDEN, "k": HIDDEN, "v": HIDDEN, "o": HIDDEN, "up": INNER, "gate": INNER}
    while left > 0:
        own = {f"layers.{layer}.{name}.weight": (n, HIDDEN) for name, n in rows.items()}
        own[f"layers.{layer}.down.weight"] = (HIDDEN, INNER)
        own[f"layers.{layer}.norm.weight"] = (HIDDEN,)
        own = {**({"embed.weight": (WORDS, HIDDEN)} if not layer else {}), **own}
        for name, shape in own.items():
            if left > 0:
                made[name] = shape
                left -= torch.Size(shape).numel()
        layer += 1
    return made


def write_family(folder: Path, numbers: int, dtype: torch.dtype) -> list[Path]:
    """Write a base and two members that differ from it by a tenth of its size."""
    paths = [folder / f"{name}.safetensors" for name in ("base", "first", "second")]
    for index, path in enumerate(paths):
        origin, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(index)
        weights = {}
        for name, shape in shapes(numbers).items():
            values = torch.empty(shape).normal_(0, 0.02, generator=origin)
            if index:
                values += torch.empty(shape).normal_(0, 0.002, generator=own)
            weights[name] = values.to(dtype)
        save_file(weights, path, metadata={"format": "pt"})
    return paths


def our_command(method: str, family: Sequence[Path], out: Path, shard: str) -> list[str]:
    """A Python that calls ``merge_files``."""
    base, *members = map(str, family)
    given = {"method": method, "shard_size": shard}
    given |= {"base": base, "density": DENSITY} if method == "ties" else {}
    code = f"import metamerge; metamerge.merge_files({members!r}, {str(out)!r}, **{given!r})"
    return [sys.executable, "-c", code]


def their_command(
    method: str, family: Sequence[Path], out: Path, shard: str, python: str
) -> list[str]:
    """``mergekit-pytorch`` with a recipe beside the output."""
    base, first, second = map(str, family)
    models = [{"model": path, "parameters": {"weight": 1.0}} for path in (first, second)]
    recipe: dict = {"merge_method": "linear", "models": models}
    if method == "slerp":
        bare = [{"model": path} for path in (first, second)]
        recipe = {"merge_method": "slerp", "models": bare, "base_model": first}
        recipe["parameters"] = {"t": 0.5}
    if method == "ties":
        recipe = {"merge_method": "ties", "models": models, "base_model": base}
        recipe["parameters"] = {"density": DENSITY, "normalize": True}
    config = out.with_suffix(".yml")
    config.write_text(json.dumps(recipe))  # JSON is YAML
    program = str(Path(python).parent / "mergekit-pytorch")
    size = shard.replace("MB", "M").replace("GB", "B")
    return [program, str(config), str(out), "--quiet", "--out-shard-size", size]


def observe(words: Sequence[str], out: Path | None = None) -> Run:
    """Run a command; its memory is read from the kernel while it runs."""
    clock = time.perf_counter()
    with tempfile.TemporaryFile() as told:
        process = subprocess.Popen(words, stdout=told, stderr=told)
        resident = anonymous = 0
        while True:
            status = memory_of(process.pid)
            resident = max(resident, status.get("VmHWM", 0))
            anonymous = max(anonymous, status.get("RssAnon", 0))
            ended, code, usage = os.wait4(process.pid, os.WNOHANG)
            if ended:
                break
            time.sleep(0.01)
        seconds = time.perf_counter() - clock
        process.returncode = os.waitstatus_to_exitcode(code)
        if process.returncode:
            told.seek(0)
            raise ConfigError(f"{words[0]} failed: {told.read().decode()[-2000:]}")
    clock = time.perf_counter()
    for path in out.iterdir() if out else ():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    syncing, working = time.perf_counter() - clock, usage.ru_utime + usage.ru_stime
    return Run(seconds, syncing, working, resident // 1024, anonymous // 1024)


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, mapped and not read."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    return found


def disagreements(method: str, ours: Path, theirs: Path, family: Sequence[Path]) -> dict[str, int]:
    """Count entries that differ by more than rounding.

    mergekit computes TIES in the dtype of the files, which for bfloat16 rounds task vectors before
    they are trimmed and elected. Where a magnitude is within that rounding of the cut of its
    tensor, or two task vectors cancel, the two sides can decide differently; counted apart.

    Args:
        method: One of ``METHODS``.
        ours: Folder that ``merge_files`` wrote.
        theirs: Folder that mergekit wrote.
        family: Files of the base and the two members.

    Returns:
        Number of ``entries``, of ``unequal`` ones, and of those ``undecided``.
    """
    one, other = tensors(ours), tensors(theirs)
    counts = {"entries": 0, "unequal": 0, "undecided": 0}
    files = [safe_open(path, "pt") for path in family]
    for key, tensor in one.items():
        eps = torch.finfo(tensor.dtype).eps
        origin, *members = (file.get_tensor(key).float() for file in files)
        apart = (tensor.float() - other[key].float()).abs()
        far = apart > 2 * eps * torch.stack([m.abs() for m in (origin, *members)]).amax(0)
        counts["entries"] += tensor.numel()
        if method == "ties" and far.any():
            vectors = torch.stack([member - origin for member in members])
            close = vectors.sum(0).abs() <= 2 * eps * vectors.abs().amax(0)
            for size in vectors.abs():
                rank = size.numel() - max(1, int(DENSITY * size.numel())) + 1
                floor = size.flatten().kthvalue(rank).values
                close |= (size - floor).abs() <= 2 * eps * floor
            counts["undecided"] += int((far & close).sum())
            far &= ~close
        counts["unequal"] += int(far.sum())
    return counts


def compare(
    method: str, family: Sequence[Path], scratch: Path, options: BenchmarkOptions, python: str
) -> tuple[list[Run], list[Run], dict[str, int]]:
    """Run both sides in turns, and compare what they wrote."""
    runs: tuple[list[Run], list[Run]] = ([], [])
    counts = {}
    for turn in range(options.repeats):
        outs = scratch / "ours", scratch / "theirs"
        commands = (
            our_command(method, family, outs[0], options.shard),
            their_command(method, family, outs[1], options.shard, python),
        )
        for side in (0, 1) if turn % 2 == 0 else (1, 0):
            runs[side].append(observe(commands[side], outs[side]))
        if turn == 0:
            counts = disagreements(method, outs[0], outs[1], family)
        for out in outs:
            for path in out.iterdir():
                path.unlink()
            out.rmdir()
    return (*runs, counts)


def measure(options: BenchmarkOptions) -> None:
    """Measure it, and end with a line of JSON.

    Args:
        options: What is measured.
    """
    python, console = find_python(options.python, options.cache), Console(width=160)
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[options.dtype]
    numbers = int(options.gigabytes * 1e9 / 2 / dtype.itemsize)
    heads = [
        "method",
        "side",
        "s",
        "s, synced",
        "s, CPU",
        "GB/s",
        "peak MiB",
        "of it own",
        "unequal",
    ]
    table, details = Table(*heads), {}
    with tempfile.TemporaryDirectory(dir=options.folder or None) as name:
        scratch = Path(name)
        family = write_family(scratch, numbers, dtype)
        starting = [
            statistics.median(observe(words).working for _ in range(3))
            for words in (
                [sys.executable, "-c", "import metamerge"],
                [str(Path(python).parent / "mergekit-pytorch"), "--help"],
            )
        ]
        for method in METHODS:
            *sides, counts = compare(method, family, scratch, options, python)
            size = sum(p.stat().st_size for p in family[0 if method == "ties" else 1 :])
            rows = []
            for side, runs in zip(("metamerge", "mergekit"), sides, strict=True):
                seconds = statistics.median(run.seconds for run in runs)
                synced = statistics.median(run.seconds + run.syncing for run in runs)
                working = statistics.median(run.working for run in runs)
                peak = max(run.resident for run in runs), max(run.anonymous for run in runs)
                rows.append((seconds, synced, *peak, working))
                told = (f"{s:.1f}" for s in (seconds, synced, working))
                told = *told, f"{size / seconds / 1e9:.2f}"
                table.add_row(method, side, *told, *map(str, peak), json.dumps(counts))
            merging = [row[4] - start for row, start in zip(rows, starting, strict=True)]
            details[method] = {
                "ratio": round(rows[1][0] / rows[0][0], 2),
                "ratio_synced": round(rows[1][1] / rows[0][1], 2),
                "ratio_cpu_without_starting": round(merging[1] / max(merging[0], 1e-3), 2),
                "ratio_cpu": round(rows[1][4] / rows[0][4], 2),
                "seconds": [round(row[0], 2) for row in rows],
                "peak_mib": [row[2] for row in rows],
                "peak_anonymous_mib": [row[3] for row in rows],
                **counts,
            }
    console.print(table)
    details["starting_cpu_seconds"] = [round(s, 2) for s in starting]
    details["options"] = {"gigabytes": options.gigabytes, "dtype": options.dtype}
    line = {"name": "streaming", "value": min(details[m]["ratio"] for m in METHODS), "unit": "x"}
    print(json.dumps({**line, "against": "mergekit-pytorch 0.1.5", "details": details}))


def main() -> None:
    """Entry point of ``python -m evaluation.benchmarks.streaming``."""
    command(BenchmarkOptions, measure, prog="python -m evaluation.benchmarks.streaming")


if __name__ == "__main__":
    main()
