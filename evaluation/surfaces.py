"""Orthogonalised steps on functions whose minima are known: ``python -m evaluation.surfaces``.

Each function is the mean of a few terms, and a term is what a cluster is in training. Every rule
of ``zoo.combination`` goes from many random starts; its learning rate is the one that does best
from other starts. The picture shows a path of each.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import pi
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

from zoo.adam import AdamW
from zoo.combination import combine, rule_named
from zoo.options import command

RATES = tuple(10 ** (-i / 2) for i in range(11))  # 1 to 1e-5
CLOSE = 0.01  # distance to a global minimum that counts as there


@dataclass(frozen=True)
class Surface:
    """A function of a few numbers.

    Attributes:
        terms: Points ``[n, d]`` -> terms ``[n, k]``; the function is their mean.
        low: Corner of the box that starts are drawn from.
        high: The opposite corner.
        minima: Global minima, ``(d numbers each)``.
        agree: Whether every term is smallest at those minima.
        start: Where the path of the picture starts.
    """

    terms: Callable[[Tensor], Tensor]
    low: tuple[float, ...]
    high: tuple[float, ...]
    minima: tuple[tuple[float, ...], ...]
    agree: bool
    start: tuple[float, ...]


def _rosenbrock(p: Tensor) -> Tensor:
    x, y = p.unbind(-1)
    return torch.stack([(1 - x) ** 2, 100 * (y - x**2) ** 2], -1)


def _himmelblau(p: Tensor) -> Tensor:
    x, y = p.unbind(-1)
    return torch.stack([(x**2 + y - 11) ** 2, (x + y**2 - 7) ** 2], -1)


def _beale(p: Tensor) -> Tensor:
    x, y = p.unbind(-1)
    return torch.stack([(c - x + x * y**i) ** 2 for i, c in enumerate((1.5, 2.25, 2.625), 1)], -1)


def _rastrigin(p: Tensor) -> Tensor:
    return p**2 - 10 * torch.cos(2 * pi * p) + 10


def _booth(p: Tensor) -> Tensor:
    x, y = p.unbind(-1)
    return torch.stack([(x + 2 * y - 7) ** 2, (2 * x + y - 5) ** 2], -1)


def _powell(p: Tensor) -> Tensor:
    a, b, c, d = p.unbind(-1)
    pairs = ((a + 10 * b) ** 2, 5 * (c - d) ** 2, (b - 2 * c) ** 4, 10 * (a - d) ** 4)
    return torch.stack(pairs, -1)


def _bowls(p: Tensor) -> Tensor:
    centres = torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.5, -1.0]], dtype=p.dtype)
    widths = torch.tensor([[1.0, 3.0], [2.0, 1.0], [1.0, 1.0]], dtype=p.dtype)
    return (widths * (p.unsqueeze(-2) - centres) ** 2).sum(-1)


_BOWLS = ((1.5 / 4, -0.5 / 5),)  # the mean of the centres, weighted by the widths, axis by axis
_FOUR = ((3.0, 2.0), (-2.805118, 3.131312), (-3.779310, -3.283186), (3.584428, -1.848126))
SURFACES = {
    "Rosenbrock": Surface(_rosenbrock, (-2, -1), (2, 3), ((1.0, 1.0),), True, (-1.5, 2.0)),
    "Himmelblau": Surface(_himmelblau, (-5, -5), (5, 5), _FOUR, True, (-0.5, -4.0)),
    "Beale": Surface(_beale, (-2, -2), (4.5, 2), ((3.0, 0.5),), True, (-1.0, 1.5)),
    "Booth": Surface(_booth, (-10, -10), (10, 10), ((1.0, 3.0),), True, (-8.0, -5.0)),
    "Rastrigin": Surface(
        _rastrigin, (-5.12, -5.12), (5.12, 5.12), ((0.0, 0.0),), True, (3.6, -2.3)
    ),
    "Powell": Surface(_powell, (-4,) * 4, (5,) * 4, ((0.0,) * 4,), True, (3.0, -1.0, 0.0, 1.0)),
    "three bowls": Surface(_bowls, (-3, -3), (3, 3), _BOWLS, False, (-2.5, 2.5)),
}


@dataclass(frozen=True)
class SurfaceOptions:
    """Try the rules that combine gradients on test functions."""

    rules: tuple[str, ...] = (  # see zoo/combination.py
        *("plain", "increasing", "decreasing", "leaky", "stretched"),
        *("adam", "adam-increasing"),
    )
    starts: int = 100  # random starts that are reported; as many others choose the learning rate
    steps: int = 500  # steps from each
    seed: int = 0  # seed of the starts
    out: str = "runs/surfaces"  # folder of table and picture


def descend(
    surface: Surface, rule: str, starts: Tensor, rates: Tensor, steps: int, seed: int = 0
) -> Tensor:
    """Go down from all starts at once.

    Args:
        surface: The function.
        rule: One of ``RULES``.
        starts: Points ``[n, d]``.
        rates: Learning rate of each ``[n]``.
        steps: Steps.
        seed: Of what is dropped.

    Returns:
        The points of every path, ``[steps + 1, n, d]``; not finite once a path has diverged.
    """
    found = rule_named(rule)
    points = {"x": starts.clone()}
    optimizer = AdamW(points, torch.zeros(len(starts))) if found.adam else None
    generator = torch.Generator().manual_seed(seed)
    path = [starts.clone()]
    for _ in range(steps):
        here = points["x"].detach().requires_grad_()
        with torch.enable_grad():
            terms = surface.terms(here).unbind(-1)
            each = [
                torch.autograd.grad(t.sum(), here, retain_graph=i < len(terms) - 1)[0]
                for i, t in enumerate(terms)
            ]
        gradients = torch.stack(each, 1)  # [n, k, d]
        shares = torch.full(gradients.shape[:2], 1 / len(each), dtype=starts.dtype)
        draws = torch.rand(gradients.shape[:2], generator=generator, dtype=starts.dtype)
        direction = combine(gradients, shares, found, draws)
        if optimizer:
            optimizer.step({"x": direction}, rates)
        else:
            points["x"] -= rates.unsqueeze(1) * direction
        path.append(points["x"].clone())
    return torch.stack(path)


def arrivals(surface: Surface, path: Tensor) -> tuple[Tensor, Tensor]:
    """When paths come to a global minimum, and how far from it they end.

    Args:
        surface: The function.
        path: ``[steps + 1, n, d]``.

    Returns:
        Steps until a path is close for the first time, infinite if never ``[n]``, and the distance
        of its end from the nearest minimum ``[n]``.
    """
    minima = torch.tensor(surface.minima, dtype=path.dtype)
    gaps = torch.stack([(path - own).norm(dim=-1) for own in minima]).amin(0)  # [steps + 1, n]
    gaps = gaps.nan_to_num(torch.inf)
    close = gaps < CLOSE
    first = close.float().argmax(0).to(path.dtype).masked_fill(~close.any(0), torch.inf)
    return first, gaps[-1]


def judge(surface: Surface, rule: str, options: SurfaceOptions) -> dict[str, Any]:
    """Choose a learning rate from some starts and report others.

    Args:
        surface: The function.
        rule: One of ``RULES``.
        options: How many starts and steps.

    Returns:
        ``lr``, ``arrived`` (share of starts that come close), ``steps`` (median of all, None if
        fewer than half arrive), ``stayed`` (share that end there) and ``distance`` (median at the
        end).
    """
    n = options.starts
    generator = torch.Generator().manual_seed(options.seed)
    low, high = (
        torch.tensor(corner, dtype=torch.float64) for corner in (surface.low, surface.high)
    )
    drawn = low + (high - low) * torch.rand(2 * n, len(low), generator=generator, dtype=low.dtype)
    rates = torch.tensor(RATES, dtype=low.dtype).repeat_interleave(2 * n)
    path = descend(surface, rule, drawn.repeat(len(RATES), 1), rates, options.steps)
    first, ends = (found.unflatten(0, (len(RATES), 2, n)) for found in arrivals(surface, path))
    spent = first[:, 1].clamp(max=10.0 * options.steps).mean(1)  # who never arrives pays tenfold
    far = ends[:, 1].clamp(max=1e30).median(1).values
    best = min(range(len(RATES)), key=lambda i: (float(spent[i]), float(far[i])))
    first, ends = first[best, 0], ends[best, 0]
    middle = float(first.quantile(0.5, interpolation="nearest"))
    return {
        "lr": RATES[best],
        "arrived": float(first.isfinite().double().mean()),
        "steps": middle if middle < torch.inf else None,
        "stayed": float((ends < CLOSE).double().mean()),
        "distance": float(ends.quantile(0.5, interpolation="nearest").clamp(max=1e30)),
    }


# ----------------------------------------------------------------------------------------------
# table and picture

DRAWN = {
    "plain": ("#222222", "--"),
    "increasing": ("#e08214", "-"),
    "decreasing": ("#3b7dd8", "-"),
    "adam": ("#2a9d6f", "--"),
    "adam-increasing": ("#b1509b", "-"),
}


def paths_figure(rows: Sequence[dict[str, Any]], steps: int) -> Figure:
    """One path of every rule on every function of two numbers.

    Args:
        rows: Rows of the table, which know the learning rates.
        steps: Steps of a path.

    Returns:
        The figure.
    """
    flat = {name: surface for name, surface in SURFACES.items() if len(surface.low) == 2}
    figure = Figure(figsize=(11, 7.4), layout="constrained", facecolor="white")
    for axes, (name, surface) in zip(figure.subplots(2, 3).flatten(), flat.items(), strict=True):
        _contours(axes, surface)
        for rule, (colour, dashes) in DRAWN.items():
            own = [row for row in rows if (row["function"], row["rule"]) == (name, rule)]
            if not own:
                continue
            start = torch.tensor([surface.start], dtype=torch.float64)
            rate = torch.tensor([own[0]["lr"]], dtype=torch.float64)
            x, y = descend(surface, rule, start, rate, steps)[:, 0].T
            axes.plot(x, y, dashes, color=colour, linewidth=1.3, label=rule)
            axes.plot(x[-1:], y[-1:], "o", color=colour, markersize=4)
        axes.plot(*surface.start, "s", color="#222222", markersize=5)
        axes.plot(*zip(*surface.minima, strict=True), "*", color="#d62728", markersize=10)
        axes.set_title(f"{name}{'' if surface.agree else ': terms disagree'}", fontsize=10)
        axes.tick_params(labelsize=8)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.suptitle(
        f"{steps} steps from the square, each rule at the rate that was chosen for it; "
        "stars are global minima, dots the ends",
        fontsize=10,
    )
    return figure


def _contours(axes: Axes, surface: Surface) -> None:
    (left, bottom), (right, top) = surface.low, surface.high
    xs, ys = (torch.linspace(a, b, 200) for a, b in ((left, right), (bottom, top)))
    grid = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1)
    heights = surface.terms(grid.reshape(-1, 2)).mean(-1).reshape(200, 200)
    axes.contourf(xs, ys, (heights + 0.1).log(), levels=14, cmap="Greys", alpha=0.45)
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)


def table_text(rows: Sequence[dict[str, Any]], rules: Sequence[str]) -> str:
    """Functions down, rules across: share of starts that arrive, and median steps of all.

    Args:
        rows: Rows of the table.
        rules: The rules, in order.

    Returns:
        A table in Markdown.
    """
    lines = [f"| | {' | '.join(rules)} |", "|---" * (len(rules) + 1) + "|"]
    for name in dict.fromkeys(row["function"] for row in rows):
        own = {row["rule"]: row for row in rows if row["function"] == name}
        cells = [
            f"{own[rule]['arrived']:.0%}, {own[rule]['steps']:.0f}"
            if own[rule]["steps"] is not None
            else f"{own[rule]['arrived']:.0%}, -"
            for rule in rules
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def surfaces(options: SurfaceOptions) -> list[dict[str, Any]]:
    """Judge every rule on every function; print the table, write files.

    Args:
        options: What to try.

    Returns:
        One row per function and rule.
    """
    console, out = Console(), Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, surface in SURFACES.items():
        for rule in options.rules:
            rows.append({"function": name, "rule": rule, **judge(surface, rule, options)})
        console.print(f"[bold]surfaces[/] {name}")
    text = table_text(rows, options.rules)
    (out / "surfaces.md").write_text(text)
    (out / "surfaces.json").write_text(json.dumps(rows, indent=1))
    paths_figure(rows, options.steps).savefig(out / "paths.png", dpi=150)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    return rows


def main() -> None:
    """Entry point of ``python -m evaluation.surfaces``."""
    command(SurfaceOptions, surfaces, prog="python -m evaluation.surfaces")


if __name__ == "__main__":
    main()
