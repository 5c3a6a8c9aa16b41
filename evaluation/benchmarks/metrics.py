"""How fast are metrics over many networks at once, against one network after the other?

``python -m evaluation.benchmarks.metrics`` makes families of MLPs 64-32-10 and measures on 449
digits all that ``python -m evaluation.metrics`` tells of them: scores of every network, the soft
vote and who agrees with it, loss on the lines between members and on the simplex that they span,
variance by layer, cosines and distances. The other side calls the same functions for one network
(and one mixture) at a time. Results of both are compared. The last line is JSON; ``value`` is the
ratio of the times, ``details`` holds every part and the scores over 1 to 256 networks.
"""

import json
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor

from evaluation.metrics import (
    agreement,
    cosines,
    distances,
    family_logits,
    landscape,
    lines,
    read_answers,
    score_networks,
    simplex,
    soft_vote,
    unit_variances,
    variance_ratio,
)
from evaluation.side_by_side import fastest
from metamerge.structure import Layout, discover_program
from metamerge.weights import Weights
from zoo import architectures
from zoo.options import command
from zoo.parts import split_task
from zoo.tasks import load_task
from zoo.training import init_networks, predict

TOLERANCE = 2e-5  # float32 sums in another order; distances are sums over 2,410 parameters


@dataclass(frozen=True)
class BenchmarkOptions:
    """Compare metrics of many networks at once with one network at a time."""

    networks: int = 100  # in families of four
    counts: tuple[int, ...] = (1, 4, 16, 64, 256)  # of the curve of scores
    points: int = 5  # mixtures on a line, ends included
    draws: int = 16  # random mixtures of a family
    repeats: int = 5  # measurements; the fastest counts


class Side:
    """What both sides measure, each in its way.

    Args:
        layout: Of the networks.
        families: ``[f, m, ...]``.
        images: Inputs and classes.
        mixed: Coefficients of mixtures, ``[p, m]``.
    """

    def __init__(
        self, layout: Layout, families: Weights, images: tuple[Tensor, Tensor], mixed: Tensor
    ) -> None:
        self.layout, self.program = layout, layout.program
        self.families, self.mixed = families, mixed.float()
        self.inputs, self.targets = images
        self.flat = {key: tensor.flatten(0, 1) for key, tensor in families.items()}
        self.count, self.members = next(iter(families.values())).shape[:2]

    def one(self, family: int) -> Weights:
        """A family, ``[1, m, ...]``."""
        return {key: tensor[family : family + 1] for key, tensor in self.families.items()}


class AtOnce(Side):
    """All networks at once."""

    def scores(self) -> dict[str, Tensor]:
        """Of every network."""
        return score_networks(self.program, self.flat, self.inputs, self.targets)

    def ensemble(self) -> Tensor:
        """Agreement of every member with its family's soft vote, ``[f, m]``."""
        logits = family_logits(self.program, self.families, self.inputs)
        return agreement(logits, soft_vote(logits)[:, None])

    def mixtures(self) -> Tensor:
        """Excess of the loss of every mixture, ``[f, p]``."""
        images = (self.inputs, self.targets)
        return landscape(self.program, self.families, self.mixed, *images).excess

    def variance(self) -> Tensor:
        """Variance ratio of the averages by layer, ``[layers, f]``."""
        fused = {key: tensor.mean(1) for key, tensor in self.families.items()}
        found = variance_ratio(fused, self.families, self.layout, self.inputs)
        return torch.stack(list(found.values()))

    def likeness(self) -> Tensor:
        """Cosine and distance of all pairs, ``[2, n, n]``."""
        return torch.stack([cosines(self.flat), distances(self.flat)])


