"""How much faster are many networks trained together than one after another?

``python -m evaluation.benchmarks.zoo_training`` trains MLPs 784-128-128-10 and convolutional nets
(16, 32 and 32 channels) on segments of Fashion-MNIST, then such networks and MLPs 64-32-10 on
digits of 8 x 8 pixels: all of them at once, and one by one in two ordinary loops.
The first is the one that everybody writes, with a ``DataLoader`` and ``torch.optim.AdamW``; the
second is as lean as a loop gets, with rows indexed by hand and the fused optimizer. A curve over
the number of networks follows. The last line is JSON; ``value`` is the ratio of MLPs per second to
that of the first loop.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from metamerge.structure import Program
from metamerge.weights import Weights, stack
from zoo import architectures
from zoo.options import command
from zoo.parts import TaskSplit, split_task
from zoo.tasks import Task, load_task
from zoo.training import init_networks, predict, train_networks


@dataclass(frozen=True)
class BenchmarkOptions:
    """Compare batched training with the ordinary loop."""

    task: str = "fashion-mnist"  # where images come from; any task of 10 classes
    mlps: int = 64  # MLPs 784-128-128-10 that are trained both ways
    rows: int = 5000  # images per MLP
    epochs: float = 5.0  # passes over them
    cnns: int = 16  # convolutional networks that are trained both ways
    cnn_rows: int = 2000  # images per convolutional network
    cnn_epochs: float = 2.0  # passes over them
    small: str = "digits"  # a second task, of small images, for as many networks of each kind
    small_rows: int = 300  # images of it per network
    small_epochs: float = 10.0  # passes over them
    batch_size: int = 32  # images per step
    lr: float = 1e-3  # learning rate at the start
    curve: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # numbers of MLPs together
    curve_steps: int = 50  # steps of each for the curve


WIDE, NARROW, MAPS = (128, 128), (32,), (16, 32, 32)


@dataclass(frozen=True)
class Race:
    """One architecture, and what it is trained on."""

    name: str
    task: Task
    network: Callable[[], nn.Module]
    rows: list[Tensor]
    epochs: float
    options: BenchmarkOptions

    @cached_property
    def program(self) -> Program:
        """The traced architecture."""
        return architectures.program_of(self.network(), self.task.inputs.shape[1:])

    def together(self) -> Weights:
        """All networks at once."""
        start = init_networks(self.network, range(len(self.rows)))
        options = self.options
        return train_networks(
            self.program,
            start,
            self.task.inputs,
            self.task.targets,
            self.rows,
            epochs=self.epochs,
            batch_size=options.batch_size,
            lr=options.lr,
        ).weights

    def one_by_one(self, loader: Callable[[Tensor, Tensor], Iterator], *, fused: bool) -> Weights:
        """One network after the other."""
        found = []
        for seed, rows in enumerate(self.rows):
            torch.manual_seed(seed)
            network = self.network()
            batches = loader(self.task.inputs[rows], self.task.targets[rows])
            steps = int(self.epochs * len(rows) / self.options.batch_size)
            _ordinary_loop(network, batches, steps, self.options.lr, fused=fused)
            found.append(network.state_dict())
        return stack(found)

    def everyday(self, inputs: Tensor, targets: Tensor) -> Iterator:
        """Shuffled batches by ``DataLoader``, epoch after epoch."""
        data = TensorDataset(inputs, targets)
        loader = DataLoader(data, batch_size=self.options.batch_size, shuffle=True, drop_last=True)
        return chain.from_iterable(iter(lambda: loader, None))

    def lean(self, inputs: Tensor, targets: Tensor) -> Iterator:
        """Shuffled batches by indexing, epoch after epoch."""
        while True:
            order = torch.randperm(len(targets)).split(self.options.batch_size)
            for rows in order[: len(targets) // self.options.batch_size]:
                yield inputs[rows], targets[rows]


def _ordinary_loop(
    network: nn.Module, batches: Iterator, steps: int, lr: float, *, fused: bool
) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.0, fused=fused)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in range(steps):
        inputs, targets = next(batches)
        loss = F.cross_entropy(network(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def raced(race: Race, test: tuple[Tensor, Tensor], console: Console) -> dict[str, float]:
    """Train the same networks three ways; ratios to training them together, and accuracies."""
    ways = {
        "together": race.together,
        "everyday loop": lambda: race.one_by_one(race.everyday, fused=False),
        "lean loop": lambda: race.one_by_one(race.lean, fused=True),
    }
    seconds, found = {}, {}
    for name, way in ways.items():
        clock = time.perf_counter()
        weights = way()
        seconds[name] = time.perf_counter() - clock
        right = predict(race.program, weights, test[0]).argmax(-1) == test[1]
        scores = 100 * right.float().mean(1)
        console.print(
            f"{len(race.rows):4d} {race.name} {name:14s} {seconds[name]:7.1f} s  "
            f"{seconds[name] / seconds['together']:5.2f} x  accuracy "
            f"{scores.mean():.2f} ± {scores.std():.2f} %"
        )
        found[f"{name}, accuracy"] = round(float(scores.mean()), 2)
    ratios = {name: round(s / seconds["together"], 2) for name, s in seconds.items()}
    return {"seconds": round(seconds["together"], 2), **ratios, **found}


def scaling(race: Race, options: BenchmarkOptions, console: Console) -> dict[str, float]:
    """Network steps per second over the number of networks trained together."""
    rates = {}
    for count in options.curve:
        rows = [race.rows[i % len(race.rows)] for i in range(count)]
        epochs = options.curve_steps * options.batch_size / len(rows[0])
        short = replace(race, rows=rows, epochs=epochs)
        _ = short.program  # traced before the clock starts
        clock = time.perf_counter()
        short.together()
        rates[count] = round(count * options.curve_steps / (time.perf_counter() - clock))
        console.print(f"{count:4d} {race.name} together {rates[count]:8,d} network steps per s")
    return rates


def measure(options: BenchmarkOptions) -> None:
    """Measure it, and end with a line of JSON.

    Args:
        options: What is measured.
    """
    console = Console()
    generator = torch.Generator().manual_seed(0)
    split = split_task(load_task(options.task))

    def race(
        name: str, widths: tuple[int, ...], split: TaskSplit, count: int, size: int, epochs: float
    ) -> Race:
        free, task = split.rows("segments"), split.task
        drawn = [torch.randperm(len(free), generator=generator)[:size] for _ in range(count)]

        def network() -> nn.Module:
            return architectures.build(name, task.inputs.shape[1:], task.classes, widths=widths)

        return Race(name, task, network, [free[rows] for rows in drawn], epochs, options)

    small = split_task(load_task(options.small))
    mlps = race("mlp", WIDE, split, options.mlps, options.rows, options.epochs)
    cnns = race("cnn", MAPS, split, options.cnns, options.cnn_rows, options.cnn_epochs)
    amount = (options.small_rows, options.small_epochs)
    small_cnns = race("cnn", MAPS, small, options.cnns, *amount)
    small_mlps = race("mlp", NARROW, small, options.mlps, *amount)
    test = split.images("test")
    details = {
        "mlp": raced(mlps, test, console),
        "cnn": raced(cnns, tuple(t[:2000] for t in test), console),
        "cnn, small images": raced(small_cnns, small.images("test"), console),
        "mlp, small images": raced(small_mlps, small.images("test"), console),
        "steps_per_second": scaling(mlps, options, console),
        "threads": torch.get_num_threads(),
    }
    print(
        json.dumps(
            {
                "name": "zoo_training",
                "value": details["mlp"]["everyday loop"],
                "unit": "x",
                "against": "DataLoader and torch.optim.AdamW, one network after another",
                "details": details,
            }
        )
    )


def main() -> None:
    """Entry point of ``python -m evaluation.benchmarks.zoo_training``."""
    command(BenchmarkOptions, measure, prog="python -m evaluation.benchmarks.zoo_training")


if __name__ == "__main__":
    main()
