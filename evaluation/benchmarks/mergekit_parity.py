"""Do our methods give what mergekit gives, where both have them?

``python -m evaluation.benchmarks.mergekit_parity`` merges the same tensors on both sides, tensor by
tensor: random ones in float64, and in float32 networks fine-tuned on digits from one base.
mergekit (LGPL) is an oracle only: it runs in a process and an environment of its own, made on
demand, and nothing of it is imported here. Where the two mean different things, the row says why,
and that they do differ is checked as well. The last line is JSON; ``value`` is the largest
difference of all other rows.
"""

import json
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from evaluation.benchmarks import mergekit_side
from evaluation.benchmarks.mergekit_environment import find_python
from metamerge.declaration import bind
from metamerge.registry import get_method
from metamerge.weights import Weights, unstack
from zoo import architectures
from zoo.options import command
from zoo.tasks import load_task
from zoo.training import init_networks, train_networks

TOLERANCE = 1e-6
SEED = 7
MEMBERS = 3
LACKING = ("nuslerp", "multislerp", "della", "sce", "arcee_fusion", "nearswap", "ram")
"""Methods of mergekit that have no counterpart here."""


@dataclass(frozen=True)
class BenchmarkOptions:
    """Compare methods with those of mergekit."""

    python: str = ""  # a Python that has mergekit 0.1.5; empty to make an environment
    cache: str = "~/.cache/metamerge"  # where the environment is made


@dataclass(frozen=True)
class Case:
    """One method on both sides.

    Attributes:
        theirs: Name of mergekit's method.
        parameters: Its parameters.
        ours: Name of our method.
        options: Its options.
        base: ``last`` where there is a base behind the members, ``first`` where mergekit calls the
            first of two members base, None where there is none.
        members: Number of members.
        why: Why the two differ on purpose; empty where they are equal.
        family: ``random``, ``trained``, or one made for this case.
        seed: Seed that is set before every tensor.
    """

    theirs: str
    parameters: dict[str, Any]
    ours: str
    options: dict[str, Any] = field(default_factory=dict)
    base: str | None = "last"
    members: int = MEMBERS
    why: str = ""
    family: str = "random"
    seed: int = SEED


def equal_cases(family: str) -> list[Case]:
    """Cases in which both sides mean the same."""
    third, given = 1 / MEMBERS, {"family": family}
    ties = {"weight": 1.0, "normalize": True}
    exact = {"max_iter": 200, "tol": 1e-9}
    return [
        Case("linear", {"weight": 1.0}, "average", base=None, **given),
        Case(
            "linear",
            {"weight": [1, 2, 5]},
            "weighted_average",
            {"coefficients": [1, 2, 5]},
            base=None,
            **given,
        ),
        Case("slerp", {"t": 0.3}, "slerp", {"t": 0.3}, base="first", members=2, **given),
        Case("karcher", exact, "karcher_mean", base=None, **given),
        Case("task_arithmetic", {"weight": third}, "task_arithmetic", **given),
        Case(
            "task_arithmetic",
            {"weight": [0.4, -0.2, 0.7], "lambda": 0.9},
            "task_arithmetic",
            {"coefficients": [0.4, -0.2, 0.7], "scale": 0.9},
            **given,
        ),
        *(
            Case(
                "ties",
                {**ties, "density": density, "lambda": 0.7},
                "ties",
                {"density": density, "scale": 0.7, "scope": "tensor"},
                **given,
            )
            for density in (0.2, 0.5, 1.0)
        ),
        Case(
            "breadcrumbs",
            {"weight": third, "density": 0.7, "gamma": 0.05},
            "breadcrumbs",
            {"density": 0.7, "gamma": 0.05},
            **given,
        ),
        Case(
            "breadcrumbs_ties",
            {**ties, "density": 0.7, "gamma": 0.05},
            "breadcrumbs",
            {"density": 0.7, "gamma": 0.05, "elect": True},
            **given,
        ),
        Case("dare_linear", {"weight": third, "density": 1.0}, "dare", {"density": 1.0}, **given),
        Case(
            "dare_linear",
            {"weight": third, "density": 0.6, "rescale": False},
            "dare",
            {"density": 0.6, "scale": 0.6},  # the scale takes back the division by the density
            **given,
        ),
        Case(
            "dare_ties",
            {**ties, "density": 0.6, "rescale": False},
            "dare",
            {"density": 0.6, "scale": 0.6, "elect": True},
            **given,
        ),
        Case("model_stock", {}, "model_stock", family=f"{family}, related"),
    ]


