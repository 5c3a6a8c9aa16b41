"""Fisher average: every parameter counts by how much its member's predictions depend on it.

Paper: Matena and Raffel, "Merging Models with Fisher-Weighted Averaging", NeurIPS 2022,
arXiv:2111.09832.

Shape comments: m members, b inputs, c classes.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from metamerge.calibration import Batches, check_fit, check_logits, collect, predict
from metamerge.methods._combination import combine, restore
from metamerge.methods._squared_gradients import squared_gradients
from metamerge.options import check_choice, check_number
from metamerge.registry import merge_method
from metamerge.structure import Layout
from metamerge.weights import Weights, stack, widened

_FISHER = ("expected", "sampled", "empirical")
_CLASSES = 20  # of more classes one is drawn per input


@merge_method(paper="arXiv:2111.09832")
def fisher_average(
    weights: Sequence[Weights],
    *,
    layout: Layout,
    batches: Batches,
    fisher: str = "expected",
    normalise: bool = True,
    floor: float = 1e-6,
    generator: torch.Generator | None = None,
    report: dict[str, Any] | None = None,
) -> Weights:
    """Average members, every parameter weighted by its diagonal Fisher information.

    The information is the mean square of the gradient of the log probability of a class with
    respect to the parameter, input by input. Running statistics, and parameters on which nothing
    depends in any member, are averaged with equal weights.

    Args:
        weights: One state dict per member, of one architecture.
        layout: That architecture; its output is logits.
        batches: Calibration inputs; with labels for ``empirical``.
        fisher: ``expected`` over the classes that the member itself predicts, which takes one pass
            back per class; ``sampled`` with one class drawn per input, as ``expected`` does it too
            where there are more than 20; ``empirical`` at the labels.
        normalise: Whether each member's information is divided by its root mean square first, so
            that no member counts more for having larger gradients.
        floor: Added to the information, relative to that root mean square; above 0.
        generator: Draws classes, the same quantiles for all members; without it a fixed seed.
        report: Takes ``fisher``, the number of ``inputs``, the ``root_mean_square`` of each
            member's information, and ``shares``, what each member counts in the mean.

    Returns:
        New state dict with the members' names, shapes and dtypes.

    Raises:
        ConfigError: If an option is out of its range, or the batches do not fit the network.
    """
    _check(fisher, normalise, floor)
    if len(weights) == 1:
        return combine(weights, [1.0])
    inputs, labels = collect(batches, labelled=fisher == "empirical")
    check_fit(layout.program, inputs)
    if fisher == "empirical":
        check_logits(predict(stack(widened(weights[:1])), layout, inputs[:1]), labels)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    members = {key: t.detach() for key, t in stack(widened(weights)).items()}
    pick = partial(
        _classes,
        exact=fisher == "expected",
        labels=labels if fisher == "empirical" else None,
        quantiles=torch.rand(len(inputs), generator=generator).to(inputs.device),
    )
    summed = squared_gradients(members, layout, inputs, pick)
    information = {key: t / len(inputs) for key, t in summed.items()}
    scale = _root_mean_square(information)  # [m]
    shares = _shares(information, scale if normalise else scale.mean().expand_as(scale), floor)
    if report is not None:
        report.update(fisher=fisher, inputs=len(inputs), root_mean_square=scale.tolist())
        whole = torch.cat([share[..., None].flatten(1) for share in shares.values()], 1)
        report["shares"] = [round(float(share), 4) for share in whole.mean(1)]
    return restore(_averaged(weights, shares), weights)


def _classes(
    probabilities: Tensor, rows: Tensor, exact: bool, labels: Tensor | None, quantiles: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Classes to take the gradient at, and their weights in the expectation, both ``[m, b]``."""
    one, count = torch.ones_like(probabilities[..., 0]), probabilities.shape[-1]
    if labels is not None:
        yield labels[rows].expand(one.shape), one
    elif exact and count <= _CLASSES:
        for index in range(count):
            yield torch.full_like(one, index, dtype=torch.long), probabilities[..., index]
    else:
        drawn = (probabilities.cumsum(-1) < quantiles[rows, None]).sum(-1)
        yield drawn.clamp_max(count - 1), one


def _root_mean_square(information: Weights) -> Tensor:
    """Of all entries of each member, ``[m]``; in float64, where squares do not underflow."""
    entries = torch.cat([t.double()[..., None].flatten(1) for t in information.values()], 1)
    return entries.square().mean(1).sqrt()


def _shares(information: Weights, scale: Tensor, floor: float) -> Weights:
    """What every member counts in the mean of every entry, ``[m, ...]``; they sum to 1."""
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    shares = {}
    for key, tensor in information.items():
        relative = tensor.double() * inverse.reshape(-1, *[1] * (tensor.ndim - 1)) + floor
        shares[key] = relative / relative.sum(0)
    return shares


def _averaged(weights: Sequence[Weights], shares: Weights) -> Weights:
    """Weighted mean of floating tensors; those without shares are averaged."""
    mean = {}
    for key, tensor in stack(weights).items():
        if tensor.is_floating_point():
            wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
            mean[key] = (shares[key].to(wide) * wide).sum(0) if key in shares else wide.mean(0)
    return mean


def _check(fisher: str, normalise: bool, floor: float) -> None:
    check_choice("fisher_average", "fisher", fisher, _FISHER)
    check_choice("fisher_average", "normalise", normalise, (False, True))
    check_number("fisher_average", "floor", floor, "(0, inf)")
