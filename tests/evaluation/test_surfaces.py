import pytest
import torch

from evaluation.surfaces import (
    SURFACES,
    SurfaceOptions,
    arrivals,
    descend,
    judge,
    paths_figure,
    table_text,
)

every_surface = pytest.mark.parametrize("name", SURFACES)


def minima(surface):
    return torch.tensor(surface.minima, dtype=torch.float64)


@every_surface
def test_minima_are_minima(name):
    surface = SURFACES[name]
    points = minima(surface)
    lowest = surface.terms(points).mean(-1)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        near = points + 1e-2 * torch.randn(points.shape, generator=generator, dtype=points.dtype)
        assert (surface.terms(near).mean(-1) >= lowest - 1e-9).all()


@every_surface
def test_terms_agree_where_it_is_said_that_they_do(name):
    surface = SURFACES[name]
    points = minima(surface).requires_grad_()
    terms = surface.terms(points).unbind(-1)
    slopes = [torch.autograd.grad(t.sum(), points, retain_graph=True)[0].norm() for t in terms]
    assert (max(slopes) < 1e-3) == surface.agree  # Himmelblau's minima are given to 6 places


def test_plain_descent_is_that_of_the_mean():
    surface = SURFACES["Booth"]
    starts = torch.tensor([[4.0, -2.0], [0.0, 1.0]], dtype=torch.float64)
    rates = torch.tensor([0.01, 0.05], dtype=torch.float64)
    path = descend(surface, "plain", starts, rates, 3)
    x = starts.clone()
    for step in range(3):
        here = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(surface.terms(here).mean(-1).sum(), here)
        x = x - rates.unsqueeze(1) * gradient
        torch.testing.assert_close(path[step + 1], x)


def test_where_terms_disagree_orthogonalised_steps_do_not_rest():
    surface = SURFACES["three bowls"]
    start = minima(surface)
    rate = torch.tensor([0.01], dtype=torch.float64)
    still = descend(surface, "plain", start, rate, 5)
    torch.testing.assert_close(still[-1], start)
    moved = descend(surface, "increasing", start, rate, 200)
    assert float((moved[-1] - start).norm()) > 0.05


def test_arrivals_count_steps_to_the_nearest_minimum():
    path = torch.tensor([[5.0, 5.0], [3.0, 2.001], [4.0, 4.0]]).unsqueeze(1)  # one path
    first, ends = arrivals(SURFACES["Himmelblau"], torch.cat([path, path * torch.nan], 1))
    assert first.tolist() == [1.0, torch.inf]
    assert float(ends[0]) > 0.01
    assert ends[1].isinf()


def test_rules_are_judged_and_drawn():
    options = SurfaceOptions(starts=4, steps=300)
    rows = [
        {"function": "Booth", "rule": rule, **judge(SURFACES["Booth"], rule, options)}
        for rule in ("plain", "adam-increasing")
    ]
    assert rows[0]["arrived"] == 1.0
    assert rows[0]["steps"] <= 300
    assert "| Booth | 100%" in table_text(rows, ("plain", "adam-increasing"))
    assert len(paths_figure(rows, 5).axes) == 6