def different_cases() -> list[Case]:
    """Cases in which the two mean different things, each with the reason for ours."""
    third = 1 / MEMBERS
    return [
        Case(
            "slerp",
            {"t": 0.5},
            "slerp",
            {"t": 0.5},
            base="first",
            members=2,
            family="zeros",
            why="a tensor of zeros has no angle: ours is linear, it takes 0.71 of the other",
        ),
        Case(
            "dare_linear",
            {"weight": third, "density": 0.6},
            "dare",
            {"density": 0.6},
            why="it rescales to the same sum of magnitudes; ours by 1 / density, as the paper",
        ),
        Case(
            "model_stock",
            {},
            "model_stock",
            family="opposed",
            why="with a mean cosine below 0 it goes away from the members; ours stays at the base",
        ),
        Case(
            "model_stock",
            {},
            "model_stock",
            family="tiny",
            why="it divides by at least 1e-6, which hides the angles of tiny task vectors",
        ),
        Case(
            "breadcrumbs",
            {"weight": third, "density": 0.7},
            "breadcrumbs",
            {"density": 0.7},
            family="scalars",
            why="of a tensor with one entry it keeps none; ours at least one, as both do in TIES",
        ),
        Case(
            "ties",
            {"weight": 1.0, "density": 0.5},
            "ties",
            {"density": 0.5, "scope": "tensor"},
            family="equal magnitudes",
            why="among equal magnitudes at the cut it keeps some; ours keeps all",
        ),
    ]


def random_families(generator: torch.Generator) -> dict[str, list[Weights]]:
    """Families that take no training; of each the last is the base."""
    shapes = {"matrix": (512, 768), "filters": (8, 4, 3, 3), "bias": (48,), "two": (2,)}

    def draw(scale: float = 1.0) -> Weights:
        return {
            key: scale * torch.randn(shape, generator=generator, dtype=torch.float64)
            for key, shape in shapes.items()
        }

    def around(origin: Weights, moves: Sequence[Weights]) -> list[Weights]:
        return [*({k: origin[k] + m[k] for k in origin} for m in moves), origin]

    base, common = draw(), draw(0.1)
    own = [draw(0.1) for _ in range(MEMBERS)]
    related = [{k: 2 * common[k].abs() + m[k].abs() for k in m} for m in own]
    zeros = [draw(), {k: torch.zeros(s, dtype=torch.float64) for k, s in shapes.items()}, base]
    signs = [{k: t.sign() for k, t in draw().items()} for _ in range(MEMBERS)]
    minus = [{k: s * t + 0.01 * own[2][k] for k, t in common.items()} for s in (1, -1, -1)]
    nothing = {k: torch.zeros(s, dtype=torch.float64) for k, s in shapes.items()}
    return {
        "random": around(base, own),
        "random, related": around(base, related),
        "zeros": zeros,
        "opposed": around(nothing, minus),
        "tiny": around(nothing, [{k: 1e-5 * t for k, t in m.items()} for m in related]),
        "scalars": around(
            {"s": torch.ones(1, dtype=torch.float64)}, [{"s": torch.full((1,), 0.5)}] * MEMBERS
        ),
        "equal magnitudes": around(nothing, signs),
    }


def trained_families() -> dict[str, list[Weights]]:
    """Three networks fine-tuned on digits, each on images of its own, from one base."""
    task = load_task("digits")
    shape = tuple(task.inputs.shape[1:])

    def network() -> torch.nn.Module:
        return architectures.build("mlp", shape, task.classes, widths=(32,))

    program, images = architectures.program_of(network(), shape), torch.arange(len(task.inputs))
    start = init_networks(network, [0])
    given = (task.inputs, task.targets)
    base = train_networks(program, start, *given, [images[:300]], epochs=10).weights
    copies = {
        key: tensor.expand(MEMBERS, *tensor.shape[1:]).clone() for key, tensor in base.items()
    }
    own = list(images[300:1500].split(400))
    tuned = train_networks(program, copies, *given, own, epochs=10).weights
    family = [*unstack(tuned), *unstack(base)]
    return {"trained": family, "trained, related": family}


