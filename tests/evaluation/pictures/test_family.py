"""Pictures of a family of real members: what is gathered, and that all of it can be drawn."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from evaluation.bench import Bench
from evaluation.judged import Judged
from evaluation.methods.entries import Entry
from evaluation.metrics import accuracy, barriers, reliability
from evaluation.pictures import (
    barriers_of,
    family_figures,
    lines_of,
    mixing_of,
    planes_of,
    training_figure,
    variances_of,
)
from evaluation.pictures.gathering import states
from metamerge.mergers import fuse
from zoo.training import predict


@pytest.fixture(scope="module")
def bench(digits_zoo):
    judged = Judged(
        name="digits",
        layout=digits_zoo.layout,
        families={key: tensor[:3] for key, tensor in digits_zoo.unseen.items()},
        classes=None,
        split=digits_zoo.split,
        network=digits_zoo.network,
        segments=None,
        recipe={},
        training=None,
        identity={},
    )
    return Bench(judged, 0)


@pytest.fixture(scope="module")
def fused(bench, trained_merger):
    return {
        "average, aligned": bench.merge(Entry("average")),
        "gnn": bench.merge(Entry("gnn"), merger=trained_merger),
    }


@pytest.fixture(scope="module")
def figures(bench, fused, trained_merger):
    return family_figures(bench, fused, merger=trained_merger, title="digits")


def test_lines_begin_and_end_at_the_members(bench):
    inputs, targets = bench.judged.split.images("test")
    own = {key: tensor[1] for key, tensor in bench.families.items()}
    reached = accuracy(predict(bench.layout.program, own, inputs), targets)
    for lines in lines_of(bench, 1, points=3).values():
        assert lines.score.shape == (6, 3)
        assert torch.allclose(lines.score[0, [0, -1]], reached[[0, 1]])  # of members 0 and 1
    assert set(lines_of(bench, 1, points=3)) == {"as trained", "aligned"}


def test_barriers_are_those_of_the_metric(bench):
    own = {key: tensor[2:3] for key, tensor in bench.families.items()}
    images = bench.judged.split.images("test")
    expected = barriers(bench.layout.program, own, *images)[0]
    assert torch.allclose(barriers_of(bench, 2)["as trained"], expected, atol=1e-5)


def test_the_plane_holds_the_average_and_its_loss_where_the_grid_has_it(bench, fused):
    planes = planes_of(bench, 0, fused, grid=9)
    before, after = planes.values()
    assert set(before.networks) == {"members", "average"}
    assert set(after.networks) == {"members", "average", "gnn"}  # the other is the average
    middle = before.networks["members"].mean(0)
    assert torch.allclose(before.networks["average"][0], middle, atol=1e-4)
    x, y = before.networks["average"][0]
    at = int((before.y - y).abs().argmin()), int((before.x - x).abs().argmin())
    near = before.loss[at[0] - 1 : at[0] + 2, at[1] - 1 : at[1] + 2]
    assert near.min() <= before.losses["average"][0] <= near.max()


def test_shares_of_members_sum_to_1(bench, trained_merger):
    found = mixing_of(bench, 0, trained_merger)
    assert [tuple(own.shape) for own in found.values()] == [(4, 32), (4, 10), (4, 10)]
    for own in found.values():
        assert torch.allclose(own.sum(0), torch.ones(own.shape[1]), atol=1e-5)


def test_a_member_that_is_kept_has_all_shares(bench, trained_merger):
    """Of members that are one, sure of what it says, with other noise and units of other sizes."""
    members, last = {}, list(bench.families)[-2:]
    generator = torch.Generator().manual_seed(0)
    for key, tensor in bench.families.items():
        one = tensor[:1, :1] * (20 if key in last else 1)
        noise = torch.randn(1, 4, *tensor.shape[2:], generator=generator)
        members[key] = one + 0.05 * one.std() * noise
    size = torch.randn(1, 4, 32, generator=generator).exp()  # which the next layer takes back
    first, bias, second, _ = members
    members[first] = members[first] * size[..., None]
    members[bias] = members[bias] * size
    members[second] = members[second] / size[..., None, :]
    merger, report = deepcopy(trained_merger), {}
    merger.config = replace(merger.config, familiar=1.0)
    alike = Bench(replace(bench.judged, families=members), 0)
    found = mixing_of(alike, 0, merger)
    fuse(merger, states(alike, 0)["aligned"], alike.layout, report=report)
    for own in found.values():
        assert (own[report["kept"]] == 1).all()
        assert own.sum() == own.shape[1]


def test_the_average_has_lost_variance(bench, fused):
    ratios = variances_of(bench, fused)["average, aligned"]
    assert all(own.shape == (3,) and (own < 1).all() for own in ratios.values())


def test_all_pictures_of_a_family_are_drawn(figures, tmp_path):
    expected = {"interpolation", "barriers", "weight_plane", "variance", "reliability", "mixing"}
    assert set(figures) == expected
    for name, figure in figures.items():
        figure.savefig(tmp_path / f"{name}.png", dpi=40)
        assert (tmp_path / f"{name}.png").stat().st_size > 3000


def test_the_legend_tells_the_calibration_error(bench, fused, figures):
    said = predict(bench.layout.program, fused["gnn"], bench.judged.split.images("test")[0])
    targets = bench.judged.split.images("test")[1].repeat(3)
    bins = reliability(said.flatten(0, 1), targets)
    error = float((bins.share * (bins.confidence - bins.accuracy).abs()).nansum())
    told = [text.get_text() for text in figures["reliability"].legends[0].get_texts()]
    assert f"gnn (ECE {100 * error:.1f})" in told


def test_a_training_is_drawn_from_its_history():
    history = [
        {"step": step, "loss": 1 / step, "validation_accuracy": 0.5 + step / 100,
         "validation_accuracy_k4": 0.5, "validation_worst_decile": 0.4,
         "share_above_threshold": step / 50, "wilson_lower_bound": step / 80}
        for step in (10, 20, 30)
    ]  # fmt: skip
    loss, scores, share = training_figure(history, title="", target=0.9).axes
    assert list(loss.lines[0].get_ydata()) == pytest.approx([1 / 10, 1 / 20, 1 / 30])
    told = {line.get_label(): list(line.get_ydata()) for line in (*scores.lines, *share.lines)}
    assert told["mean of families"] == pytest.approx([60, 70, 80])
    assert told["share"] == pytest.approx([20, 40, 60])
    assert told["target"] == pytest.approx([90, 90])
