"""Scores of classifiers from their logits, whatever the axes of networks before them.

Shape comments: b inputs, c classes, s segments.
"""

from collections.abc import Sequence
from math import log
from typing import NamedTuple

import torch
from torch import Tensor

BINS = 15  # of the confidence


class Reliability(NamedTuple):
    """What happens to inputs by the confidence of their predictions.

    Attributes:
        share: Share of the inputs in every bin, ``[..., bins]``.
        confidence: Their mean confidence; NaN where there are none.
        accuracy: Their accuracy; NaN where there are none.
    """

    share: Tensor
    confidence: Tensor
    accuracy: Tensor


class Answers(NamedTuple):
    """What networks say to every input.

    Attributes:
        right: 1 where the largest logit is that of the class, else 0; ``[..., b]``.
        confidence: Largest probability, ``[..., b]``.
        loss: Minus the logarithm of the probability of the class, ``[..., b]``.
    """

    right: Tensor
    confidence: Tensor
    loss: Tensor


def classification_scores(
    logits: Tensor, targets: Tensor, *, segments: Sequence[Tensor] = (), bins: int = BINS
) -> dict[str, Tensor]:
    """All scores of classifiers at once.

    Args:
        logits: Logits or log-probabilities ``[..., b, c]``.
        targets: ``[b]``, or one row per network, ``[..., b]``.
        segments: Inputs that are to be scored apart, an index of rows each.
        bins: Of the calibration error.

    Returns:
        ``accuracy``, ``negative_log_likelihood`` and ``calibration_error``, each ``[...]``,
        ``class_accuracies`` ``[..., c]`` and, if there are any, ``segment_accuracies``
        ``[..., s]``.
    """
    answers = read_answers(logits, targets)
    scores = {
        "accuracy": answers.right.mean(-1),
        "negative_log_likelihood": answers.loss.mean(-1),
        "calibration_error": _gap(_binned(answers, bins)),
        "class_accuracies": _by_class(answers.right, targets, logits.shape[-1]),
    }
    if segments:
        scores["segment_accuracies"] = _by_segment(answers.right, segments)
    return scores


def read_answers(logits: Tensor, targets: Tensor) -> Answers:
    """Compare logits with classes, without a tensor of all probabilities.

    Args:
        logits: Logits or log-probabilities ``[..., b, c]``.
        targets: ``[b]``, or ``[..., b]``.

    Returns:
        What the scores are made of.
    """
    targets = targets.expand(logits.shape[:-1])
    by_class = logits.transpose(-1, -2).contiguous()  # [..., c, b], since b is larger than c
    top = by_class.amax(-2)
    below = by_class - top[..., None, :]
    above = below.exp().sum(-2).log()  # the maximum is known by now
    own = by_class.gather(-2, targets[..., None, :]).squeeze(-2)
    right = own == top
    if int((below == 0).count_nonzero()) != right.numel() or bool(above.isnan().any()):
        right = logits.argmax(-1) == targets  # of equal logits the first counts
    return Answers(right.to(logits.dtype), (-above).exp(), top + above - own)


def accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    """Share of inputs whose largest logit is that of their class.

    Args:
        logits: Logits or probabilities ``[..., b, c]``.
        targets: ``[b]``, or ``[f, b]`` for families that number classes by themselves.

    Returns:
        ``[...]``.
    """
    return (logits.argmax(-1) == targets).float().mean(-1)


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of minus the logarithm of the probability of the right class, in nats.

    Args:
        logits: Logits or log-probabilities ``[..., b, c]``.
        targets: ``[b]``, or ``[..., b]``.

    Returns:
        ``[...]``.
    """
    return read_answers(logits, targets).loss.mean(-1)


def calibration_error(logits: Tensor, targets: Tensor, *, bins: int = BINS) -> Tensor:
    """Expected calibration error: mean gap between confidence and accuracy.

    Paper: Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks", ICML 2017,
    arXiv:1706.04599, equation 3: bins of equal width, ``(i / bins, (i + 1) / bins]``.

    Args:
        logits: Logits or log-probabilities ``[..., b, c]``.
        targets: ``[b]``, or ``[..., b]``.
        bins: Number of bins.

    Returns:
        ``[...]``, from 0 to 1.
    """
    return _gap(_binned(read_answers(logits, targets), bins))


def reliability(logits: Tensor, targets: Tensor, *, bins: int = BINS) -> Reliability:
    """The bins behind the calibration error, for a reliability diagram.

    Args:
        logits: Logits or log-probabilities ``[..., b, c]``.
        targets: ``[b]``, or ``[..., b]``.
        bins: Number of bins.

    Returns:
        Share, confidence and accuracy of every bin.
    """
    return _binned(read_answers(logits, targets), bins)


def class_accuracies(logits: Tensor, targets: Tensor) -> Tensor:
    """Accuracy on the inputs of every class (its recall).

    Args:
        logits: Logits or probabilities ``[..., b, c]``.
        targets: ``[b]``, or ``[..., b]``.

    Returns:
        ``[..., c]``; NaN for classes without inputs.
    """
    right = (logits.argmax(-1) == targets).float()
    return _by_class(right, targets, logits.shape[-1])


def mixture_accuracies(by_class: Tensor, counts: Tensor) -> Tensor:
    """Accuracy that is to be expected on segments of given classes, from that on every class.

    Other images of a skewed segment do not exist; those of its classes do.

    Args:
        by_class: ``class_accuracies``, ``[..., c]``.
        counts: Images of every class in each segment, ``[s, c]``.

    Returns:
        ``[..., s]``; NaN where a class was not scored that a segment has.
    """
    share = counts.to(by_class) / counts.sum(-1, keepdim=True)  # [s, c]
    weighted = torch.where(share > 0, share * by_class[..., None, :], 0.0)
    return weighted.sum(-1)


def references(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """What a merge of each family is measured against.

    Args:
        logits: Logits of all members, ``[f, m, b, c]``.
        targets: ``[b]``.

    Returns:
        ``best_member``, ``mean_member`` and ``ensemble`` (soft vote), each ``[f]``.
    """
    members = accuracy(logits, targets)  # [f, m]
    return {
        "best_member": members.amax(1),
        "mean_member": members.mean(1),
        "ensemble": accuracy(logits.softmax(-1).mean(1), targets),
    }


def soft_vote(logits: Tensor) -> Tensor:
    """Log-probabilities of an ensemble: the logarithm of its members' mean probability.

    Args:
        logits: Logits of all members, ``[..., m, b, c]``.

    Returns:
        ``[..., b, c]``; every score takes them for logits.
    """
    each = logits - logits.logsumexp(-1, keepdim=True)  # log_softmax takes ten times as long
    return each.logsumexp(-3) - log(logits.shape[-3])


def agreement(logits: Tensor, others: Tensor) -> Tensor:
    """Share of inputs on which two say the same, such as a fused network and the ensemble.

    Args:
        logits: Logits or probabilities ``[..., b, c]``.
        others: Those of the others.

    Returns:
        ``[...]``, from 0 to 1.
    """
    return (logits.argmax(-1) == others.argmax(-1)).float().mean(-1)


def _binned(answers: Answers, bins: int) -> Reliability:
    place = ((answers.confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    count = _sums(torch.ones_like(answers.confidence), place, bins)
    confidence = _sums(answers.confidence, place, bins) / count
    right = _sums(answers.right, place, bins) / count
    return Reliability(count / place.shape[-1], confidence, right)


def _gap(bins: Reliability) -> Tensor:
    return (bins.share * (bins.confidence - bins.accuracy).abs()).nansum(-1)


def _by_class(right: Tensor, targets: Tensor, classes: int) -> Tensor:
    place = targets.expand(right.shape)
    return _sums(right, place, classes) / _sums(torch.ones_like(right), place, classes)


def _by_segment(right: Tensor, segments: Sequence[Tensor]) -> Tensor:
    return torch.stack([right[..., rows].mean(-1) for rows in segments], -1)


def _sums(values: Tensor, place: Tensor, places: int) -> Tensor:
    """Sums of values ``[..., b]`` by place, ``[..., places]``."""
    sums = values.new_zeros(*values.shape[:-1], places)
    return sums.scatter_add_(-1, place, values)