def ours(case: Case, family: Sequence[Weights]) -> tuple[Weights, float]:
    """Merge tensor by tensor, each with the seed set anew; and the seconds of the fastest run."""
    record, members = get_method(case.ours), family[: case.members]
    times = []
    for _ in range(mergekit_side.REPEATS):
        clock = time.perf_counter()
        fused = {}
        for key in members[0]:
            generator = torch.Generator().manual_seed(case.seed)
            resources = {"base": {key: family[-1][key]}, "generator": generator}
            arguments = bind(record, resources, case.options)
            fused |= record.function([{key: m[key]} for m in members], **arguments)
        times.append(time.perf_counter() - clock)
    return fused, min(times)


def difference(one: Weights, other: Weights) -> float:
    """Largest absolute difference."""
    return max(float((one[key].double() - other[key].double()).abs().max()) for key in one)


def theirs(
    cases: dict[str, Case], families: dict[str, list[Weights]], python: str
) -> tuple[dict[str, Weights], dict[str, float]]:
    """Results and seconds of mergekit."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, family in families.items():
            (folder / name).mkdir()
            for index, weights in enumerate(family):
                file = "base" if index == len(family) - 1 else str(index)
                own = {key: tensor.contiguous() for key, tensor in weights.items()}
                save_file(own, folder / name / f"{file}.safetensors")
        told = {name: asdict(case) for name, case in cases.items()}
        (folder / "cases.json").write_text(json.dumps(told))
        subprocess.run([python, mergekit_side.__file__, folder], check=True)
        found = {name: load_file(folder / f"{name}.safetensors") for name in cases}
        return found, json.loads((folder / "seconds.json").read_text())


def measure(options: BenchmarkOptions) -> None:
    """Measure it, and end with a line of JSON.

    Args:
        options: What is measured.

    Raises:
        SystemExit: If a case is not as stated.
    """
    python = find_python(options.python, options.cache)
    families = {**random_families(torch.Generator().manual_seed(0)), **trained_families()}
    listed = [*equal_cases("random"), *equal_cases("trained"), *different_cases()]
    cases = {f"{index:02d}": case for index, case in enumerate(listed)}
    found, seconds = theirs(cases, families, python)
    table = Table("mergekit", "metamerge", "tensors", "difference", "ms theirs", "ms ours", "why")
    worst, wrong, total = 0.0, [], [0.0, 0.0]
    for name, case in cases.items():
        fused, own_seconds = ours(case, families[case.family])
        apart = difference(fused, found[name])
        total = [total[0] + seconds[name], total[1] + own_seconds]
        if (apart <= TOLERANCE) == bool(case.why):
            wrong.append(f"{case.theirs} ({case.family})")
        worst = max(worst, 0.0 if case.why else apart)
        times = (f"{1000 * s:.1f}" for s in (seconds[name], own_seconds))
        told = f"{case.theirs} {json.dumps(case.parameters)}", case.ours
        table.add_row(*told, case.family, f"{apart:.1e}", *times, case.why)
    Console(width=200).print(table)
    details = {
        "cases": len(cases),
        "different_on_purpose": sum(bool(case.why) for case in cases.values()),
        "not_as_stated": wrong,
        "seconds": [round(s, 3) for s in total],
        "not_here": LACKING,
    }
    against = "mergekit 0.1.5, tensor by tensor"
    line = {"name": "mergekit_parity", "value": worst, "unit": "largest absolute difference"}
    print(json.dumps({**line, "against": against, "details": details}))
    if wrong:
        raise SystemExit(1)


def main() -> None:
    """Entry point of ``python -m evaluation.benchmarks.mergekit_parity``."""
    command(BenchmarkOptions, measure, prog="python -m evaluation.benchmarks.mergekit_parity")


if __name__ == "__main__":
    main()
