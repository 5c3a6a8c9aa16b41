"""How much of real architectures does structure discovery find, how fast, and beside whom?

``python -m evaluation.benchmarks.structure`` discovers and proves every network of
``evaluation.benchmarks.architectures``, matches a permuted and slightly noised copy of each back,
measures seconds and peak memory at full size (ResNet-18, BERT-base, each in a process of its own),
and runs, in the same process and on the same networks, what other packages offer where they are
installed::

    pip install torch-pruning==1.6.1
    pip install --no-deps rebasin==0.0.47 torchview graphviz

``value`` is the mean share of hidden units that are free to move.
"""

import copy
import gc
import importlib.util
import json
import logging
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from evaluation.benchmarks import architectures
from evaluation.benchmarks.architectures import OWN, TRANSFORMERS, Sample
from evaluation.benchmarks.memory import peak
from metamerge.alignment.weight_matching import weight_matching
from metamerge.errors import StructureError
from metamerge.structure import PermutationSpec, discover
from zoo.options import command

PATIENCE = 10  # seconds that another package may take for one small network
FULL_SIZE = ("resnet18", "bert_base")


@dataclass(frozen=True)
class BenchmarkOptions:
    """Discover and prove the structure of many architectures."""

    only: str = ""  # names of architectures, separated by commas; empty for all
    full_size: bool = True  # measure ResNet-18 and BERT-base as well
    noise: float = 0.01  # of the copies that are matched back, relative to each tensor's spread


def measure(options: BenchmarkOptions) -> None:
    """Measure it, and end with a line of JSON.

    Args:
        options: What is measured.
    """
    warnings.simplefilter("ignore")
    console = Console(width=None if sys.stdout.isatty() else 130)
    catalogue = {**OWN, **TRANSFORMERS}
    names = [name for name in options.only.split(",") if name] or list(catalogue)
    discover(nn.Linear(2, 2), torch.zeros(2, 2))  # what torch.export loads, it loads once
    rows = {}
    for name in names:
        rows[name] = _row(catalogue[name], options.noise)
        console.print(_line(name, rows[name]), highlight=False)
    console.print(_table(rows))
    proved = [row for row in rows.values() if "refused" not in row]
    details: dict[str, Any] = {
        "architectures": len(rows),
        "proved": len(proved),
        "foreign": sum(name in TRANSFORMERS for name in rows),
        "matched_back": sum(row["matched"] for row in proved),
        **{
            f"{package}_accepts": sum(row[package]["groups"] is not None for row in proved)
            for package in OTHERS
            if proved and package in proved[0]
        },
        "rebasin_keeps_outputs": sum(
            row.get("rebasin", {}).get("keeps_function", False) for row in proved
        ),
        **({name: _full_size(name) for name in FULL_SIZE} if options.full_size else {}),
    }
    for name in FULL_SIZE if options.full_size else ():
        console.print(f"{name}: {details[name]}", highlight=False)
    share = sum(row["free"] for row in proved) / max(1, len(proved))
    print(
        json.dumps(
            {
                "name": "structure",
                "value": round(share, 4),
                "unit": "mean share of hidden units that are free",
                "against": "rebasin 0.0.47 and torch-pruning, groups and seconds in the table",
                "details": details,
            }
        )
    )


def _row(build: Callable[[], Sample], noise: float) -> dict[str, Any]:
    """Everything that is measured on one architecture."""
    model, inputs = build()
    clock = time.perf_counter()
    try:
        spec = discover(model, inputs)
    except StructureError as error:
        return {"refused": str(error)}
    seconds = time.perf_counter() - clock
    clock = time.perf_counter()
    matched = matched_back(model, spec, noise)
    row = {
        "groups": len(spec.groups),
        "nested": len(spec.within),
        "units": spec.hidden[0],
        "free": spec.free_share,
        "scalings": len(spec.scalings),
        "seconds": seconds,
        "matched": matched,
        "match_seconds": time.perf_counter() - clock,
    }
    for package, measure in OTHERS.items():
        if importlib.util.find_spec(package) is not None:
            row[package] = _limited(measure, build)
    return row


def _limited(measure: Callable[..., dict[str, Any]], build: Callable[[], Sample]) -> dict[str, Any]:
    """What a foreign package finds within a time that is long for networks of this size."""

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"longer than {PATIENCE} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(PATIENCE)
    try:
        return measure(build)
    except TimeoutError as error:
        return {"groups": None, "why": str(error)}
    finally:
        signal.alarm(0)


