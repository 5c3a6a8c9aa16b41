from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from math import prod

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from metamerge.errors import StructureError
from metamerge.structure import (
    Concat,
    Factor,
    Program,
    discover,
    discover_program,
    discovery,
    prove,
    trace,
)
from metamerge.structure.program import operator
from metamerge.structure.rules import RULES, rule_of

# Sums in another order: at most some 1000 terms of size 1, each rounded to 1e-16 of itself.
SAME = 1e-12


@dataclass(frozen=True)
class Row:
    """A network of one operator between two layers, and what must be found, worked out by hand.

    ``groups`` are named a, b, ... in the order of ``spec.groups``, ``axes`` are those of every
    tensor: factors joined by dots, a number for a fixed factor, parts in brackets.
    """

    forward: Callable
    parts: dict[str, object]  # name -> shape of a parameter, tensor of a buffer, or module
    groups: str
    axes: str
    inputs: tuple = ((4, 3),)  # shapes, or tensors

    def module(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Net(self).eval()

    def tensors(self) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        return tuple(
            x if isinstance(x, Tensor) else torch.randn(x, generator=generator) for x in self.inputs
        )


class Net(nn.Module):
    """The forward function of a row with the row's own parts."""

    def __init__(self, row):
        super().__init__()
        self.row = row
        for name, part in row.parts.items():
            if callable(part):
                setattr(self, name, part())
            elif isinstance(part, Tensor):
                self.register_buffer(name, part)
            else:
                fan_in = max(1, prod(part[1:]))
                setattr(self, name, nn.Parameter(torch.randn(part) / fan_in**0.5))

    def forward(self, x, y=None):
        return self.row.forward(self, x) if y is None else self.row.forward(self, x, y)


def hidden(p, x):
    """Six hidden units: their rows are ``w``."""
    return F.linear(x, p.w)


def out(p, h):
    """Two outputs: the columns of ``v`` read the hidden units."""
    return F.linear(h, p.v)


def after(change):
    """``v change(w x)``."""
    return lambda p, x: out(p, change(hidden(p, x)))


W, V = (6, 3), (2, 6)
LAYERS = {"w": W, "v": V}
FREE = ("a=6", "w: a|3, v: 2|a")
FIXED = ("", "w: 6|3, v: 2|6")
TOKENS = ((2, 4, 3),)  # four tokens of three numbers
LINE = ((2, 3, 8),)  # three channels of eight samples
IMAGE = ((2, 3, 4, 4),)
IDS = torch.tensor([[0, 2, 4, 6], [1, 3, 5, 0]])
MAPS = {"w": (6, 3, 1), "v": (2, 6, 1)}
MAP_AXES = "w: a|3|1, v: 2|a|1"
IMAGES = {"w": (6, 3, 1, 1), "v": (2, 6, 1, 1)}
IMAGE_AXES = "w: a|3|1|1, v: 2|a|1|1"


def line(change):
    """The same for maps of one dimension, with kernels of one tap."""
    return lambda p, x: F.conv1d(change(F.conv1d(x, p.w)), p.v)


def image(change):
    """The same for images."""
    return lambda p, x: F.conv2d(change(F.conv2d(x, p.w)), p.v)


def heads(x):
    """``[b, t, 2 * 3]`` as ``[b, 2, t, 3]``."""
    return x.unflatten(-1, (2, 3)).transpose(1, 2)


def attend(p, x, **options):
    q, k, v = (heads(F.linear(x, w)) for w in (p.q, p.k, p.u))
    found = F.scaled_dot_product_attention(q, k, v, **options)
    return out(p, found.transpose(1, 2).flatten(2))


def attend_in_groups(p, x):
    q = F.linear(x, p.q).unflatten(-1, (4, 3)).transpose(1, 2)
    k, v = (heads(F.linear(x, w)) for w in (p.k, p.u))
    found = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return out(p, found.transpose(1, 2).flatten(2))


ATTENTION = {"q": W, "k": W, "u": W, "v": V}
HEADS = ("a=2, b=3 in a, c=3 in a", "q: a.b|3, k: a.b|3, u: a.c|3, v: 2|a.c")

POINTWISE = {
    "a linear layer with bias": Row(
        lambda p, x: F.linear(F.relu(F.linear(x, p.w, p.b)), p.v, p.c),
        {"w": W, "b": (6,), "v": V, "c": (2,)},
        "a=6",
        "w: a|3, b: a, v: 2|a, c: 2",
    ),
    "a gate between two paths": Row(
        lambda p, x: out(p, torch.sigmoid(hidden(p, x)) * F.linear(x, p.u)),
        {"w": W, "u": W, "v": V},
        "a=6",
        "w: a|3, u: a|3, v: 2|a",
    ),
    "a scale for all units": Row(
        lambda p, x: out(p, hidden(p, x) * p.s), {**LAYERS, "s": (1,)}, "a=6", FREE[1] + ", s: 1"
    ),
    "prelu of one slope": Row(
        lambda p, x: out(p, F.prelu(hidden(p, x), p.s)),
        {**LAYERS, "s": (1,)},
        "a=6",
        FREE[1] + ", s: 1",
    ),
    "prelu of a slope per channel": Row(
        lambda p, x: out(p, F.prelu(hidden(p, x), p.s)),
        {**LAYERS, "s": (6,)},
        "a=6",
        FREE[1] + ", s: a",
    ),
    "softmax over the units": Row(after(lambda h: h.softmax(-1)), LAYERS, *FREE),
    "log softmax over the units": Row(after(lambda h: F.log_softmax(h, 1)), LAYERS, *FREE),
    "hardswish": Row(after(F.hardswish), LAYERS, *FREE),
    "where": Row(after(lambda h: torch.where(h > 0, h, 0.1 * h)), LAYERS, *FREE),
    "masked fill": Row(after(lambda h: h.masked_fill(h < -0.5, 0.0)), LAYERS, *FREE),
    "logical and": Row(after(lambda h: ((h > 0) & (h < 1)) * h), LAYERS, *FREE),
    "a cast": Row(after(lambda h: h.half().to(h.dtype)), LAYERS, *FREE),
    "a cast to the type of another": Row(
        lambda p, x, y: out(p, hidden(p, x).type_as(y).to(x.dtype)),
        LAYERS,
        *FREE,
        inputs=((4, 3), torch.zeros(4, 5, dtype=torch.float16)),
    ),
    "copy over another": Row(after(lambda h: torch.zeros_like(h).copy_(h.relu())), LAYERS, *FREE),
    "weight normalisation": Row(
        lambda p, x: out(p, F.linear(x, torch._weight_norm(p.w, p.g, 0))),
        {**LAYERS, "g": (6, 1)},
        "a=6",
        FREE[1] + ", g: a|1",
    ),
    "zeros and ones like the units": Row(
        after(lambda h: h * torch.ones_like(h) + h.new_zeros(6)), LAYERS, *FREE
    ),
    "the numbers of the units": Row(after(lambda h: h * torch.arange(6.0)), LAYERS, *FIXED),
    "the numbers of the tokens": Row(
        after(lambda h: h * torch.arange(4.0)[:, None]), LAYERS, *FREE, TOKENS
    ),
    "an identity matrix": Row(after(lambda h: h @ torch.eye(6, dtype=h.dtype)), LAYERS, *FIXED),
}

FOLDED = {
    "the mean kept": Row(after(lambda h: h - h.mean(-1, keepdim=True)), LAYERS, *FREE),
    "the mean": Row(after(lambda h: h * h.mean(-1)[:, None]), LAYERS, *FREE),
    "the mean over everything": Row(after(lambda h: h * h.mean()), LAYERS, *FREE),
    "the mean over tokens": Row(after(lambda h: h.mean(1)), LAYERS, *FREE, TOKENS),
    "the mean over tokens kept": Row(
        after(lambda h: h - h.mean((1,), keepdim=True)), LAYERS, *FREE, TOKENS
    ),
    "the variance": Row(after(lambda h: h / h.var(-1, keepdim=True)), LAYERS, *FREE),
    "mean and variance at once": Row(
        after(lambda h: sum(torch.var_mean(h, -1, correction=0, keepdim=True)) * h), LAYERS, *FREE
    ),
    "the largest entry": Row(after(lambda h: h - h.amax(-1, True)), LAYERS, *FREE),
    "the logarithm of a sum": Row(after(lambda h: h - h.logsumexp(1, True)), LAYERS, *FREE),
    "the norm": Row(after(lambda h: h / h.norm(dim=-1, keepdim=True)), LAYERS, *FREE),
    "normalised": Row(after(lambda h: F.normalize(h, dim=-1)), LAYERS, *FREE),
    "the product": Row(after(lambda h: h * h.prod(1, True)), LAYERS, *FREE),
    "the largest over tokens": Row(after(lambda h: h.max(1).values), LAYERS, *FREE, TOKENS),
    "the largest over tokens and its place": Row(
        lambda p, x: (out(p, hidden(p, x).max(1, keepdim=True)[0]), hidden(p, x).mean(2).argmax(1)),
        LAYERS,
        *FREE,
        TOKENS,
    ),
    "the place of the largest token of each unit": Row(
        after(lambda h: h.max(1)[1].to(h.dtype)), LAYERS, *FREE, TOKENS
    ),
    "the largest unit": Row(after(lambda h: h - h.max(1, True)[0]), LAYERS, *FREE),
    "the largest unit and its place": Row(
        lambda p, x: (out(p, hidden(p, x)), *hidden(p, x).max(-1)), LAYERS, *FIXED
    ),
    "argmax over the units": Row(
        lambda p, x: (out(p, hidden(p, x)), hidden(p, x).argmax(-1)), LAYERS, *FIXED
    ),
    "argmax over everything": Row(after(lambda h: h + h.argmax()), LAYERS, *FIXED, ((1, 3),)),
}

ORDERED = {
    "a running sum over the units": Row(after(lambda h: h.cumsum(-1)), LAYERS, *FIXED),
    "a running sum over tokens": Row(after(lambda h: h.cumsum(1)), LAYERS, *FREE, TOKENS),
    "units rolled": Row(after(lambda h: h.roll(1, -1)), LAYERS, *FIXED),
    "tokens rolled": Row(after(lambda h: h.roll(1, 1)), LAYERS, *FREE, TOKENS),
    "units flipped": Row(after(lambda h: h.flip(-1)), LAYERS, *FIXED),
    "tokens flipped": Row(after(lambda h: h.flip(1)), LAYERS, *FREE, TOKENS),
    "units sorted": Row(after(lambda h: h.sort(-1).values), LAYERS, *FIXED),
    "tokens sorted": Row(after(lambda h: h.sort(1)[0]), LAYERS, *FREE, TOKENS),
    "the largest four units": Row(
        after(lambda h: h.topk(4).values), {"w": W, "v": (2, 4)}, "", "w: 6|3, v: 2|4"
    ),
    "the largest three of the tokens": Row(
        after(lambda h: h.topk(3, dim=1)[0]), LAYERS, *FREE, TOKENS
    ),
    "differences of neighbours": Row(
        after(lambda h: h.diff()), {"w": W, "v": (2, 5)}, "", "w: 6|3, v: 2|5"
    ),
    "a triangle of scores": Row(
        lambda p, x: out(p, torch.tril(F.linear(x, p.q) @ F.linear(x, p.k).mT) @ hidden(p, x)),
        {"q": (5, 3), "k": (5, 3), **LAYERS},
        "a=5, b=6",
        "q: a|3, k: a|3, w: b|3, v: 2|b",
        TOKENS,
    ),
    "a triangle of units": Row(lambda p, x: out(p, F.linear(x, torch.triu(p.w))), LAYERS, *FIXED),
}

VIEWS = {
    "maps flattened": Row(
        lambda p, x: out(p, F.conv1d(x, p.w).flatten(1)),
        {"w": (6, 3, 1), "v": (2, 48)},
        "a=6",
        "w: a|3|1, v: 2|a.8",
        LINE,
    ),
    "units in blocks, a softmax in each": Row(
        after(lambda h: h.view(-1, 2, 3).softmax(-1).view(-1, 6)),
        LAYERS,
        "a=2, b=3 in a",
        "w: a.b|3, v: 2|a.b",
    ),
    # one axis of six units, whose order is turned: as blocks of units or as units of blocks
    "blocks that change places with what is in them": Row(
        after(lambda h: h.reshape(-1, 2, 3).transpose(1, 2).flatten(1)),
        LAYERS,
        "a=2, b=3 in a",
        "w: a.b|3, v: 2|b.a",
    ),
    "blocks summed": Row(
        lambda p, x: out(p, hidden(p, x).unflatten(1, (2, 3)).sum(1)),
        {"w": W, "v": (2, 3)},
        "a=2, b=3",
        "w: a.b|3, v: 2|b",
    ),
    "a matrix transposed": Row(lambda p, x: x @ p.w.t() @ p.v.T, LAYERS, *FREE),
    "channels moved to the end": Row(
        lambda p, x: out(p, F.conv1d(x, p.w).permute(0, 2, 1)),
        {"w": (6, 3, 1), "v": V},
        "a=6",
        "w: a|3|1, v: 2|a",
        LINE,
    ),
    "an axis moved": Row(
        lambda p, x: out(p, F.conv2d(x, p.w).movedim(1, -1)),
        {"w": (6, 3, 1, 1), "v": V},
        "a=6",
        "w: a|3|1|1, v: 2|a",
        IMAGE,
    ),
    "two axes moved": Row(
        lambda p, x: out(p, F.conv2d(x, p.w).movedim((1, 2), (-1, 1))),
        {"w": (6, 3, 1, 1), "v": V},
        "a=6",
        "w: a|3|1|1, v: 2|a",
        IMAGE,
    ),
    "axes of one entry": Row(
        after(lambda h: h[:, None].unsqueeze(-1).squeeze().relu()), LAYERS, *FREE
    ),
    "a named axis of one entry, and one that stays": Row(
        after(lambda h: h.unsqueeze(1).squeeze(1).squeeze(-1)), LAYERS, *FREE
    ),
    "a class token for the whole batch": Row(
        lambda p, x: out(p, torch.cat([p.c.expand(x.shape[0], -1, -1), hidden(p, x)], 1).mean(1)),
        {"c": (1, 1, 6), **LAYERS},
        "a=6",
        "c: 1|1|a, w: a|3, v: 2|a",
        TOKENS,
    ),
    # the copies are the same numbers: each unit's columns may change places as well
    "copies behind one another": Row(
        after(lambda h: h.repeat(1, 2)), {"w": W, "v": (2, 12)}, "a=6, b=2", "w: a|3, v: 2|b.a"
    ),
    "copies side by side": Row(
        after(lambda h: h.repeat_interleave(2, 1)),
        {"w": W, "v": (2, 12)},
        "a=6, b=2 in a",
        "w: a|3, v: 2|a.b",
    ),
    "copies along a new axis": Row(
        lambda p, x: out(p, hidden(p, x)[:, None].expand(-1, 5, 6) * p.s),
        {**LAYERS, "s": (5, 6)},
        "a=6",
        FREE[1] + ", s: 5|a",
    ),
    "the first token": Row(after(lambda h: h[:, 0]), LAYERS, *FREE, TOKENS),
    "the last token": Row(after(lambda h: h.select(1, -1)), LAYERS, *FREE, TOKENS),
    "one unit by name": Row(
        after(lambda h: h * h[:, 2, None]), LAYERS, "a=2, b=3", "w: [a+1+b]|3, v: 2|[a+1+b]"
    ),
    "pieces that overlap": Row(
        lambda p, x: out(p, hidden(p, x)[:, :4]) + F.linear(hidden(p, x)[:, 2:], p.u),
        {"w": W, "v": (2, 4), "u": (2, 4)},
        "a=2, b=2, c=2",
        "w: [a+b+c]|3, v: 2|[a+b], u: 2|[b+c]",
    ),
    "a piece of two layers": Row(
        lambda p, x: out(p, torch.cat([hidden(p, x), F.linear(x, p.u)], 1)[:, 2:8]),
        {"w": W, "u": W, "v": V},
        "a=2, b=4, c=2, d=4",
        "w: [a+b]|3, u: [c+d]|3, v: 2|[b+c]",
    ),
    "every second unit": Row(
        lambda p, x: out(p, torch.sigmoid(hidden(p, x)[:, ::2]) * hidden(p, x)[:, 1::2]),
        {"w": W, "v": (2, 3)},
        "a=3",
        "w: a.[1+1]|3, v: 2|a",
    ),
    "every second unit of an odd number": Row(
        lambda p, x: out(p, hidden(p, x)[:, ::2]),
        {"w": (5, 3), "v": (2, 3)},
        "",
        "w: 5|3, v: 2|3",
    ),
    "chunks": Row(
        lambda p, x: out(p, (lambda a, b, c: a * b + c)(*hidden(p, x).chunk(3, 1))),
        {"w": W, "v": (2, 2)},
        "a=2",
        "w: [a+a+a]|3, v: 2|a",
    ),
    "uneven pieces": Row(
        lambda p, x: (lambda a, b: out(p, a) + F.linear(b, p.u))(*hidden(p, x).split([2, 4], 1)),
        {"w": W, "v": (2, 2), "u": (2, 4)},
        "a=2, b=4",
        "w: [a+b]|3, v: 2|a, u: 2|b",
    ),
    "pieces of four, the last of two": Row(
        lambda p, x: (lambda a, b: out(p, a) + F.linear(b, p.u))(*hidden(p, x).split(4, 1)),
        {"w": W, "v": (2, 4), "u": (2, 2)},
        "a=4, b=2",
        "w: [a+b]|3, v: 2|a, u: 2|b",
    ),
    "blocks unbound": Row(
        lambda p, x: (lambda a, b: out(p, a) + F.linear(b, p.u))(
            *hidden(p, x).unflatten(1, (2, 3)).unbind(1)
        ),
        {"w": W, "v": (2, 3), "u": (2, 3)},
        "a=3, b=3",
        "w: [a+b]|3, v: 2|a, u: 2|b",
    ),
    "layers concatenated": Row(
        lambda p, x: out(p, torch.cat([hidden(p, x), F.linear(x, p.u)], -1)),
        {"w": W, "u": (4, 3), "v": (2, 10)},
        "a=6, b=4",
        "w: a|3, u: b|3, v: 2|[a+b]",
    ),
    "a layer concatenated to itself": Row(
        after(lambda h: torch.cat([h, h], 1)),
        {"w": W, "v": (2, 12)},
        "a=6",
        "w: a|3, v: 2|[a+a]",
    ),
    "the input beside a layer": Row(
        lambda p, x: out(p, torch.cat([x, hidden(p, x)], 1)),
        {"w": W, "v": (2, 9)},
        "a=6",
        "w: a|3, v: 2|[3+a]",
    ),
    "layers stacked": Row(
        lambda p, x: out(p, torch.stack([hidden(p, x), F.linear(x, p.u)], 1)),
        {"w": W, "u": W, "v": V},
        "a=6",
        "w: a|3, u: a|3, v: 2|a",
    ),
    "zeros beside the units": Row(
        after(lambda h: F.pad(h, (1, 2))),
        {"w": W, "v": (2, 9)},
        "a=6, b=2",  # two columns that read nothing but zeros
        "w: a|3, v: 2|[1+a+b]",
    ),
    "units mirrored at their ends": Row(
        lambda p, x: out(p, F.pad(hidden(p, x)[:, None], (1, 1), mode="reflect")),
        {"w": W, "v": (2, 8)},
        "",
        "w: 6|3, v: 2|8",
    ),
    "units cut at their ends": Row(
        after(lambda h: F.pad(h, (-1, 0))), {"w": W, "v": (2, 5)}, "", "w: 6|3, v: 2|5"
    ),
    "positions padded": Row(
        line(lambda h: F.pad(h, (1, 2), mode="circular")), MAPS, "a=6", MAP_AXES, LINE
    ),
    "channels padded": Row(
        lambda p, x: F.conv2d(F.pad(F.conv2d(x, p.w), (1, 0, 0, 1, 0, 3)), p.v),
        {"w": (6, 3, 1, 1), "v": (2, 9, 1, 1)},
        "a=6, b=3",
        "w: a|3|1|1, v: 2|[a+b]|1|1",
        IMAGE,
    ),
    "pixels from channels": Row(
        lambda p, x: F.conv2d(F.pixel_shuffle(F.conv2d(x, p.w), 2), p.v),
        {"w": (8, 3, 1, 1), "v": (2, 2, 1, 1)},
        "a=2",
        "w: a.4|3|1|1, v: 2|a|1|1",
        IMAGE,
    ),
    "a slice overwritten": Row(
        lambda p, x: out(p, hidden(p, x).slice_scatter(F.linear(x, p.u), 1, 0, 2)),
        {**LAYERS, "u": (2, 3)},
        "",
        "w: 6|3, v: 2|6, u: 2|3",
    ),
    "a slice of tokens overwritten": Row(
        lambda p, x: out(p, hidden(p, x).slice_scatter(F.linear(x[:, :2], p.u), 1, 1, 3)),
        {**LAYERS, "u": W},
        "a=6",
        FREE[1] + ", u: a|3",
        TOKENS,
    ),
    "a token overwritten": Row(
        lambda p, x: out(p, hidden(p, x).select_scatter(F.linear(x[:, 0], p.u), 1, 2)),
        {**LAYERS, "u": W},
        "a=6",
        FREE[1] + ", u: a|3",
        TOKENS,
    ),
    "glu": Row(
        lambda p, x: out(p, F.glu(F.linear(x, p.w))),
        {"w": (8, 3), "v": (2, 4)},
        "a=4",
        "w: [a+a]|3, v: 2|a",
    ),
    "glu over tokens": Row(after(lambda h: F.glu(h, 1)), LAYERS, *FREE, TOKENS),
}

INDEXED = {
    "embedding": Row(
        lambda p, ids: out(p, F.embedding(ids, p.w).mean(1)),
        {"w": (7, 6), "v": V},
        "a=6",
        "w: 7|a, v: 2|a",
        (IDS,),
    ),
    "tokens by their number": Row(after(lambda h: h[:, [2, 0]]), LAYERS, *FREE, TOKENS),
    "the last token as a list": Row(after(lambda h: h[:, [-1]]), LAYERS, *FREE, TOKENS),
    "units by their number": Row(
        after(lambda h: h[:, [2, 0]]), {"w": W, "v": (2, 2)}, "", "w: 6|3, v: 2|2"
    ),
    "neighbouring units by their number": Row(
        after(lambda h: h[:, [1, 2, 3]]),
        {"w": W, "v": (2, 3)},
        "a=3, b=2",
        "w: [1+a+b]|3, v: 2|a",
    ),
    "a token per row": Row(
        lambda p, x, i: out(p, hidden(p, x)[torch.arange(x.shape[0]), i]),
        LAYERS,
        *FREE,
        (*TOKENS, torch.tensor([3, 1])),
    ),
    "indices on either side of the units": Row(
        lambda p, x, i: F.conv2d(x, p.w)[i, :, i].mean(-1) @ p.v.T,
        {"w": (6, 3, 1, 1), "v": V},
        "a=6",
        "w: a|3|1|1, v: 2|a",
        (*IMAGE, torch.tensor([1, 0])),
    ),
    "tokens set to a number": Row(
        lambda p, x, i: out(p, hidden(p, x).index_put((torch.arange(x.shape[0]), i), p.s)),
        {**LAYERS, "s": (6,)},
        "a=6",
        FREE[1] + ", s: a",
        (*TOKENS, torch.tensor([3, 1])),
    ),
    "tokens selected": Row(
        lambda p, x, i: out(p, hidden(p, x).index_select(1, i)),
        LAYERS,
        *FREE,
        (*TOKENS, torch.tensor([3, 1])),
    ),
    "units selected": Row(
        lambda p, x: out(p, hidden(p, x).index_select(1, p.i)),
        {"w": W, "v": (2, 2), "i": torch.tensor([3, 1])},
        "",
        "w: 6|3, v: 2|2, i: 2",
    ),
    "tokens gathered": Row(
        lambda p, x, i: out(p, hidden(p, x).gather(1, i[..., None].expand(-1, -1, 6))),
        LAYERS,
        *FREE,
        (*TOKENS, torch.tensor([[3, 1], [0, 0]])),
    ),
    "units gathered": Row(
        lambda p, x, i: out(p, hidden(p, x).gather(1, i)),
        {"w": W, "v": (2, 2)},
        "",
        "w: 6|3, v: 2|2",
        ((2, 3), torch.tensor([[3, 1], [0, 0]])),
    ),
    "tokens added up by their number": Row(
        lambda p, x, i: out(
            p,
            x.new_zeros(x.shape[0], 5, 6).scatter_add(
                1, i[..., None].expand(-1, -1, 6), hidden(p, x)
            ),
        ),
        LAYERS,
        *FREE,
        (*TOKENS, torch.tensor([[3, 1, 1, 4], [0, 0, 2, 2]])),
    ),
    "units scattered": Row(
        lambda p, x, i: out(p, hidden(p, x).scatter(1, i, 0.0)),
        LAYERS,
        *FIXED,
        ((2, 3), torch.tensor([[3, 1], [0, 0]])),
    ),
    "messages added up at their nodes": Row(
        lambda p, x, i: out(p, x.new_zeros(5, 6).index_add(0, i, hidden(p, x))),
        LAYERS,
        *FREE,
        ((4, 3), torch.tensor([3, 1, 1, 4])),
    ),
    "one-hot tokens": Row(
        lambda p, ids: F.one_hot(ids, 7).to(p.w.dtype).mean(1) @ p.w @ p.v.T,
        {"w": (7, 6), "v": V},
        "a=6",
        "w: 7|a, v: 2|a",
        (IDS,),
    ),
}

PRODUCTS = {
    "a matrix product": Row(
        lambda p, x: (x @ p.w).relu() @ p.v,
        {"w": (3, 6), "v": (6, 2)},
        "a=6",
        "w: 3|a, v: a|2",
    ),
    "matrix by vector": Row(
        lambda p, x: torch.mv(hidden(p, x), p.s), {"w": W, "s": (6,)}, "a=6", "w: a|3, s: a"
    ),
    "a product of tokens by a vector": Row(
        lambda p, x: hidden(p, x) @ p.s, {"w": W, "s": (6,)}, "a=6", "w: a|3, s: a", TOKENS
    ),
    "vector by vector": Row(
        lambda p, x: x * torch.dot(p.s, p.t), {"s": (6,), "t": (6,)}, "a=6", "s: a, t: a"
    ),
    "batches of matrices": Row(
        lambda p, x: torch.bmm(hidden(p, x), F.linear(x, p.u).transpose(1, 2)),
        {"w": W, "u": W},
        "a=6",
        "w: a|3, u: a|3",
        TOKENS,
    ),
    "a sum and a matrix product": Row(
        lambda p, x: torch.addmm(p.b, x, p.w) @ p.v,
        {"b": (6,), "w": (3, 6), "v": (6, 2)},
        "a=6",
        "b: a, w: 3|a, v: a|2",
    ),
    "a sum and batches of matrices": Row(
        lambda p, x: torch.baddbmm(p.b, x, p.w.expand(x.shape[0], 3, 6)) @ p.v,
        {"b": (6,), "w": (3, 6), "v": (6, 2)},
        "a=6",
        "b: a, w: 3|a, v: a|2",
        TOKENS,
    ),
    "a matrix of rank one": Row(
        lambda p, x: out(p, F.linear(x, torch.outer(p.s, p.t))),
        {"s": (6,), "t": (3,), "v": V},
        "a=6",
        "s: a, t: 3, v: 2|a",
    ),
    "bilinear": Row(
        lambda p, x: out(p, F.bilinear(F.linear(x, p.s), F.linear(x, p.t), p.w, p.b)),
        {"s": (5, 3), "t": (4, 3), "w": (6, 5, 4), "b": (6,), "v": V},
        "a=5, b=4, c=6",
        "s: a|3, t: b|3, w: c|a|b, b: c, v: 2|c",
    ),
    "einsum": Row(
        lambda p, x: torch.einsum("bh,oh->bo", torch.einsum("b i, h i -> b h", x, p.w), p.v),
        LAYERS,
        *FREE,
    ),
    "einsum without an arrow": Row(
        lambda p, x: torch.einsum("bh,ho", torch.einsum("bi,ih", x, p.w), p.v),  # bh, bo
        {"w": (3, 6), "v": (6, 2)},
        "a=6",
        "w: 3|a, v: a|2",
    ),
    "einsum with axes that are not named": Row(
        lambda p, x: torch.einsum("...h,oh->...o", torch.einsum("...i,hi->...h", x, p.w), p.v),
        LAYERS,
        *FREE,
        TOKENS,
    ),
    "einsum with axes that are not named and no arrow": Row(
        lambda p, x: torch.einsum("...h,ho", torch.einsum("...i,ih", x, p.w), p.v),
        {"w": (3, 6), "v": (6, 2)},
        "a=6",
        "w: 3|a, v: a|2",
        TOKENS,
    ),
    "einsum of three": Row(
        lambda p, x: torch.einsum("bi,hi,h,oh->bo", x, p.w, p.s, p.v),
        {**LAYERS, "s": (6,)},
        "a=6",
        FREE[1] + ", s: a",
    ),
    "attention": Row(attend, ATTENTION, *HEADS, TOKENS),
    "causal attention": Row(lambda p, x: attend(p, x, is_causal=True), ATTENTION, *HEADS, TOKENS),
    "attention with a mask": Row(
        lambda p, x: attend(p, x, attn_mask=p.m),
        {**ATTENTION, "m": torch.ones(4, 4).tril().bool()},
        HEADS[0],
        HEADS[1] + ", m: 4|4",
        TOKENS,
    ),
    "attention with a bias per head": Row(
        lambda p, x: attend(p, x, attn_mask=p.m),
        {**ATTENTION, "m": (2, 4, 4)},
        "a=2, b=3 in a, c=3 in a",
        "q: a.b|3, k: a.b|3, u: a.c|3, v: 2|a.c, m: a|4|4",
        TOKENS,
    ),
    # two heads of keys (a), each serves two of queries (b)
    "attention with grouped queries": Row(
        attend_in_groups,
        {"q": (12, 3), "k": W, "u": W, "v": (2, 12)},
        "a=2, b=2 in a, c=3 in a, d=3 in a",
        "q: a.b.c|3, k: a.c|3, u: a.d|3, v: 2|a.b.d",
        TOKENS,
    ),
}

CONVOLUTIONS = {
    "a convolution with bias": Row(
        lambda p, x: F.conv1d(F.conv1d(x, p.w, p.b), p.v, stride=2),
        {"w": (6, 3, 3), "b": (6,), "v": (2, 6, 2)},
        "a=6",
        "w: a|3|3, b: a, v: 2|a|2",
        LINE,
    ),
    "convolutions that keep the size": Row(
        lambda p, x: F.conv2d(F.conv2d(x, p.w, padding="same"), p.v, padding="same"),
        {"w": (6, 3, 3, 3), "v": (2, 6, 1, 1)},
        "a=6",
        "w: a|3|3|3, v: 2|a|1|1",
        IMAGE,
    ),
    "a convolution of volumes": Row(
        lambda p, x: F.conv3d(F.conv3d(x, p.w), p.v),
        {"w": (6, 3, 2, 1, 1), "v": (2, 6, 1, 1, 1)},
        "a=6",
        "w: a|3|2|1|1, v: 2|a|1|1|1",
        ((2, 3, 2, 2, 2),),
    ),
    # two blocks of channels (a), two read (b) and three made (c) in each
    "a grouped convolution": Row(
        lambda p, x: F.conv1d(F.conv1d(F.conv1d(x, p.w), p.u, groups=2), p.v),
        {"w": (4, 3, 1), "u": (6, 2, 3), "v": (2, 6, 1)},
        "a=2, b=2 in a, c=3 in a",
        "w: a.b|3|1, u: a.c|b|3, v: 2|a.c|1",
        LINE,
    ),
    "a grouped convolution of the input": Row(
        lambda p, x: F.conv1d(F.conv1d(x, p.u, groups=3), p.v),
        {"u": (6, 1, 3), "v": (2, 6, 1)},
        "a=2, b=2, c=2",
        "u: [a+b+c]|1|3, v: 2|[a+b+c]|1",
        LINE,
    ),
    "a depthwise convolution": Row(
        lambda p, x: F.conv1d(F.conv1d(F.conv1d(x, p.w), p.u, p.b, groups=6), p.v),
        {**MAPS, "u": (6, 1, 3), "b": (6,)},
        "a=6",
        MAP_AXES + ", u: a|1|3, b: a",
        LINE,
    ),
    "a depthwise convolution with a multiplier": Row(
        lambda p, x: F.conv1d(F.conv1d(F.conv1d(x, p.w), p.u, groups=4), p.v),
        {"w": (4, 3, 1), "u": (8, 1, 3), "v": (2, 8, 1)},
        "a=4, b=2 in a",
        "w: a|3|1, u: a.b|1|3, v: 2|a.b|1",
        LINE,
    ),
    # channels 2 * 3 shuffled to 3 * 2: groups of two, each with one of every three
    "channels shuffled between grouped convolutions": Row(
        lambda p, x: F.conv1d(
            F.conv1d(F.conv1d(x, p.w), p.u, groups=2)
            .unflatten(1, (2, 3))
            .transpose(1, 2)
            .flatten(1, 2),
            p.v,
        ),
        {"w": (4, 3, 1), "u": (6, 2, 1), "v": (2, 6, 1)},
        "a=2, b=2 in a, c=3 in a",
        "w: a.b|3|1, u: a.c|b|1, v: 2|c.a|1",
        LINE,
    ),
    "a transposed convolution": Row(
        lambda p, x: F.conv1d(F.conv_transpose1d(F.conv1d(x, p.w), p.u, p.b), p.v),
        {"w": (4, 3, 1), "u": (4, 6, 3), "b": (6,), "v": (2, 6, 1)},
        "a=4, b=6",
        "w: a|3|1, u: a|b|3, b: b, v: 2|b|1",
        LINE,
    ),
    "a grouped transposed convolution": Row(
        lambda p, x: F.conv2d(F.conv_transpose2d(F.conv2d(x, p.w), p.u, p.b, groups=2), p.v),
        {"w": (4, 3, 1, 1), "u": (4, 3, 2, 2), "b": (6,), "v": (2, 6, 1, 1)},
        "a=2, b=2 in a, c=3 in a",
        "w: a.b|3|1|1, u: a.b|c|2|2, b: a.c, v: 2|a.c|1|1",
        IMAGE,
    ),
    "a convolution that says that it is not transposed": Row(
        lambda p, x: F.conv1d(torch.convolution(x, p.w, p.b, [1], [0], [1], False, [0], 1), p.v),
        {**MAPS, "b": (6,)},
        "a=6",
        MAP_AXES + ", b: a",
        LINE,
    ),
    "a convolution that says that it is transposed": Row(
        lambda p, x: F.conv1d(torch.convolution(x, p.w, p.b, [1], [0], [1], True, [0], 1), p.v),
        {"w": (3, 6, 2), "b": (6,), "v": (2, 6, 1)},
        "a=6",
        "w: 3|a|2, b: a, v: 2|a|1",
        LINE,
    ),
}

AFFINE = {"g": (6,), "b": (6,)}
NORMS = {
    "batch normalisation": Row(
        lambda p, x: F.conv1d(p.n(F.conv1d(x, p.w)), p.v),
        {**MAPS, "n": lambda: nn.BatchNorm1d(6)},
        "a=6",
        MAP_AXES + ", n.weight: a, n.bias: a, n.running_mean: a, n.running_var: a",
        LINE,
    ),
    "batch normalisation without gain": Row(
        lambda p, x: F.conv1d(p.n(F.conv1d(x, p.w)), p.v),
        {**MAPS, "n": lambda: nn.BatchNorm1d(6, affine=False)},
        "a=6",
        MAP_AXES + ", n.running_mean: a, n.running_var: a",
        LINE,
    ),
    "instance normalisation": Row(
        lambda p, x: F.conv1d(p.n(F.conv1d(x, p.w)), p.v),
        {**MAPS, "n": lambda: nn.InstanceNorm1d(6, affine=True)},
        "a=6",
        MAP_AXES + ", n.weight: a, n.bias: a",
        LINE,
    ),
    "instance normalisation without gain": Row(line(F.instance_norm), MAPS, "a=6", MAP_AXES, LINE),
    "group normalisation": Row(
        lambda p, x: F.conv1d(F.group_norm(F.conv1d(x, p.w), 2, p.g, p.b), p.v),
        {**MAPS, **AFFINE},
        "a=2, b=3 in a",
        "w: a.b|3|1, v: 2|a.b|1, g: a.b, b: a.b",
        LINE,
    ),
    "group normalisation without gain": Row(
        line(lambda h: F.group_norm(h, 3)),
        MAPS,
        "a=3, b=2 in a",
        "w: a.b|3|1, v: 2|a.b|1",
        LINE,
    ),
    "layer normalisation": Row(
        lambda p, x: out(p, F.layer_norm(hidden(p, x), (6,), p.g, p.b)),
        {**LAYERS, **AFFINE},
        "a=6",
        FREE[1] + ", g: a, b: a",
    ),
    "layer normalisation without gain": Row(after(lambda h: F.layer_norm(h, (6,))), LAYERS, *FREE),
    "layer normalisation over tokens and units": Row(
        lambda p, x: out(p, F.layer_norm(hidden(p, x), (4, 6), p.g, p.b)),
        {**LAYERS, "g": (4, 6), "b": (4, 6)},
        "a=6",
        FREE[1] + ", g: 4|a, b: 4|a",
        TOKENS,
    ),
    "root-mean-square normalisation": Row(
        lambda p, x: out(p, F.rms_norm(hidden(p, x), (6,), p.g)),
        {**LAYERS, "g": (6,)},
        "a=6",
        FREE[1] + ", g: a",
    ),
    "root-mean-square normalisation without gain": Row(
        after(lambda h: F.rms_norm(h, (6,))), LAYERS, *FREE
    ),
}

FREE_LINE, FREE_IMAGE = ("a=6", MAP_AXES, LINE), ("a=6", IMAGE_AXES, IMAGE)
SPATIAL = {
    "largest in windows": Row(line(lambda h: F.max_pool1d(h, 2)), MAPS, *FREE_LINE),
    "largest in windows of pixels": Row(image(lambda h: F.max_pool2d(h, 2)), IMAGES, *FREE_IMAGE),
    "largest in windows and their places": Row(
        lambda p, x: (lambda h, i: (F.conv2d(h, p.v), F.conv2d(i.to(h.dtype), p.v)))(
            *F.max_pool2d(F.conv2d(x, p.w), 2, return_indices=True)
        ),
        IMAGES,
        *FREE_IMAGE,
    ),
    "mean in windows": Row(image(lambda h: F.avg_pool2d(h, 3, 1, 1)), IMAGES, *FREE_IMAGE),
    "one mean": Row(image(lambda h: F.adaptive_avg_pool2d(h, 1)), IMAGES, *FREE_IMAGE),
    "mean in as many windows as wanted": Row(
        line(lambda h: F.adaptive_avg_pool1d(h, 2)), MAPS, *FREE_LINE
    ),
    "largest in as many windows as wanted": Row(
        image(lambda h: F.adaptive_max_pool2d(h, 2)), IMAGES, *FREE_IMAGE
    ),
    "largest in as many windows as wanted and their places": Row(
        lambda p, x: (lambda h, i: (F.conv2d(h, p.v), F.conv2d(i.to(h.dtype), p.v)))(
            *F.adaptive_max_pool2d(F.conv2d(x, p.w), 2, return_indices=True)
        ),
        IMAGES,
        *FREE_IMAGE,
    ),
    "windows of units": Row(
        after(lambda h: F.max_pool1d(h, 2)),
        {"w": W, "v": (2, 3)},
        "",
        "w: 6|3, v: 2|3",
        TOKENS,
    ),
    "pixels doubled": Row(image(lambda h: F.interpolate(h, scale_factor=2)), IMAGES, *FREE_IMAGE),
    "pixels between pixels": Row(
        image(lambda h: F.interpolate(h, size=(5, 7), mode="bilinear")), IMAGES, *FREE_IMAGE
    ),
    "patches": Row(
        lambda p, x: F.conv1d(F.unfold(F.conv2d(x, p.w), 2), p.v),
        {"w": (6, 3, 1, 1), "v": (2, 24, 1)},
        "a=6",
        "w: a|3|1|1, v: 2|a.4|1",
        IMAGE,
    ),
    "patches put back": Row(
        lambda p, x: F.conv2d(F.fold(F.conv1d(x, p.w), (4, 4), 2, stride=2), p.v),
        {"w": (24, 3, 1), "v": (2, 6, 1, 1)},
        "a=6",
        "w: a.4|3|1, v: 2|a|1|1",
        ((2, 3, 4),),
    ),
}


def recurrent_axes(gates, place, read, own, state=None):
    """Axes of one layer in one direction: gates times units, what is read, what is kept."""
    state = state or own
    made = [("weight_ih", f"{gates}{own}|{read}"), ("weight_hh", f"{gates}{own}|{state}")]
    made += [("bias_ih", f"{gates}{own}"), ("bias_hh", f"{gates}{own}")]
    made += [("weight_hr", f"{state}|{own}")] if state != own else []
    return [f"r.{name}_{place}: {axes}" for name, axes in made]


def rnn_row(kind, gates, directions, head, *, forward=None, groups="a=4", **options):
    axes = [f"v: 2|{head}"]
    factor = f"{gates}." if gates > 1 else ""
    for place, read, own, *state in directions:
        axes += recurrent_axes(factor, place, read, own, *state)
    batch_first = options.get("batch_first", True)
    width = {"a": 4, "b": 4, "[a+b]": 8, "projected": 3}
    columns = 3 if "proj_size" in options else width[head]
    return Row(
        forward or (lambda p, x: out(p, p.r(x)[0])),
        {"v": (2, columns), "r": lambda: kind(3, 4, **{"batch_first": True, **options})},
        groups,
        ", ".join(axes),
        TOKENS if batch_first else ((4, 2, 3),),
    )


ONE = [("l0", 3, "a")]
RECURRENT = {
    "lstm": rnn_row(nn.LSTM, 4, ONE, "a"),
    "lstm with time first": rnn_row(nn.LSTM, 4, ONE, "a", batch_first=False),
    "lstm read at the last step": rnn_row(
        nn.LSTM, 4, ONE, "a", forward=lambda p, x: out(p, p.r(x)[0][:, -1])
    ),
    "lstm of which the last state is read": rnn_row(
        nn.LSTM, 4, ONE, "a", forward=lambda p, x: out(p, p.r(x)[1][0][-1])
    ),
    "lstm of which the last cell is read": rnn_row(
        nn.LSTM, 4, ONE, "a", forward=lambda p, x: out(p, p.r(x)[1][1][-1])
    ),
    "lstm in both directions": rnn_row(
        nn.LSTM,
        4,
        [("l0", 3, "a"), ("l0_reverse", 3, "b")],
        "[a+b]",
        groups="a=4, b=4",
        bidirectional=True,
    ),
    "lstm in both directions of which the last states are read": rnn_row(
        nn.LSTM,
        4,
        [("l0", 3, "a"), ("l0_reverse", 3, "b")],
        "[a+b]",
        forward=lambda p, x: out(p, p.r(x)[1][0].transpose(0, 1).flatten(1)),
        groups="a=4, b=4",
        bidirectional=True,
    ),
    "lstm of two layers": rnn_row(
        nn.LSTM,
        4,
        [("l0", 3, "b"), ("l1", "b", "a")],
        "a",
        groups="a=4, b=4",
        num_layers=2,
    ),
    "lstm of two layers of which the last state is read": rnn_row(
        nn.LSTM,
        4,
        [("l0", 3, "b"), ("l1", "b", "a")],
        "a",
        forward=lambda p, x: out(p, p.r(x)[1][0][-1]),
        groups="a=4, b=4",
        num_layers=2,
    ),
    "lstm of two layers in both directions": rnn_row(
        nn.LSTM,
        4,
        [
            ("l0", 3, "c"),
            ("l0_reverse", 3, "d"),
            ("l1", "[c+d]", "a"),
            ("l1_reverse", "[c+d]", "b"),
        ],
        "[a+b]",
        groups="a=4, b=4, c=4, d=4",
        num_layers=2,
        bidirectional=True,
    ),
    "lstm with a projection": rnn_row(
        nn.LSTM, 4, [("l0", 3, "b", "a")], "a", groups="a=3, b=4", proj_size=3
    ),
    "gru": rnn_row(nn.GRU, 3, ONE, "a"),
    "gru of which the last state is read": rnn_row(
        nn.GRU, 3, ONE, "a", forward=lambda p, x: out(p, p.r(x)[1][0])
    ),
    "rnn with tanh": rnn_row(nn.RNN, 1, ONE, "a"),
    "rnn with relu": rnn_row(nn.RNN, 1, ONE, "a", nonlinearity="relu"),
    "lstm that begins with a layer": Row(
        lambda p, x: out(p, p.r(x, (p.h(x[:, 0])[None], p.c(x[:, 0])[None]))[0]),
        {
            "v": (2, 4),
            "h": lambda: nn.Linear(3, 4),
            "c": lambda: nn.Linear(3, 4, bias=False),
            "r": lambda: nn.LSTM(3, 4, batch_first=True, bias=False),
        },
        "a=4",
        "v: 2|a, h.weight: a|3, h.bias: a, c.weight: a|3, r.weight_ih_l0: 4.a|3, "
        "r.weight_hh_l0: 4.a|a",
        TOKENS,
    ),
}

TABLE = {
    **POINTWISE,
    **FOLDED,
    **ORDERED,
    **VIEWS,
    **INDEXED,
    **PRODUCTS,
    **CONVOLUTIONS,
    **NORMS,
    **SPATIAL,
    **RECURRENT,
}


@cache
def traced(name) -> Program:
    row = TABLE[name]
    return trace(row.module(), row.tensors())


def shown(spec) -> tuple[str, str]:
    """Groups and axes of a spec as the table writes them."""
    letter = dict(zip(spec.groups, "abcdefgh", strict=False))

    def axis(factors) -> str:
        return ".".join(
            f"[{'+'.join(axis(part) for part in f.axes)}]"
            if isinstance(f, Concat)
            else letter.get(f.group, str(f.size))
            for f in factors
        )

    groups = [
        f"{letter[g]}={n}"
        + " in " * bool(spec.outer(g))
        + "x".join(letter[o] for o in spec.outer(g))
        for g, n in spec.groups.items()
    ]
    axes = [f"{key}: {'|'.join(map(axis, own))}" for key, own in spec.axes.items()]
    return ", ".join(groups), ", ".join(axes)


@pytest.mark.parametrize("name", TABLE)
def test_groups_and_axes_are_those_worked_out_by_hand(name):
    spec = discover_program(traced(name))
    groups, axes = shown(spec)
    assert groups == TABLE[name].groups
    assert axes.split(", ") == TABLE[name].axes.split(", ")


def wild(row: Row, spec) -> tuple[dict[str, Tensor], dict[str, Tensor], tuple[Tensor, ...]]:
    """Random weights of the network, the same permuted, and random inputs, in float64."""
    generator = torch.Generator().manual_seed(1)
    weights = {
        key: t.double() + torch.rand(t.shape, generator=generator, dtype=torch.float64)
        if t.is_floating_point()
        else t
        for key, t in row.module().state_dict().items()
    }
    inputs = tuple(x.double() if x.is_floating_point() else x for x in row.tensors())
    perm = {}
    for group, index in spec.random(generator).items():  # in one cycle: no unit stays in place
        perm[group] = torch.empty_like(index).scatter_(-1, index, index.roll(1, -1))
    return weights, spec.permute(weights, perm), inputs


@pytest.mark.parametrize("name", TABLE)
def test_the_module_itself_computes_the_same_with_permuted_weights(name):
    row = TABLE[name]
    spec = discover_program(traced(name))
    weights, permuted, inputs = wild(row, spec)
    if spec.groups:
        assert any(not torch.equal(permuted[key], weights[key]) for key in weights)
    with torch.no_grad():
        before, after = (
            functional_call(row.module().double(), own, inputs) for own in (weights, permuted)
        )
    one, other = (x if isinstance(x, tuple) else (x,) for x in (before, after))
    for a, b in zip(one, other, strict=True):
        assert float((a - b).abs().max()) <= SAME * float(1 + a.abs().max())


def test_the_table_reaches_every_rule():
    ops = {node.op for name in TABLE for node in traced(name).nodes}
    reached = {RULES[op].__name__ for op in ops if op in RULES}
    assert {rule.__name__ for rule in RULES.values()} - reached == set()


@pytest.mark.parametrize("op", sorted(RULES))
def test_every_rule_is_for_an_operator_that_exists_and_is_pure(op):
    assert not operator(op)._schema.is_mutable


def test_entry_wise_operators_need_no_name_in_the_table():
    assert "gelu.default" not in RULES
    assert rule_of("gelu.default") is rule_of("hardswish.default")
    assert rule_of("cummax.default") is None


def largest_so_far(p, x):
    """``cummax`` has no rule: the first layer's units go through it, those of ``u`` do not."""
    return out(p, hidden(p, x).cummax(1)[0]) + F.linear(F.linear(x, p.s).relu(), p.t)


NO_RULE = Row(
    largest_so_far,
    {**LAYERS, "s": (5, 3), "t": (2, 5)},
    "a=5",
    "w: 6|3, v: 2|6, s: a|3, t: 2|a",
)


def test_an_operator_without_a_rule_is_refused_with_the_tensors_it_touches():
    with pytest.raises(StructureError) as caught:
        discover(NO_RULE.module(), NO_RULE.tensors())
    message = str(caught.value)
    assert message.startswith("Operator aten.cummax.default (cummax) cannot be followed: ")
    assert "touches units of ['w (6, 3)']" in message
    assert message.endswith("Pass partial=True to pin these units and go on.")


def test_a_partial_spec_pins_what_an_unknown_operator_reads_and_leaves_the_rest_free():
    spec = discover(NO_RULE.module(), NO_RULE.tensors(), partial=True)
    assert shown(spec) == (NO_RULE.groups, NO_RULE.axes)
    assert len(spec.pinned) == 1
    assert spec.pinned[0].startswith("units of w (6, 3) at aten.cummax.default (cummax): ")
    assert f"pinned: {spec.pinned[0]}" in str(spec)
    assert spec.hidden == (6 + 5, 5)
    assert spec.fixed["aten.cummax.default cannot be followed"] == 1


def test_an_unknown_operator_on_nothing_but_inputs_needs_no_rule():
    row = Row(lambda p, x: out(p, hidden(p, x.cummax(1)[0])), LAYERS, *FREE)
    spec = discover(row.module(), row.tensors())
    assert shown(spec) == FREE
    assert spec.pinned == ()


def flipped():
    row = TABLE["units flipped"]
    return discover(row.module(), row.tensors())


@pytest.fixture
def without_cache(monkeypatch):
    """No spec is remembered from, or for, other tests."""
    monkeypatch.setattr(discovery, "_SPECS", {})


@pytest.mark.usefixtures("without_cache")
def test_a_rule_that_claims_too_much_fails_the_proof(monkeypatch):
    assert flipped().groups == {}
    discovery._SPECS.clear()
    monkeypatch.setitem(RULES, "flip.default", lambda call: call.tensor())
    with pytest.raises(StructureError, match="permuting w changes the output by") as caught:
        flipped()
    assert "('w', 0), ('v', 1)" in str(caught.value)


@pytest.mark.usefixtures("without_cache")
def test_a_group_that_fails_the_proof_is_pinned_where_that_is_allowed(monkeypatch):
    monkeypatch.setitem(RULES, "flip.default", lambda call: call.tensor())
    row = TABLE["units flipped"]
    spec = discover(row.module(), row.tensors(), partial=True)
    assert shown(spec) == FIXED
    assert spec.pinned == ("w (6 units): it failed the proof",)
    assert spec.hidden == (6, 0)


@pytest.mark.usefixtures("without_cache")
def test_a_rule_that_forgets_an_axis_is_caught_by_the_sizes(monkeypatch):
    monkeypatch.setitem(RULES, "flip.default", lambda call: call.tensor()[:-1])
    with pytest.raises(StructureError, match=r"finds axes of \(2,\), the network has \(2, 6\)"):
        flipped()


@pytest.mark.usefixtures("without_cache")
def test_a_rule_that_ties_axes_of_different_sizes_is_refused_where_it_stands(monkeypatch):
    def wrong(call):
        call.unify(call.tensor()[0], call.tensor()[1])
        return call.tensor()

    monkeypatch.setitem(RULES, "flip.default", wrong)
    with pytest.raises(StructureError, match="ties an axis of 2 entries to one of 6"):
        flipped()


def test_a_spec_that_forgets_one_axis_of_a_nested_group_is_refused():
    row = TABLE["attention"]
    program = traced("attention")
    spec = discover_program(program)
    group = list(spec.groups)[-1]
    with pytest.raises(StructureError, match="permutation spec is wrong"):
        prove(program, forget(spec, "v", 1, group))
    assert shown(spec) == (row.groups, row.axes)


def forget(spec, key, axis, group):
    """The spec without one group on one axis."""
    kept = tuple(Factor(None, f.size) if f.group == group else f for f in spec.axes[key][axis])
    axes = tuple(kept if a == axis else own for a, own in enumerate(spec.axes[key]))
    return replace(spec, axes={**spec.axes, key: axes})
