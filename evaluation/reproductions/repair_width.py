"""REPAIR by width, again: ``python -m evaluation.reproductions.repair_width``.

Paper: Jordan, Sedghi, Saukh, Entezari and Neyshabur, "REPAIR: REnormalizing Permuted Activations
for Interpolation Repair", ICLR 2023, arXiv:2211.08403: Fashion-MNIST, multi-layer perceptrons with
ten hidden-to-hidden layers and no normalisation, of growing width. They train for 100 epochs; the
default here is shorter, and how well two networks merge depends on it: look at members first.
They match units by their activations.
"""

from dataclasses import dataclass
from functools import partial

from rich.console import Console
from torch import Tensor

from evaluation.compare import terminal
from evaluation.reproductions.pairs import pair_scores, train_pairs
from evaluation.reproductions.sizes import Experiment, run_sizes
from metamerge.structure import Layout, discover_program
from zoo.architectures import mlp, program_of
from zoo.options import command
from zoo.tasks import Task, load_task

OUTPUTS = 10
FIGURES = ("members", "plain", "matched_activations", "repaired_activations")
PUBLISHED = {  # width -> accuracy in %
    128: dict(zip(FIGURES, (87.9, 10.0, 26.7, 70.1), strict=True)),
    512: dict(zip(FIGURES, (89.4, 10.0, 14.9, 73.5), strict=True)),
}


@dataclass(frozen=True)
class WidthOptions:
    """Merge two deep Fashion-MNIST networks of growing width, as REPAIR's paper does."""

    data: str | None = None  # folder with the IDX files of Fashion-MNIST
    out: str = "runs/repair_width"  # folder of the table and its picture
    widths: tuple[int, ...] = (64, 128, 256)  # units per hidden layer; the paper has 512 as well
    depth: int = 10  # hidden-to-hidden layers
    pairs: int = 3  # pairs of networks per width
    epochs: float = 15.0  # passes over the training images; 100 in the paper
    batch_size: int = 128  # images per step
    lr: float = 1e-3  # AdamW's learning rate at the start; falls to 0 linearly
    weight_decay: float = 0.1  # decoupled weight decay
    calibration: int = 2000  # training images that corrections are measured on
    images: int = 0  # training images; 0 for all
    seed: int = 0  # seed of inits and order of images


def width_scores(options: WidthOptions, task: Task, width: int) -> dict[str, Tensor]:
    """Train pairs of one width and merge them.

    Args:
        options: Of the run.
        task: Fashion-MNIST.
        width: Units per hidden layer.

    Returns:
        Name -> test accuracy of every pair.
    """
    shape = tuple(task.inputs.shape[1:])
    factory = partial(mlp, shape, OUTPUTS, widths=(width,) * (options.depth + 1))
    program = program_of(factory(), shape)
    pairs = train_pairs(factory, program, task, options)
    return pair_scores(pairs, Layout(program, discover_program(program)), task, options)


def repair_width(options: WidthOptions, console: Console) -> dict[int, dict]:
    """Run all widths, print the table and write the files; widths that are done are kept.

    Args:
        options: Of the run.
        console: Where to print.

    Returns:
        Width -> its row.
    """
    experiment = Experiment(
        name="repair_width",
        title=f"Fashion-MNIST, MLPs with {options.depth} hidden-to-hidden layers, two members, "
        f"{options.epochs:g} epochs",
        size="width",
        axis="units per hidden layer",
        published=PUBLISHED,
    )
    task = load_task("fashion-mnist", options.data)
    return run_sizes(experiment, options, task, width_scores, console)


def main() -> None:
    """Entry point of ``python -m evaluation.reproductions.repair_width``."""
    prog = "python -m evaluation.reproductions.repair_width"
    command(WidthOptions, lambda options: repair_width(options, terminal()), prog=prog)


if __name__ == "__main__":
    main()