def matched_back(model: nn.Module, spec: PermutationSpec, noise: float, seed: int = 0) -> bool:
    """Whether weight matching undoes a random permutation of a noised copy, in every group.

    Args:
        model: The network.
        spec: Its permutation spec.
        noise: Standard deviation of the noise, relative to that of each tensor.
        seed: Seed of permutation and noise.

    Returns:
        Whether both networks, without the noise, are the same tensors after alignment.
    """
    generator = torch.Generator().manual_seed(seed)
    one = {key: t.detach().clone() for key, t in model.state_dict().items() if key in spec.axes}
    other = spec.permute(one, spec.random(generator))

    def noised(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        spread = noise * tensor.std(correction=0)
        return tensor + spread * torch.randn(tensor.shape, generator=generator)

    pair = {key: torch.stack([one[key], noised(other[key])])[None] for key in one}
    perm = weight_matching(pair, spec)
    aligned = [
        spec.permute(weights, {group: index[0, member] for group, index in perm.items()})
        for member, weights in enumerate((one, other))
    ]
    return all(torch.equal(aligned[0][key], aligned[1][key]) for key in one)


def _rebasin(build: Callable[[], Sample]) -> dict[str, Any]:
    """Groups that ``rebasin`` finds, and whether its permutations keep the network's outputs."""
    from rebasin import PermutationCoordinateDescent

    model, inputs = build()
    other = _redrawn(build()[0])
    if isinstance(inputs, dict) or len(inputs) > 1:
        return {"groups": None, "why": "takes one positional input"}
    before = _first(other(*inputs))
    clock = time.perf_counter()
    try:
        descent = PermutationCoordinateDescent(model, other, inputs[0])
        groups = len(descent.pinit.model_graph.permutation_to_info)
        seconds = time.perf_counter() - clock
        descent.rebasin()
        with torch.no_grad():
            gap = float((_first(other(*inputs)) - before).norm() / before.norm())
    except Exception as error:  # whatever a foreign package raises means that it refuses
        return {"groups": None, "why": repr(error)[:80]}
    return {"groups": groups, "seconds": seconds, "keeps_function": gap < 1e-4}


def _torch_pruning(build: Callable[[], Sample]) -> dict[str, Any]:
    """Groups of coupled channels in torch-pruning's dependency graph, outputs included."""
    import torch_pruning

    model, inputs = build()
    clock = time.perf_counter()
    try:
        graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=inputs)
        groups = len(list(graph.get_all_groups()))
    except Exception as error:  # whatever a foreign package raises means that it refuses
        return {"groups": None, "why": repr(error)[:80]}
    return {"groups": groups, "seconds": time.perf_counter() - clock}


OTHERS = {"rebasin": _rebasin, "torch_pruning": _torch_pruning}


def _redrawn(model: nn.Module) -> nn.Module:
    """A network of the same architecture whose weights have nothing to do with the first."""
    generator = torch.Generator().manual_seed(1)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            spread, mean = parameter.std(correction=0), parameter.mean()
            parameter.copy_(mean + spread * torch.randn(parameter.shape, generator=generator))
    return model


def _first(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output.detach()
    return _first(next(iter(output.values())) if isinstance(output, dict) else output[0])


def _full_size(name: str) -> dict[str, Any]:
    """Seconds and peak memory of discovery at full size, in a fresh process."""
    command = [sys.executable, "-m", "evaluation.benchmarks.structure", "--measure", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _measure(name: str) -> None:
    """What ``_full_size`` runs: peak memory during discovery, the model included."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    discover(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.zeros(2, 4))
    model, inputs = getattr(architectures, name)()
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # from here on, the peak is counted anew
    before = peak()
    clock = time.perf_counter()
    spec = discover(model, inputs)
    seconds = time.perf_counter() - clock
    most = peak() - before + size
    result = {
        "groups": len(spec.groups),
        "free": spec.free_share,
        "seconds": round(seconds, 2),
        "model_mb": round(size / 2**20),
        "peak_over_model": round(most / size, 2),
    }
    print(json.dumps(result))


def _line(name: str, row: dict[str, Any]) -> str:
    if "refused" in row:
        return f"{name}: refused. {row['refused']}"
    matched = "matched back" if row["matched"] else "NOT matched back"
    return (
        f"{name}: {row['groups']} groups, {row['free']:.1%} free, {row['seconds']:.2f} s, {matched}"
    )


def _table(rows: dict[str, dict[str, Any]]) -> Table:
    packages = [p for p in OTHERS if any(p in row for row in rows.values())]
    table = Table(title="Structure of networks, discovered and proved")
    for column in ("architecture", "groups", "nested", "units", "free", "scalings", "s"):
        table.add_column(column, justify="left" if column == "architecture" else "right")
    table.add_column("matched back")
    for package in packages:
        table.add_column(f"{package}: groups (s)", justify="right")
    for name, row in rows.items():
        if "refused" in row:
            table.add_row(name, "refused")
            continue
        cells = [
            *(str(row[key]) for key in ("groups", "nested", "units")),
            *(f"{row['free']:.1%}", str(row["scalings"]), f"{row['seconds']:.2f}"),
            "yes" if row["matched"] else "no",
        ]
        table.add_row(name, *cells, *(_other(row[package]) for package in packages))
    return table


def _other(found: dict[str, Any]) -> str:
    if found["groups"] is None:
        return "refused"
    broken = "" if found.get("keeps_function", True) else ", changes outputs"
    return f"{found['groups']} ({found['seconds']:.2f}{broken})"


def main() -> None:
    """Entry point of ``python -m evaluation.benchmarks.structure``."""
    command(BenchmarkOptions, measure, prog="python -m evaluation.benchmarks.structure")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        _measure(sys.argv[2])
    else:
        main()
