"""Convolutional consensus: one small network reads every cell of the members x classes table.

No paper: the network is this package's own. A cell is what one member says about one class, and how
it did on labelled inputs of that class. The same 1x1 convolutions read all cells, and what they say
about a class is added up over members, on top of the soft vote. So neither the order of the members
nor that of the classes matters, and there are some sixty numbers to fit, however many members.

Shape comments: m members, b inputs, c classes, h hidden channels, r fits side by side.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metamerge.ensembles.fitting import Scores, fit
from metamerge.ensembles.kinds import consensus
from metamerge.ensembles.votes import log_soft_vote
from metamerge.ensembles.watching import Seen, check_labels, check_outputs, spread
from metamerge.options import check_count

STRENGTHS = (1e-1, 1e-2, 1e-3, 1e-4)
CHANNELS = 7  # of a cell; see ``_cells``
TURNS = 3  # folds that are held out in turn; five take longer


@consensus()
def convolutional_consensus(
    seen: Seen,
    labels: Tensor,
    *,
    hidden: int = 8,
    generator: torch.Generator | None = None,
    report: dict[str, Any] | None = None,
) -> "ConvolutionalConsensus":
    """Fit the convolutions to labelled inputs, from a start that is the soft vote.

    Args:
        seen: What members say about the inputs.
        labels: Their classes, ``[b]``.
        hidden: Channels between the two convolutions, 1 or more.
        generator: Draws the first convolution, and deals inputs to the folds that choose the ridge.
        report: Takes the ridge and the losses on held-out inputs.

    Returns:
        The consensus.

    Raises:
        ConfigError: If ``hidden`` is no such number, or labels do not fit the outputs.
    """
    check_outputs("convolutional_consensus", seen.outputs)
    check_labels("convolutional_consensus", labels, seen.outputs)
    check_count("convolutional_consensus", "hidden", hidden, 1)
    generator = generator or torch.Generator().manual_seed(0)
    logits = seen.outputs.double()
    scale, vote = spread(logits), log_soft_vote(logits)

    def scores_of(known: Tensor) -> Scores:  # held-out inputs have no part in the records either
        cells = _cells(logits, scale, _records(logits, labels, known.double()))
        return lambda numbers: vote + _read(cells, numbers)

    start = _start(hidden, generator).to(logits)
    found = fit(scores_of, start, labels, strengths=STRENGTHS, generator=generator, turns=TURNS)
    if report is not None:
        report.update(found.told)
    records = _records(logits, labels, torch.ones_like(labels).double()[None])[0]
    return ConvolutionalConsensus(found.numbers.float(), scale.float(), records.float())


class ConvolutionalConsensus(nn.Module):
    """The soft vote with what two 1x1 convolutions read in the table of cells added to its scores.

    Args:
        numbers: Per hidden channel what it reads, its shift, and what it counts,
            ``[h, CHANNELS + 2]``.
        scale: What logits are divided by, ``[m]``.
        records: How the members did on labelled inputs, ``[2, m, c]``: recall and precision.
    """

    options: dict = {}  # noqa: RUF012  (nothing to choose)

    def __init__(self, numbers: Tensor, scale: Tensor, records: Tensor) -> None:
        super().__init__()
        self.register_buffer("numbers", numbers)
        self.register_buffer("scale", scale)
        self.register_buffer("records", records)

    def forward(self, seen: Seen) -> Tensor:
        """Logarithms of probabilities, ``[m, b, c]`` -> ``[b, c]``."""
        check_outputs("convolutional_consensus", seen.outputs, len(self.scale))
        cells = _cells(seen.outputs, self.scale, self.records[None])
        added = _read(cells, self.numbers[None])[0]
        return (log_soft_vote(seen.outputs) + added).log_softmax(-1)


def _records(logits: Tensor, labels: Tensor, known: Tensor) -> Tensor:
    """Recall and precision per member and class on known inputs, ``[r, b]`` -> ``[r, 2, m, c]``."""
    classes = logits.shape[-1]
    said = F.one_hot(logits.argmax(-1), classes).double()  # [m, b, c]
    true = F.one_hot(labels, classes).double()  # [b, c]
    hits = torch.einsum("rb,mbc->rmc", known, said * true)
    called = torch.einsum("rb,mbc->rmc", known, said)
    there = (known @ true)[:, None]
    # a success and a failure that never were keep classes of few inputs from 0 and 1
    return torch.stack([(hits + 1) / (there + 2), (hits + 1) / (called + 2)], 1)


def _cells(logits: Tensor, scale: Tensor, records: Tensor) -> Tensor:
    """The table ``[m, b, c]`` with its channels in front, ``[r, CHANNELS, m, b, c]``."""
    probabilities = logits.softmax(-1)
    centred = (logits - logits.mean(-1, keepdim=True)) / scale[:, None, None]
    recall, precision = records[:, :, :, None].unbind(1)  # [r, m, 1, c]
    channels = [
        *(probabilities, centred, probabilities.mean(0), recall, precision),
        *(probabilities * recall, probabilities * precision),
    ]
    shape = (len(records), *logits.shape)
    return torch.stack([channel.expand(shape) for channel in channels], 1)


def _read(cells: Tensor, numbers: Tensor) -> Tensor:
    """Sum of the convolutions' outputs over members, ``[r, h, CHANNELS + 2]`` -> ``[r, b, c]``."""
    kernel, shift, counts = numbers.split([CHANNELS, 1, 1], -1)  # [r, h, *]
    hidden = (kernel @ cells.flatten(2) + shift).relu()  # [r, h, m * b * c]
    return (counts.mT @ hidden).reshape(len(numbers), *cells.shape[2:]).sum(1)


def _start(hidden: int, generator: torch.Generator) -> Tensor:
    """A random first convolution and, behind it, nothing: the soft vote."""
    start = torch.randn(hidden, CHANNELS + 2, generator=generator, dtype=torch.float64)
    start[:, -1] = 0
    return start
