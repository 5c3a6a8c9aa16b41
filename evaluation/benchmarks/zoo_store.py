"""How fast are many members read from a zoo, against one file for each?

``python -m evaluation.benchmarks.zoo_store`` writes MLPs 64-32-10 as a zoo and as files of their
own into a temporary folder and reads all of them, with checksums on the side of the zoo. The last
line is JSON; ``value`` is the ratio of the times for reading.
"""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from metamerge.weights import Weights, stack
from zoo import architectures
from zoo.options import command
from zoo.store import Zoo
from zoo.writing import Building


@dataclass(frozen=True)
class BenchmarkOptions:
    """Compare a zoo with one file per network."""

    networks: int = 10_000  # members to write and to read
    members: int = 8  # of a family
    shard: int = 4096  # members of a shard
    repeats: int = 3  # measurements of reading; the fastest counts


def write_zoo(folder: Path, families: Weights, options: BenchmarkOptions) -> Zoo:
    """Write families ``[f, m, ...]`` as one group of a zoo."""
    building = Building(folder, "benchmark")
    building.open()
    count = len(next(iter(families.values())))
    size = max(1, options.shard // options.members)
    keys = []
    for start in range(0, count, size):
        own = {key: tensor[start : start + size] for key, tensor in families.items()}
        seeds = torch.arange(len(next(iter(own.values()))) * options.members)
        records = {"init_seed": seeds.reshape(-1, options.members)}
        keys.append(str(start))
        building.add(keys[-1], {"weights": own, "records": records}, members=options.members)
    manifest = dict.fromkeys(("digest", "options", "program", "task"))
    return building.finish({f"train-k{options.members}": keys}, manifest)


def fastest(read: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of several runs."""
    seconds = []
    for _ in range(repeats):
        clock = time.perf_counter()
        read()
        seconds.append(time.perf_counter() - clock)
    return min(seconds)


def measure(options: BenchmarkOptions) -> None:
    """Measure it, and end with a line of JSON.

    Args:
        options: What is measured.
    """
    console = Console()
    network = architectures.build("mlp", (1, 8, 8), 10, widths=(32,))
    families = options.networks // options.members
    shape = (families, options.members)
    weights = {k: torch.randn(*shape, *t.shape) for k, t in network.state_dict().items()}
    with tempfile.TemporaryDirectory() as scratch:
        clock = time.perf_counter()
        zoo = write_zoo(Path(scratch, "zoo"), weights, options)
        writing = time.perf_counter() - clock
        paths = [Path(scratch, f"{i}.safetensors") for i in range(families * options.members)]
        flat = {key: tensor.flatten(0, 1) for key, tensor in weights.items()}
        clock = time.perf_counter()
        for i, path in enumerate(paths):
            save_file({key: tensor[i] for key, tensor in flat.items()}, path)
        writing_files = time.perf_counter() - clock
        reading = fastest(lambda: zoo.families("train", options.members), options.repeats)
        reading_files = fastest(lambda: stack([load_file(path) for path in paths]), options.repeats)
    console.print(f"zoo:   written in {writing:6.2f} s, read in {reading:6.3f} s")
    console.print(f"files: written in {writing_files:6.2f} s, read in {reading_files:6.3f} s")
    details = {
        "networks": len(paths),
        "seconds": round(reading, 3),
        "seconds_files": round(reading_files, 3),
        "seconds_writing": round(writing, 2),
        "seconds_writing_files": round(writing_files, 2),
    }
    print(
        json.dumps(
            {
                "name": "zoo_store",
                "value": round(reading_files / reading, 1),
                "unit": "x",
                "against": "one safetensors file per network",
                "details": details,
            }
        )
    )


def main() -> None:
    """Entry point of ``python -m evaluation.benchmarks.zoo_store``."""
    command(BenchmarkOptions, measure, prog="python -m evaluation.benchmarks.zoo_store")


if __name__ == "__main__":
    main()
