"""The ridge regression behind refit, beside its normal equations; variances, beside torch's."""

import pytest
import torch

from metamerge.corrections.refit import moments, sampled, solve_ridge, variance


def ridge_problem(rows, columns):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, rows, columns, generator=generator, dtype=torch.float64)
    targets = torch.randn(2, rows, 4, generator=generator, dtype=torch.float64)
    return inputs, targets


@pytest.mark.parametrize(("rows", "columns"), [(40, 7), (12, 12), (9, 30)])
@pytest.mark.parametrize("ridge", [1e-2, 1.0])
def test_ridge_regression_agrees_with_the_normal_equations_in_both_forms(rows, columns, ridge):
    inputs, targets = ridge_problem(rows, columns)
    found = solve_ridge(inputs, targets, ridge)
    for f in range(2):
        x, y = inputs[f], targets[f]
        penalty = ridge * rows * x.square().mean() + 1e-8
        primal = torch.linalg.solve(x.T @ x + penalty * torch.eye(columns).double(), x.T @ y)
        kernel = x.T @ torch.linalg.solve(x @ x.T + penalty * torch.eye(rows).double(), y)
        assert torch.allclose(primal, kernel, atol=1e-10)
        assert torch.allclose(found[f], primal, atol=1e-10)
    # The largest eigenvalue is at most the trace, so the condition is at most columns / ridge + 1.
    rough = solve_ridge(inputs.float(), targets.float(), ridge).double()
    bound = (columns / ridge + 1) * 2**-23
    assert float((rough - found).norm() / found.norm()) < bound


@pytest.mark.parametrize(("rows", "columns", "size"), [(40, 7, 7), (9, 30, 9)])
def test_the_smaller_of_the_two_matrices_is_factorised(monkeypatch, rows, columns, size):
    factorised = []
    original = torch.linalg.cholesky
    monkeypatch.setattr(
        torch.linalg, "cholesky", lambda gram: factorised.append(gram.shape) or original(gram)
    )
    solve_ridge(*ridge_problem(rows, columns), 0.1)
    assert factorised == [(2, size, size)]


def test_the_solution_of_a_ridge_regression_is_a_minimum():
    inputs, targets = ridge_problem(40, 7)
    solution = solve_ridge(inputs, targets, 0.1)

    def loss(change):
        candidate = solution + change
        penalty = 0.1 * 40 * inputs.square().mean((1, 2)) * candidate.square().sum((1, 2))
        return (inputs @ candidate - targets).square().sum((1, 2)) + penalty

    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        change = torch.randn(solution.shape, generator=generator, dtype=torch.float64) / 100
        assert (loss(change) > loss(torch.zeros_like(change))).all()


def test_ridge_regression_by_hand():
    # x = 1, 2 and y = 2, 4: x'y = 10, x'x = 5 and 2 * mean(x^2) = 5, so the slope is 10 / (5 + 5r).
    inputs, targets = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[2.0], [4.0]]])
    assert solve_ridge(inputs, targets, 0.0).item() == pytest.approx(2, rel=1e-6)
    assert solve_ridge(inputs, targets, 1.0).item() == pytest.approx(1, rel=1e-6)
    assert solve_ridge(inputs, targets, torch.tensor(3.0)).item() == pytest.approx(0.5, rel=1e-6)


def test_inputs_that_are_all_zero_give_a_zero_solution():
    targets = torch.ones(1, 5, 2)
    for columns in (3, 9):
        solution = solve_ridge(torch.zeros(1, 5, columns), targets, 1e-2)
        assert torch.equal(solution, torch.zeros(1, columns, 2))


@pytest.mark.parametrize(("rows", "columns"), [(6, 3), (3, 6)])
def test_ridge_regression_can_be_differentiated_in_both_forms(rows, columns):
    inputs, targets = ridge_problem(rows, columns)
    ridge = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    arguments = inputs.requires_grad_(), targets.requires_grad_(), ridge
    assert torch.autograd.gradcheck(solve_ridge, arguments)


@pytest.mark.parametrize("dim", [0, 1])
def test_variances_and_their_gradients_are_those_of_torch(dim):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    expected = values.var(dim, correction=0)
    assert torch.allclose(variance(values, dim), expected, atol=1e-14)
    along = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    found, wanted = (
        torch.autograd.grad(v, values, along)[0] for v in (variance(values, dim), expected)
    )
    assert torch.allclose(found, wanted, atol=1e-14)
    assert torch.autograd.gradgradcheck(lambda v: variance(v, dim), values)


def test_means_come_with_variances_and_can_be_differentiated_together():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.equal(moments(values, 1)[0], values.mean(1))
    assert torch.equal(moments(values, 1)[1], variance(values, 1))
    assert torch.autograd.gradcheck(lambda v: moments(v, 1), values)


def test_rows_that_all_take_part_are_not_copied():
    rows = torch.arange(24.0).reshape(2, 6, 2)
    assert sampled(rows, 6) is rows
    some = sampled(rows, 4)
    assert some.shape == (2, 4, 2)
    assert torch.equal(some, sampled(rows, 4))  # the same ones every time
    assert (some[0, 1:, 0] > some[0, :-1, 0]).all()  # in their order
