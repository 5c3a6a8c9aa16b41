import pytest
import torch

from metamerge import merge
from metamerge.alignment import matching_cost, sinkhorn, weight_matching
from metamerge.alignment.merged_loss import merged, merged_loss
from metamerge.alignment.sinkhorn import _logits
from metamerge.alignment.soft_permutation import doubly_stochastic
from metamerge.errors import ConfigError
from metamerge.structure import Factor, Layout, PermutationSpec, run

FAMILIES = 6


@pytest.fixture(scope="module")
def zoo(digits_zoo):
    """Layout, trained families ``[6, 4, ...]``, and images with labels that none has seen."""
    families = {key: tensor[:FAMILIES] for key, tensor in digits_zoo.unseen.items()}
    return digits_zoo.layout, families, digits_zoo.objective


def midpoint(families, layout, data, perm):
    """Loss of the averages of the members, ``[f]``, on data with labels."""
    aligned = layout.spec.permute(families, perm)
    shares = torch.full((FAMILIES, 4), 0.25)
    return merged_loss(families, layout, data, None)(merged(aligned, shares))


def test_two_units_by_hand():
    # Units 1 and 5 in the other order: swapped they cost 0.5 / 55, as they are 12.5 / 55.
    spec = PermutationSpec({"g": 2}, {"w": ((Factor("g", 2),),)})
    members = {"w": torch.tensor([[[1.0, 5.0], [5.0, 2.0]]])}
    report = {}
    perm = sinkhorn(members, spec, start="identity", report=report)
    aligned = spec.permute(members, perm)["w"][0].tolist()
    assert aligned in ([[1.0, 5.0], [2.0, 5.0]], [[5.0, 1.0], [5.0, 2.0]])
    assert report["start"] == pytest.approx(12.5 / 55, rel=1e-6)
    assert report["best"] == pytest.approx(0.5 / 55, rel=1e-6)


@pytest.mark.parametrize("confidence", [0.2, 0.9])
def test_a_soft_unit_starts_with_the_share_that_is_asked_for(confidence):
    known = {"g": torch.arange(7).expand(1, 2, 7)}
    matrix = doubly_stochastic(_logits(known, torch.zeros(()), confidence)["g"]).detach()
    assert torch.allclose(matrix.diagonal(dim1=-2, dim2=-1), torch.tensor(confidence))
    other = (1 - confidence) / 6
    assert torch.allclose(matrix[0, 0, 0, 1:], torch.tensor(other))


def test_descent_brings_members_closer_that_are_not_aligned(zoo):
    layout, families, _ = zoo
    report = {}
    perm = sinkhorn(families, layout.spec, start="identity", report=report)
    before, after = (
        matching_cost(families, layout.spec, p) for p in (layout.spec.identity(), perm)
    )
    assert (after < 0.75 * before).all()
    assert report["start"] == pytest.approx(float(before.mean()))
    assert report["best"] == pytest.approx(float(after.mean()))
    assert report["soft"][-1] < report["soft"][0]
    assert len(report["objective"]) == len(report["soft"]) + 1 == 61


def test_no_family_is_further_apart_than_weight_matching_leaves_it(zoo):
    layout, families, _ = zoo
    known = matching_cost(families, layout.spec, weight_matching(families, layout.spec))
    found = matching_cost(families, layout.spec, sinkhorn(families, layout.spec, steps=10))
    assert (found <= known).all()


def test_the_loss_of_the_average_falls_below_that_of_weight_matching(zoo):
    layout, families, data = zoo
    report, known = {}, weight_matching(families, layout.spec)
    given = {"layout": layout, "loss": "midpoint", "report": report}
    perm = sinkhorn(families, layout.spec, batches=data, **given)
    before, after = (midpoint(families, layout, data, p) for p in (known, perm))
    assert (after <= before).all()
    assert float(after.mean()) < 0.97 * float(before.mean())
    assert report["best"] == pytest.approx(float(after.mean()), rel=1e-5)
    assert report["objective"][0] == pytest.approx(float(before.mean()), rel=1e-5)


def test_it_generalises_to_images_that_nobody_has_seen(zoo, digits_zoo):
    layout, families, data = zoo
    perm = sinkhorn(families, layout.spec, layout=layout, batches=data, loss="midpoint")
    known = weight_matching(families, layout.spec)
    unseen = digits_zoo.validation
    before, after = (midpoint(families, layout, unseen, p).mean() for p in (known, perm))
    assert after < before


