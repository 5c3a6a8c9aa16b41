"""Scale: try factors on the layers of fused weights, and keep those that predict best.

No paper. Averages of networks that were trained apart are too short: directions on which members do
not agree cancel, and with every layer more is lost. One or a few factors need few inputs. In a
network with one hidden layer they change little but the confidence.

Shape comments: f families, m members, g factors, l layers, b inputs, c classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metamerge.calibration import check_fit, divergence, predict, targets
from metamerge.corrections.batch_norm import recalibrate
from metamerge.errors import ConfigError
from metamerge.options import check_choice, check_number
from metamerge.registry import correction
from metamerge.structure import Layout
from metamerge.weights import Weights

_PER = ("model", "layer")
_GRID = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0)
_MARGIN = (
    1e-5  # by which a factor has to be better than 1, relative to the loss: more than rounding
)


@correction()
def scale(
    fused: Weights,
    members: Weights,
    layout: Layout,
    inputs: Tensor,
    *,
    labels: Tensor | None = None,
    report: dict[str, Any] | None = None,
    per: str = "model",
    grid: Sequence[float] = _GRID,
) -> Weights:
    """Scale weights and biases of linear maps and convolutions by the best factors of a grid.

    Parameters of normalisations, embeddings and whatever else is no layer are not scaled, nor are
    layers that are used twice or share a weight. Running statistics are measured anew for every
    factor, so a layer that a batch normalisation reads keeps a factor of 1: it changes nothing.

    Args:
        fused: Fused weights of ``f`` families, ``[f, ...]``.
        members: Their aligned members, ``[f, m, ...]``.
        layout: Layers of the architecture; its output is logits.
        inputs: Calibration inputs, ``[b, ...]``.
        labels: Their classes ``[b]``: factors are judged by the cross entropy, without labels by
            the divergence from the members' soft vote.
        report: Takes what it was ``judged_by``, the chosen ``scales`` (one per layer), the ``grid``
            and the ``curve`` of losses over it, or one curve per layer.
        per: ``model`` for one factor on all layers; ``layer`` for one each, chosen one after the
            other from input to output.
        grid: Factors that are tried, above 0; 1 is tried in any case.

    Returns:
        New weights ``[f, ...]``.

    Raises:
        ConfigError: If an option is out of its range, or inputs or labels do not fit the network.
        StructureError: If the network has layers that cannot be followed.
    """
    dtype = inputs.dtype if inputs.is_floating_point() else None  # tokens are whole numbers
    factors = _checked(per, grid).to(inputs.device, dtype)  # [g]
    check_fit(layout.program, inputs)
    wanted = _wanted(members, layout, inputs, labels)
    layers = [layer.weight for layer in layout.unshared]
    families = len(next(iter(fused.values())))
    scales, curves = factors.new_ones(families, len(layers)), {}
    turns = {"model": slice(None)} if per == "model" else {k: [i] for i, k in enumerate(layers)}
    for name, chosen in turns.items():
        trials = scales[:, None].repeat(1, len(factors), 1)  # [f, g, l]
        trials[..., chosen] = factors[:, None]
        losses = _losses(_scaled(fused, layout, trials), layout, inputs, wanted)  # [f, g]
        scales[:, chosen] = _best(losses, factors)[:, None]
        curves[name] = losses
    if report is not None:
        report["judged_by"] = "soft vote" if labels is None else "labels"
        report["grid"] = [round(float(factor), 6) for factor in factors]
        report["scales"] = {key: _plain(own) for key, own in zip(layers, scales.mT, strict=True)}
        report["curve"] = {name: _plain(losses) for name, losses in curves.items()}
    return {key: t[:, 0] for key, t in _scaled(fused, layout, scales[:, None]).items()}


def _wanted(members: Weights, layout: Layout, inputs: Tensor, labels: Tensor | None) -> Tensor:
    """Probabilities to be predicted, ``[f, 1, b, c]`` or ``[b, c]``."""
    shape = next(iter(members.values())).shape[:2]
    flat = {key: t.detach().flatten(0, 1) for key, t in members.items()}
    wanted = targets(predict(flat, layout, inputs).unflatten(0, shape), labels)
    return wanted[:, None] if labels is None else wanted


def _scaled(fused: Weights, layout: Layout, factors: Tensor) -> Weights:
    """Copies of fused weights with factors ``[f, g, l]`` on their layers, ``[f, g, ...]``."""
    copies = {key: t[:, None].repeat_interleave(factors.shape[1], 1) for key, t in fused.items()}
    for layer, own in zip(layout.unshared, factors.unbind(2), strict=True):
        for key in filter(None, (layer.weight, layer.bias)):
            copies[key] = copies[key] * own.reshape(*own.shape, *[1] * (copies[key].ndim - 2))
    for alias, key in layout.program.tied.items():
        if alias in copies:
            copies[alias] = copies[key].clone()
    return copies


@torch.no_grad()
def _losses(copies: Weights, layout: Layout, inputs: Tensor, wanted: Tensor) -> Tensor:
    """Losses of copies ``[f, g, ...]``, all of them run at once: ``[f, g]``."""
    shape = next(iter(copies.values())).shape[:2]
    flat = {key: t.flatten(0, 1) for key, t in copies.items()}
    measured = recalibrate(flat, layout.program, inputs)
    losses = divergence(predict(measured, layout, inputs).unflatten(0, shape), wanted)
    return losses.nan_to_num(nan=torch.inf)


def _best(losses: Tensor, factors: Tensor) -> Tensor:
    """The factor of each family, ``[f]``: 1 unless another one is better by more than rounding."""
    least, index = losses.min(1)
    one = losses[:, factors == 1].squeeze(1)
    return torch.where(least < one - _MARGIN * one.abs(), factors[index], 1.0)


def _plain(values: Tensor) -> Any:
    """Numbers of each family, or of the only one."""
    rounded = values.double().mul(1e6).round() / 1e6
    return (rounded[0] if len(values) == 1 else rounded).tolist()


def _checked(per: str, grid: Sequence[float]) -> Tensor:
    """The grid, sorted, with 1 in it."""
    check_choice("scale", "per", per, _PER)
    if not isinstance(grid, Sequence) or isinstance(grid, str):
        raise ConfigError(f"scale: grid must hold numbers above 0, got {grid!r}.")
    for index, factor in enumerate(grid):
        check_number("scale", f"grid[{index}]", factor, "(0, inf)")
    return torch.tensor(sorted({1.0, *map(float, grid)}))
