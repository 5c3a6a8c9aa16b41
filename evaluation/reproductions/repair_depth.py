"""REPAIR by depth, again: ``python -m evaluation.reproductions.repair_depth``.

Paper: Jordan, Sedghi, Saukh, Entezari and Neyshabur, "REPAIR: REnormalizing Permuted Activations
for Interpolation Repair", ICLR 2023, arXiv:2211.08403: MNIST, multi-layer perceptrons of width 128
with 1 to 25 hidden-to-hidden layers, trained with batch normalisation, which is fused into the
linear layers before two of them are merged. They match units by their activations. How they train
is not known here, and how well two networks merge depends on it: look at members first.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from rich.console import Console
from torch import Tensor, nn

from evaluation.compare import terminal
from evaluation.reproductions.pairs import pair_scores, train_pairs
from evaluation.reproductions.sizes import Experiment, run_sizes
from metamerge.structure import Layout, discover_program
from metamerge.weights import Weights
from zoo.architectures import mlp, program_of
from zoo.options import command
from zoo.tasks import Task, load_task

WIDTH, OUTPUTS = 128, 10
FIGURES = ("members", "plain", "matched_activations", "repaired_activations")
PUBLISHED = {  # hidden-to-hidden layers -> accuracy in %
    1: dict(zip(FIGURES, (98.1, 39.6, 96.8, 97.5), strict=True)),
    5: dict(zip(FIGURES, (98.3, 10.6, 93.5, 95.9), strict=True)),
    10: dict(zip(FIGURES, (98.3, 9.7, 81.2, 95.3), strict=True)),
    25: dict(zip(FIGURES, (98.1, 10.1, 22.2, 92.6), strict=True)),
}


@dataclass(frozen=True)
class DepthOptions:
    """Merge two MNIST networks of width 128 and growing depth, as REPAIR's paper does."""

    data: str | None = None  # folder with the IDX files of MNIST
    out: str = "runs/repair_depth"  # folder of the table and its picture
    depths: tuple[int, ...] = (1, 5, 10, 25)  # hidden-to-hidden layers
    pairs: int = 3  # pairs of networks per depth
    epochs: float = 6.0  # passes over the training images
    batch_size: int = 128  # images per step
    lr: float = 3e-3  # AdamW's learning rate at the start; falls to 0 linearly
    weight_decay: float = 0.1  # decoupled weight decay
    calibration: int = 2000  # training images that corrections are measured on
    images: int = 0  # training images; 0 for all
    seed: int = 0  # seed of inits and order of images


def normalised_mlp(shape: tuple[int, ...], depth: int, width: int = WIDTH) -> nn.Sequential:
    """Multi-layer perceptron with batch normalisation before every ReLU.

    Args:
        shape: Shape of one input.
        depth: Hidden-to-hidden layers.
        width: Units per hidden layer.

    Returns:
        The network with PyTorch's default init.
    """
    layers: list[nn.Module] = []
    for layer in mlp(shape, OUTPUTS, widths=(width,) * (depth + 1)):
        layers.append(layer)
        if isinstance(layer, nn.Linear) and layer.out_features == width:
            layers.append(nn.BatchNorm1d(width))
    return nn.Sequential(*layers)


def fused(weights: Weights, network: nn.Sequential) -> Weights:
    """Fold every batch normalisation into the linear layer before it.

    Args:
        weights: Stacked networks of ``normalised_mlp``, ``[..., *]``.
        network: One of them, which tells where its layers lie and the ``eps`` of each.

    Returns:
        Weights of the same functions as ``zoo.architectures.mlp`` of the same widths.
    """
    kept = [(str(i), layer) for i, layer in enumerate(network)]
    norms = {kept[i - 1][0]: (own, norm) for i, (own, norm) in enumerate(kept) if _is_norm(norm)}
    plain, place = {}, 0
    for own, layer in kept:
        if _is_norm(layer):
            continue
        if isinstance(layer, nn.Linear):
            weight, bias = weights[f"{own}.weight"], weights[f"{own}.bias"]
            if own in norms:
                key, norm = norms[own]
                scale = weights[f"{key}.weight"] / (weights[f"{key}.running_var"] + norm.eps).sqrt()
                weight = weight * scale[..., None]
                bias = weights[f"{key}.bias"] + scale * (bias - weights[f"{key}.running_mean"])
            plain[f"{place}.weight"], plain[f"{place}.bias"] = weight, bias
        place += 1
    return plain


def _is_norm(layer: nn.Module) -> bool:
    return isinstance(layer, nn.BatchNorm1d)


def depth_scores(options: DepthOptions, task: Task, depth: int) -> dict[str, Tensor]:
    """Train pairs of one depth and merge them.

    Args:
        options: Of the run.
        task: MNIST.
        depth: Hidden-to-hidden layers.

    Returns:
        Name -> test accuracy of every pair.
    """
    shape = tuple(task.inputs.shape[1:])
    factory: Callable[[], nn.Sequential] = partial(normalised_mlp, shape, depth)
    pairs = train_pairs(factory, program_of(factory(), shape), task, options)
    plain = program_of(mlp(shape, OUTPUTS, widths=(WIDTH,) * (depth + 1)), shape)
    layout = Layout(plain, discover_program(plain))
    return pair_scores(fused(pairs, factory()), layout, task, options)


def repair_depth(options: DepthOptions, console: Console) -> dict[int, dict]:
    """Run all depths, print the table and write the files; depths that are done are kept.

    Args:
        options: Of the run.
        console: Where to print.

    Returns:
        Depth -> its row.
    """
    experiment = Experiment(
        name="repair_depth",
        title=f"MNIST, MLPs of width {WIDTH}, two members, {options.epochs:g} epochs",
        size="depth",
        axis="hidden-to-hidden layers",
        published={depth: PUBLISHED[depth] for depth in options.depths if depth in PUBLISHED},
    )
    task = load_task("mnist", options.data)
    return run_sizes(experiment, options, task, depth_scores, console)


def main() -> None:
    """Entry point of ``python -m evaluation.reproductions.repair_depth``."""
    prog = "python -m evaluation.reproductions.repair_depth"
    command(DepthOptions, lambda options: repair_depth(options, terminal()), prog=prog)


if __name__ == "__main__":
    main()
