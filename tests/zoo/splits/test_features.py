import pytest
import torch
from sklearn.feature_selection import f_classif, f_regression
from sklearn.linear_model import LinearRegression

from metamerge.errors import ConfigError, ZooError
from zoo.splits import dirichlet, validate
from zoo.splits.features import (
    activations,
    binned_targets,
    difficulty_scores,
    errors,
    important_inputs,
    inputs,
    principal_values,
)
from zoo.tasks import load_task

ROWS = torch.arange(50, 250)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def spoil(tensor):
    """The same in ``ROWS``, and something else everywhere else."""
    spoiled = torch.full_like(tensor, torch.nan if tensor.is_floating_point() else 7)
    spoiled[ROWS] = tensor[ROWS]
    return spoiled


def places(kept, flat):
    """Which column of ``flat`` each column of ``kept`` is."""
    return (kept.T[:, None] == flat.T[None]).all(2).long().argmax(1)


# ---------------------------------------------------------------------------- inputs


def test_images_become_one_row_of_numbers_each():
    images = normal(4, 2, 3, 5)
    assert inputs(images).shape == (4, 30)
    assert inputs(images)[1].equal(images[1].flatten())


def test_the_one_input_that_tells_the_classes_is_kept():
    targets = torch.arange(300) % 3
    images = normal(300, 1, 2, 3)
    images[:, 0, 1, 0] += targets
    kept = important_inputs(images, targets, ROWS, keep=1, generator=seeded())
    assert kept.equal(images[:, 0, 1, :1])


def test_inputs_that_explain_classes_are_ranked_as_by_the_f_statistic():
    task = load_task("digits")
    rows = torch.arange(1000)
    flat = inputs(task.inputs)
    kept = important_inputs(task.inputs, task.targets, rows, keep=20, generator=seeded())
    varying = (flat[rows].std(0) > 0).nonzero().flatten()
    score = f_classif(flat[rows][:, varying].double().numpy(), task.targets[rows].numpy())[0]
    best = varying[torch.from_numpy(score).argsort(descending=True)[:20]]
    assert places(kept, flat).equal(best)


def test_inputs_that_explain_one_output_are_ranked_as_by_the_f_statistic():
    flat = normal(300, 12)
    targets = flat @ torch.arange(12.0)[:, None] + normal(300, 1, seed=1)
    kept = important_inputs(flat, targets, ROWS, keep=12, generator=seeded())
    score = f_regression(flat[ROWS].double().numpy(), targets[ROWS, 0].double().numpy())[0]
    assert places(kept, flat).equal(torch.from_numpy(score).argsort(descending=True))


def test_inputs_that_several_outputs_explain_are_ranked_as_by_a_regression_on_all_of_them():
    targets = 100 + normal(300, 2)  # an offset explains nothing
    flat = normal(300, 8, seed=1) + (targets - 100) @ normal(2, 8, seed=2)
    kept = important_inputs(flat, targets, ROWS, keep=8, generator=seeded())
    answers, values = targets[ROWS].double().numpy(), flat[ROWS].double().numpy()
    shares = [LinearRegression().fit(answers, v).score(answers, v) for v in values.T]
    assert places(kept, flat).equal(torch.tensor(shares).argsort(descending=True))


def test_inputs_that_never_change_come_last():
    targets = torch.arange(300) % 2
    flat = torch.cat([torch.full((300, 1), 0.1), normal(300, 2)], 1)
    kept = important_inputs(flat, targets, ROWS, generator=seeded())
    assert kept.shape == (300, 3)
    assert kept[:, 2].equal(flat[:, 0])


@pytest.mark.parametrize("targets", [torch.arange(300) % 3, normal(300, 2, seed=5)])
def test_what_other_rows_hold_does_not_choose_inputs(targets):
    flat = normal(300, 12)
    kept = important_inputs(flat, targets, ROWS, keep=5, generator=seeded())
    spoiled = important_inputs(spoil(flat), spoil(targets), ROWS, keep=5, generator=seeded())
    assert kept[ROWS].equal(spoiled[ROWS])


def test_no_more_than_five_thousand_rows_choose_inputs():
    targets = torch.arange(20_000) % 2
    flat = normal(20_000, 3)
    state = seeded()
    seen = torch.randperm(20_000, generator=state)[:5000]
    flat[seen, 1] = targets[seen].float()  # among all rows, column 2 tells more
    flat[:, 2] = targets + flat[:, 2] / 2
    assert important_inputs(flat, targets, torch.arange(20_000), keep=1, generator=seeded()).equal(
        flat[:, 1:2]
    )


