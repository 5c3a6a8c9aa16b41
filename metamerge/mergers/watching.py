"""Watching: the inputs that members are shown, and whom these say not to fuse.

A merger's own probes are best where its members are of its tasks. Where the probes are strange to
them, inputs that are made from the members stand beside them, or inputs that are given in their
place. Members that agree on nearly all of those are alike: every one of them knows what all know,
and a gate that has learned on other tasks is worse than the soft vote. The one that agrees most
with the others is kept then, or learns their soft vote on the inputs that are given; not where
members lie in one basin, whose middle is better than any of them.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metamerge.calibration import check_fit
from metamerge.mergers.gate import answers_of, is_choice
from metamerge.mergers.inversion import agreement, in_agreement, invert
from metamerge.mergers.reading import disagreement
from metamerge.structure import Layout
from metamerge.weights import Weights

ALIKE = 0.8  # median agreement on made inputs from which on a member is kept as it is
SAME = 0.86  # and median share of given inputs on which its vote is that of the others
NEAR = 0.2  # spread of weights over their mean square below which members lie in one basin
FEW = 100  # given inputs below which strange probes and made inputs are better than none
FEW_MAPS = 16  # the same for networks with convolutions, which take more harm from these
ENOUGH = 1000  # inputs from which on they need no probes beside them


class Watched(NamedTuple):
    """What some families are watched on.

    Attributes:
        families: Their numbers, ``[n]``.
        inputs: Inputs, ``[b, ...]``.
        told: What these are, in words.
        kept: Number of the member to be kept as it is, or to start from; None to fuse all.
        voters: Numbers of the members whose soft vote it is to learn, ``[n]``; None for no one's.
        given: Whether inputs are given, and stand alone: they are many, or probes are strange.
        spare: Probes that stand beside these inputs when networks are refined, ``[p, ...]``.
    """

    families: Tensor
    inputs: Tensor
    told: str
    kept: int | None = None
    voters: Tensor | None = None
    given: bool = False
    spare: Tensor | None = None


def watched_inputs(merger: nn.Module, members: Weights, layout: Layout) -> list[Watched]:
    """What members are to be watched on when nothing but weights is given.

    Args:
        merger: A merger, with ``probes`` and, in its ``config``, what is ``familiar``.
        members: Aligned members in canonical order, ``[f, m, ...]``; one family where the merger
            has no probes of their inputs' shape.
        layout: Their architecture.

    Returns:
        The merger's probes for all families to whose members they are familiar; for each of the
        others the probes and as many inputs that were made of them, and the number of the member to
        be kept, if they are alike. Inputs that had to be imagined are familiar to none.
    """
    probes = merger.probes.for_members(members, layout).detach()
    learned = merger.probes(probes.shape[1:]) is not None
    if learned:
        told, odd = f"{len(probes)} learned probes", strange(merger, members, layout, probes)
    else:
        told = f"{len(probes)} imagined inputs"
        odd = torch.ones(len(next(iter(members.values()))), dtype=torch.bool)
    spare = merger.probes.spare(probes.shape[1:])
    known = Watched((~odd).nonzero()[:, 0], probes, told, spare=spare)
    found = [known] if len(known.families) else []
    words = f"{told}{', strange to the members,' * learned} and {len(probes)} made from the members"
    grid = merger.probes.grid(probes.shape[1:])
    for family in odd.nonzero():
        own = {key: tensor[family.to(tensor.device)] for key, tensor in members.items()}
        made = invert(own, layout, probes, grid)
        kept, _ = spared(own, layout, made, given=False)
        found.append(Watched(family, torch.cat([probes, made]), words, kept))
    return found


def watched_beside(merger: nn.Module, members: Weights, layout: Layout, inputs: Tensor) -> Watched:
    """What members of one family are to be watched on when inputs are given.

    Args:
        merger: A merger, whose ``config`` says whether ``inputs`` are of use beside its probes.
        members: Aligned members in canonical order, ``[1, m, ...]``.
        layout: Their architecture.
        inputs: ``[b, ...]``.

    Returns:
        The inputs, and learned probes beside them where they are few. Where inputs have proved to
        be worth less than the merger's probes, these alone. Strange probes would do harm beside
        inputs, unless there are hardly any: then all that would be watched without inputs stands
        beside them. Of members that are alike on inputs that stand alone, one is to learn what all
        of them say.

    Raises:
        ConfigError: If the inputs are not those of this architecture.
    """
    check_fit(layout.program, inputs)
    one, told = torch.zeros(1, dtype=torch.long), f"{len(inputs)} inputs"
    probes = merger.probes(inputs.shape[1:])
    if probes is None or strange(merger, members, layout, probes.detach()).any():
        linear = all(layer.linear for layer in layout.layers)
        if len(inputs) >= (FEW if linear else FEW_MAPS):
            kept, voters = spared(members, layout, inputs, given=True)
            return Watched(one, inputs, told, kept, voters, given=True)
        (watched,) = watched_inputs(merger, members, layout)
        both = torch.cat([inputs, watched.inputs.to(inputs)])
        return watched._replace(inputs=both, told=f"{told}, {watched.told}")
    probes, spare = probes.detach(), merger.probes.spare(inputs.shape[1:])
    own = f"{len(probes)} learned probes"
    if not merger.config.inputs:
        told = f"{own}; beside these, inputs did harm in training"
        return Watched(one, probes, told, spare=spare)
    if len(inputs) >= ENOUGH:
        return Watched(one, inputs, told, given=True)
    both = torch.cat([inputs, probes.to(inputs)])
    return Watched(one, both, f"{told} and {own}", spare=spare)


def strange(merger: nn.Module, members: Weights, layout: Layout, probes: Tensor) -> Tensor:
    """Whether members tell less of a merger's probes apart than those it was trained for.

    Args:
        merger: A merger, whose ``config`` says what is ``familiar``.
        members: Aligned members, ``[f, m, ...]``.
        layout: Their architecture.
        probes: The merger's probes, ``[p, ...]``.

    Returns:
        Booleans, ``[f]``.
    """
    least = merger.config.familiar
    if not least:
        return torch.zeros(len(next(iter(members.values()))), dtype=torch.bool)
    return told_apart(answers_of(members, layout, probes)).cpu() < least


def told_apart(answers: Tensor) -> Tensor:
    """How much members tell inputs apart: entropy of their votes less that of their answers.

    Paper: Salimans et al., "Improved Techniques for Training GANs", arXiv:1606.03498, section 4,
    for what networks can tell apart as a measure of inputs.

    Args:
        answers: Members' logits, ``[f, m, b, c]``.

    Returns:
        ``[f]``, in units of the logarithm of the number of classes: 1 where members are sure of
        everything and every class gets its share of the soft vote's votes, 0 or less where all
        inputs are one to them. What is no choice among classes counts as told apart.
    """
    if not is_choice(answers[0]):
        return torch.ones(len(answers))
    likely, classes = answers.float().softmax(-1), answers.shape[-1]
    votes = F.one_hot(likely.mean(1).argmax(-1), classes).float().mean(1)  # [f, c]
    return _entropy(votes) - _entropy(likely).mean((1, 2))


def spared(
    members: Weights, layout: Layout, inputs: Tensor, *, given: bool
) -> tuple[int | None, Tensor | None]:
    """The member that is not to be fused with the others, since they are alike and far apart.

    Args:
        members: Aligned members of one family, ``[1, m, ...]``.
        layout: Their architecture.
        inputs: Inputs, ``[b, ...]``.
        given: Whether these are inputs of the members' task, or made from the members.

    Returns:
        What ``spokesman`` says; no one where the members that it lists lie in one basin.
    """
    number, sound = spokesman(answers_of(members, layout, inputs)[0], given=given)
    if number is None or near({key: t[:, sound] for key, t in members.items()}, layout):
        return None, None
    return number, sound


def spokesman(answers: Tensor, *, given: bool) -> tuple[int | None, Tensor | None]:
    """The member that speaks for all, where members are alike.

    On inputs that are made from members, probabilities tell who is alike, since nearly all votes
    are the same. On inputs of their task votes tell it, since members are in doubt about the same.

    Args:
        answers: Members' logits, ``[m, b, c]``.
        given: Whether they are on inputs of the members' task, or on ones that were made from them.

    Returns:
        Number of the member that agrees most with the others, and numbers of all that have anything
        in common, ``[n]``, if half of these agree enough: by ``ALIKE`` on made inputs, on given
        ones if their votes are those of the others on a share of the inputs that is above ``SAME``
        by its standard error. Otherwise, and where there are no classes, no one.
    """
    if not is_choice(answers):
        return None, None
    likely = answers.float().softmax(-1)
    sound = in_agreement(likely)
    found = agreement(likely[sound])
    if given:
        votes = F.one_hot(likely[sound].argmax(-1), likely.shape[-1]).float()
        share = agreement(votes).median()
        enough = share - (share * (1 - share) / answers.shape[1]) ** 0.5 >= SAME
    else:
        enough = found.median() >= ALIKE
    return (int(sound[found.argmax()]), sound) if enough else (None, None)


def near(members: Weights, layout: Layout) -> bool:
    """Whether members of one family lie in one basin, as those of one init do; then they are fused.

    Args:
        members: Aligned members, ``[1, m, ...]``.
        layout: Their architecture.

    Returns:
        Whether their variance over their mean square, unbiased and on average of all layers, is
        below ``NEAR``. Of networks of inits of their own it is about half, once they are aligned.
    """
    count = len(next(iter(members.values()))[0])
    spread = torch.stack([own.mean() for own in disagreement(members, layout).values()]).mean()
    return bool(spread * count < NEAR * (count - 1))


def _entropy(likely: Tensor) -> Tensor:
    """In units of the logarithm of the number of classes."""
    return torch.special.entr(likely).sum(-1) / torch.tensor(likely.shape[-1]).log()