class OneByOne(Side):
    """One network, one mixture, one pair after the other."""

    def scores(self) -> dict[str, Tensor]:
        """Of every network."""
        images = (self.inputs, self.targets)
        each = [score_networks(self.program, own, *images) for own in singles(self.flat)]
        return {name: torch.cat([one[name] for one in each]) for name in each[0]}

    def ensemble(self) -> Tensor:
        """Agreement of every member with its family's soft vote, ``[f, m]``."""
        found = []
        for family in range(self.count):
            own = {key: tensor[0] for key, tensor in self.one(family).items()}
            said = [
                family_logits(self.program, {k: t[None] for k, t in one.items()}, self.inputs)
                for one in singles(own)
            ]
            vote = soft_vote(torch.cat(said, 1))[0]
            found.append(torch.stack([agreement(one[0, 0], vote) for one in said]))
        return torch.stack(found)

    def mixtures(self) -> Tensor:
        """Excess of the loss of every mixture, ``[f, p]``."""
        found = []
        for family in range(self.count):
            own, each = self.one(family), []
            losses = [self._loss(own, corner) for corner in torch.eye(self.members)]
            for row in self.mixed:
                each.append(self._loss(own, row) - row @ torch.stack(losses))
            found.append(torch.stack(each))
        return torch.stack(found)

    def _loss(self, family: Weights, coefficients: Tensor) -> Tensor:
        mixed = {
            key: torch.tensordot(coefficients, tensor[0], 1)[None] for key, tensor in family.items()
        }
        answers = read_answers(predict(self.program, mixed, self.inputs), self.targets)
        return torch.stack([answers.loss.mean(-1), answers.right.mean(-1)])[0, 0]

    def variance(self) -> Tensor:
        """Variance ratio of the averages by layer, ``[layers, f]``."""
        found = []
        for family in range(self.count):
            own = {key: tensor[0] for key, tensor in self.one(family).items()}
            theirs = torch.stack([self._variances(one) for one in singles(own)]).mean(0)
            fused = {key: tensor.mean(0, keepdim=True) for key, tensor in own.items()}
            found.append(self._variances(fused) / theirs.clamp_min(1e-12))
        return torch.stack(found, 1)

    def _variances(self, network: Weights) -> Tensor:
        return torch.cat(list(unit_variances(network, self.layout, self.inputs).values()))

    def likeness(self) -> Tensor:
        """Cosine and distance of all pairs, ``[2, n, n]``."""
        vectors = torch.stack(
            [torch.cat([t.flatten().double() for t in own.values()]) for own in singles(self.flat)]
        )
        rows = []
        for own in vectors:
            cosine = vectors @ own / vectors.norm(dim=1) / own.norm()
            rows.append(torch.stack([cosine, (vectors - own).norm(dim=1)]))
        return torch.stack(rows, 1)


PARTS = ("scores", "ensemble", "mixtures", "variance", "likeness")


def singles(weights: Weights) -> list[Weights]:
    """Stacked networks one by one, each as a stack of one."""
    count = len(next(iter(weights.values())))
    return [{key: tensor[i : i + 1] for key, tensor in weights.items()} for i in range(count)]


def gap(one: object, other: object) -> float:
    """Largest difference between what two sides found."""
    if isinstance(one, dict):
        return max(gap(one[name], other[name]) for name in one)
    return float((one - other).abs().nan_to_num().max())


def made(networks: int) -> tuple[Layout, Weights]:
    """Freshly initialised networks, ``[n, ...]``."""

    def network() -> torch.nn.Module:
        return architectures.build("mlp", (1, 8, 8), 10, widths=(32,))

    program = architectures.program_of(network(), (1, 8, 8))
    layout = Layout(program, discover_program(program))
    return layout, init_networks(network, range(networks))


def measure(options: BenchmarkOptions) -> None:
    """Measure it, and end with a line of JSON.

    Args:
        options: What is measured.

    Raises:
        SystemExit: If both sides differ.
    """
    console, members = Console(), 4
    images = split_task(load_task("digits")).images("test")
    layout, networks = made(max(options.networks, *options.counts))
    count = options.networks // members
    families = {k: t[: count * members].unflatten(0, (count, -1)) for k, t in networks.items()}
    mixed = torch.cat(
        [
            lines(members, options.points)[1][:, 1:-1].flatten(0, 1),
            simplex(members, options.draws, generator=torch.Generator().manual_seed(0)),
        ]
    )
    ours, theirs = (side(layout, families, images, mixed) for side in (AtOnce, OneByOne))
    parts, worst = {}, 0.0
    for name in PARTS:
        works = {"at_once": getattr(ours, name), "one_by_one": getattr(theirs, name)}
        worst = max(worst, gap(*(work() for work in works.values())))
        parts[name] = once, single = tuple(fastest(works, options.repeats).values())
        console.print(f"{name}: {1000 * once:.1f} ms at once, {1000 * single:.1f} ms one by one")
    if worst > TOLERANCE:
        raise SystemExit(f"metrics: both sides differ by {worst:.1e}, more than {TOLERANCE:.0e}.")
    curve = {}
    for number in options.counts:
        own = {key: tensor[:number] for key, tensor in networks.items()}

        def scores(own: Weights = own) -> object:
            return score_networks(layout.program, own, *images)

        seconds = fastest({"scores": scores}, options.repeats)["scores"]
        curve[number] = round(1e6 * seconds / number, 1)
        console.print(f"scores of {number} networks at once: {curve[number]:.0f} us per network")
    together, apart = (sum(seconds[i] for seconds in parts.values()) for i in (0, 1))
    print(
        json.dumps(
            {
                "name": "metrics",
                "value": round(apart / together, 2),
                "unit": "x",
                "against": "the same metrics, one network at a time",
                "details": {
                    "networks": count * members,
                    "images": len(images[1]),
                    "mixtures": count * len(mixed),
                    "seconds": {
                        name: {"at_once": round(a, 5), "one_by_one": round(b, 5)}
                        for name, (a, b) in parts.items()
                    },
                    "largest_difference": worst,
                    "microseconds_per_network": curve,
                    "threads": torch.get_num_threads(),
                },
            }
        )
    )


def main() -> None:
    """Entry point of ``python -m evaluation.benchmarks.metrics``."""
    command(BenchmarkOptions, measure, prog="python -m evaluation.benchmarks.metrics")


if __name__ == "__main__":
    main()