def test_choosing_no_input_or_from_spoiled_ones_is_refused():
    flat, targets = normal(300, 3), torch.arange(300) % 2
    with pytest.raises(ConfigError, match="important_inputs: keep must be a whole number above 0"):
        important_inputs(flat, targets, ROWS, keep=0, generator=seeded())
    flat[77, 1] = torch.nan
    with pytest.raises(ZooError, match=r"important_inputs: inputs must be finite.* is row 77"):
        important_inputs(flat, targets, ROWS, generator=seeded())


# ---------------------------------------------------------------------------- targets


def test_four_targets_fall_into_two_bins():
    targets = torch.tensor([[5.0], [-1.0], [3.0], [0.0]])
    assert binned_targets(targets, torch.arange(4), bins=2).tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("bins", [1, 3, 10])
def test_bins_are_even_and_in_order(bins):
    targets = normal(300, 1)
    labels = binned_targets(targets, ROWS, bins=bins)
    counts = labels[ROWS].bincount(minlength=bins)
    assert len(counts) == bins
    assert counts.max() - counts.min() <= 1
    ordered = labels[ROWS][targets[ROWS, 0].argsort()]
    assert (ordered.diff() >= 0).all()


def test_other_rows_have_no_say_in_the_bins_but_get_one():
    targets = normal(300, 2)
    labels = binned_targets(targets, ROWS)
    assert labels[ROWS].equal(binned_targets(spoil(targets), ROWS)[ROWS])
    assert 0 <= labels.min() <= labels.max() < 10


def test_binned_targets_can_be_cut_as_classes():
    labels = binned_targets(normal(300, 2), ROWS, bins=4)
    validate(
        dirichlet(labels, ROWS, 3, alpha=1.0, generator=seeded()),
        ROWS,
        every_class=True,
        targets=labels,
    )


def test_principal_values_follow_the_longest_direction_upwards():
    # Centred targets (-1, -2), (0, 0), (1, 2): along (1, 2) / sqrt(5).
    targets = torch.tensor([[9.0, 0.0], [10.0, 2.0], [11.0, 4.0]])
    values = principal_values(targets, torch.arange(3))
    assert values.tolist() == pytest.approx([-(5**0.5), 0.0, 5**0.5])


def test_binning_classes_is_refused():
    with pytest.raises(ZooError, match=r"targets must be float32 \[300, outputs\].*torch.int64"):
        binned_targets(torch.arange(300) % 3, ROWS)
    with pytest.raises(ConfigError, match="bins must be a whole number above 0"):
        binned_targets(normal(300, 1), ROWS, bins=0)


# ---------------------------------------------------------------------------- outputs of a network


def test_activations_of_a_map_are_averaged_over_places_and_others_left_alone():
    maps = normal(4, 3, 2, 2)
    assert activations(maps).allclose(maps.mean((2, 3)))
    assert activations(maps[:, :, 0, 0]).equal(maps[:, :, 0, 0])


def test_even_odds_are_a_loss_of_log_two_and_an_error_of_one_half():
    logits, targets = torch.zeros(2, 2), torch.tensor([0, 1])
    two = torch.tensor(2.0).log()
    assert difficulty_scores(logits, targets).allclose(two.expand(2))
    expected = torch.tensor([[two, -0.5, 0.5], [two, 0.5, -0.5]])
    assert errors(logits, targets).allclose(expected)


def test_a_regression_has_squared_errors_and_residuals():
    predictions, targets = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])
    assert difficulty_scores(predictions, targets).tolist() == [2.5]
    assert errors(predictions, targets).tolist() == [[2.5, 1.0, -2.0]]


@pytest.mark.parametrize("targets", [torch.arange(6) % 3, normal(6, 3, seed=4)])
def test_errors_point_where_the_loss_grows(targets):
    outputs = normal(6, 3).requires_grad_()
    loss = difficulty_scores(outputs, targets).sum()
    (slope,) = torch.autograd.grad(loss, outputs)
    # Of a mean over three outputs, the slope is 2/3 of the residual.
    factor = 1.0 if targets.ndim == 1 else 3 / 2
    assert errors(outputs, targets)[:, 1:].allclose(factor * slope, atol=1e-6)


@pytest.mark.parametrize("score", [difficulty_scores, errors])
@pytest.mark.parametrize(
    ("logits", "targets"),
    [
        (torch.zeros(5, 3), torch.zeros(6).long()),
        (torch.zeros(6, 3), torch.full((6,), 3)),
        (torch.zeros(6), torch.zeros(6).long()),
        (torch.zeros(6, 3).double(), torch.zeros(6).long()),
        (torch.zeros(6, 3), torch.zeros(6, 2)),
    ],
)
def test_outputs_that_do_not_fit_the_targets_are_refused(score, logits, targets):
    with pytest.raises(ZooError, match=f"{score.__name__}: for targets .* outputs must be float32"):
        score(logits, targets)