@pytest.mark.parametrize("loss", ["midpoint", "random_point"])
def test_labels_are_not_needed(zoo, loss):
    layout, families, (inputs, _) = zoo
    report = {}
    given = {"layout": layout, "batches": inputs, "loss": loss, "report": report}
    sinkhorn(families, layout.spec, steps=20, **given)
    assert report["best"] < report["start"]


def test_random_points_are_those_of_the_generator(zoo):
    layout, families, data = zoo
    reports = [{}, {}, {}]
    for report, seed in zip(reports, (1, 1, 2), strict=True):
        generator = torch.Generator().manual_seed(seed)
        given = {"layout": layout, "batches": data, "generator": generator, "report": report}
        sinkhorn(families, layout.spec, loss="random_point", steps=3, **given)
    assert reports[0] == reports[1]
    assert reports[0]["soft"] != reports[2]["soft"]


def test_the_order_of_members_does_not_change_the_midpoint(zoo):
    layout, families, data = zoo
    order = torch.tensor([2, 0, 3, 1])
    moved = {key: tensor[:, order] for key, tensor in families.items()}
    given = {"layout": layout, "batches": data, "loss": "midpoint", "steps": 5}
    outputs = []
    for members in (families, moved):
        aligned = layout.spec.permute(members, sinkhorn(members, layout.spec, **given))
        fused = {key: tensor.mean(1) for key, tensor in aligned.items()}
        outputs.append(run(layout.program, fused, [data[0]], stacked=True))
    assert torch.allclose(*outputs, atol=1e-3)


def test_families_do_not_see_each_other(zoo):
    layout, families, data = zoo
    given = {"layout": layout, "batches": data, "loss": "midpoint", "steps": 5}
    together = sinkhorn(families, layout.spec, **given)
    for f in range(2):
        own = {key: tensor[f : f + 1] for key, tensor in families.items()}
        alone = sinkhorn(own, layout.spec, **given)
        assert all(torch.equal(together[g][f], alone[g][0]) for g in alone)


def test_merge_passes_it_batches_and_options(digits_zoo):
    members = [{k: t[0, m] for k, t in digits_zoo.unseen.items()} for m in range(4)]
    inputs, labels = digits_zoo.objective
    given = {"model": digits_zoo.network(), "align": "sinkhorn", "batches": (inputs, labels)}
    options = {"loss": "midpoint", "steps": 40}
    result = merge(members, method="average", align_options=options, **given)
    (told,) = result.report["alignment"]
    assert told["best"] < told["start"] == told["objective"][0]
    assert len(told["soft"]) == 40


def test_a_network_without_groups_is_left_alone():
    assert sinkhorn({"w": torch.zeros(1, 2, 6)}, PermutationSpec({}, {})) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "barrier"}, "sinkhorn: loss must be one of .*, got 'barrier'"),
        ({"start": None}, "sinkhorn: start must be one of .*, got None"),
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"steps": True}, "steps must be a whole number of at least 1, got True"),
        ({"rate": float("nan")}, r"rate must be a number in \(0, inf\), got nan"),
        ({"rate": "fast"}, r"rate must be a number in \(0, inf\), got 'fast'"),
        ({"confidence": 1.0}, r"confidence must be a number in \(0, 1\), got 1.0"),
        ({"loss": "midpoint"}, "loss='midpoint' runs the merged network, and there is none"),
    ],
)
def test_options_out_of_range_are_refused(zoo, options, message):
    layout, families, _ = zoo
    with pytest.raises(ConfigError, match=message):
        sinkhorn(families, layout.spec, **options)


def test_a_loss_on_inputs_needs_some_and_a_program(zoo):
    layout, families, data = zoo
    with pytest.raises(ConfigError, match=r"loss='random_point' needs inputs, none were given"):
        sinkhorn(families, layout.spec, layout=layout, loss="random_point")
    untraced = Layout(None, layout.spec)
    with pytest.raises(ConfigError, match="Pass a module that can be traced"):
        sinkhorn(families, layout.spec, layout=untraced, batches=data, loss="midpoint")
