"""Adapting to a few labelled inputs: what is chosen, by what, and what it leaves alone."""

import pytest
import torch
import torch.nn.functional as F

from metamerge.alignment import weight_matching
from metamerge.calibration import predict
from metamerge.errors import ConfigError
from metamerge.mergers import adapt, adapting, fuse
from metamerge.mergers.adapting import FOLDS, RATES, STEPS, Setting
from metamerge.mergers.ordering import in_canonical_order


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def furthest(found, expected):
    assert found.keys() == expected.keys()
    return max(float((found[key] - expected[key]).abs().max()) for key in expected)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(adapting, "STEPS", (20, 20))


@pytest.fixture(scope="module")
def family(digits_zoo):
    """One unseen family, aligned, and 60 labelled images."""
    layout = digits_zoo.layout
    members = {key: tensor[:1] for key, tensor in digits_zoo.unseen.items()}
    members = layout.spec.permute(members, weight_matching(members, layout.spec))
    inputs, labels = digits_zoo.objective
    return members, layout, inputs[:60], labels[:60]


# ---------------------------------------------------------------------------- folds


@pytest.mark.parametrize("counts", [[8, 8, 8], [20, 4, 12], [5, 3, 1], [7, 0, 9]])
def test_every_fold_has_its_share_of_every_class(counts):
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=seeded())]
    folds = adapting._folds(labels, seeded(1))
    sizes = folds.bincount(minlength=FOLDS)
    assert sizes.max() - sizes.min() <= 1
    for number in range(3):
        shares = folds[labels == number].bincount(minlength=FOLDS)
        assert shares.max() - shares.min() <= 1


def test_folds_are_drawn_by_the_generator():
    labels = torch.arange(40) % 4
    first, again, other = (adapting._folds(labels, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_fewer_inputs_than_folds_are_a_fold_each():
    assert adapting._folds(torch.tensor([1, 1, 0]), seeded()).sort().values.tolist() == [0, 1, 2]


def record(monkeypatch):
    """What each call of ``_tune`` may see, its rates, what it gave back, and where it began."""
    tune, calls = adapting._tune, []

    def recorded(weights, layout, labelled, anchor, seen, rates, generator):
        found = tune(weights, layout, labelled, anchor, seen, rates, generator)
        calls.append((seen, rates, found, weights))
        return found

    monkeypatch.setattr(adapting, "_tune", recorded)
    return calls


def test_no_input_is_learned_from_and_judged_on(family, trained_merger, monkeypatch):
    members, layout, inputs, labels = family
    calls, report = record(monkeypatch), {}
    adapt(trained_merger, members, layout, inputs, labels, generator=seeded(3), report=report)
    seen, _, trained, first = calls[0]
    # Every fold of every setting leaves out a quarter, and each input is left out once.
    assert seen.shape == (2 * len(RATES) * FOLDS, 60)
    assert ((~seen).sum(1) == 60 // FOLDS).all()
    assert ((~seen).unflatten(0, (-1, FOLDS)).sum(1) == 1).all()
    # Losses and accuracies that are told are those on what was left out, of starts, ends, middles.
    half = {key: (first[key] + tensor) / 2 for key, tensor in trained.items()}
    settings = [(s, lr) for s in ("weights only", "calibrated") for lr in RATES]
    for way, networks in ((0.0, first), (0.5, half), (1.0, trained)):
        logits = predict(networks, layout, inputs)
        right = (logits.argmax(-1) == labels).float()
        losses = -logits.log_softmax(-1)[:, torch.arange(60), labels]
        names = [str(Setting(start, lr if way else 0.0, way)) for start, lr in settings]
        for kind, values in (("accuracies", right), ("losses", losses)):
            parts = values.unflatten(0, (-1, FOLDS)), seen.unflatten(0, (-1, FOLDS))
            told = [float(own[~some].mean()) for own, some in zip(*parts, strict=True)]
            assert [report[kind][name] for name in names] == pytest.approx(told, abs=1e-4)
    assert report["chosen_on"] == "4-fold cross-validation on the 60 labelled inputs"
    chosen = Setting(report["start"], report["lr"], report["way"])
    assert report["losses"][str(chosen)] == min(report["losses"].values())
    ((everything, rates, *_),) = calls[1:]  # of these labels something is to be learned
    assert everything.all()
    assert rates.tolist() == pytest.approx([report["lr"]])


def test_what_a_fold_leaves_out_has_no_say_in_its_weights(family, trained_merger):
    members, layout, inputs, labels = family
    start = {key: tensor[:, 0].expand(2, *tensor.shape[2:]) for key, tensor in members.items()}
    seen = torch.ones(2, 60, dtype=torch.bool)
    seen[0, 20:30] = False
    changed = labels.clone()
    changed[20:30] = (labels[20:30] + 1) % 10
    probes = trained_merger.probes.for_members(members, layout)
    anchor = (probes, torch.full((len(probes), 10), 0.1))
    rates = torch.tensor([1e-2, 1e-2])
    one, other = (
        adapting._tune(start, layout, (inputs, told), anchor, seen, rates, seeded())
        for told in (labels, changed)
    )
    for key in one:
        assert torch.equal(one[key][0], other[key][0]), key
        assert not torch.equal(one[key][1], other[key][1]), key


def test_many_inputs_are_split_once(family, trained_merger, monkeypatch):
    monkeypatch.setattr(adapting, "MANY", 60)
    members, layout, inputs, labels = family
    calls, report = record(monkeypatch), {}
    adapt(trained_merger, members, layout, inputs, labels, report=report)
    assert calls[0][0].shape == (2 * len(RATES), 60)
    assert (~calls[0][0]).sum(1).tolist() == [15] * 2 * len(RATES)
    assert report["chosen_on"] == "a quarter of the 60 labelled inputs"


@pytest.mark.parametrize(("inputs", "steps"), [(60, 100), (600, 150), (6000, 1000)])
def test_all_inputs_are_seen_equally_often_within_limits(
    family, trained_merger, monkeypatch, inputs, steps
):
    taken = []

    def stay(weights, layout, loss, *, steps, lr):
        taken.append(steps)
        return weights

    monkeypatch.setattr(adapting, "descend", stay)
    monkeypatch.setattr(adapting, "STEPS", STEPS)
    members, layout, *labelled = family
    given = [tensor.repeat(100, *[1] * (tensor.ndim - 1))[:inputs] for tensor in labelled]
    adapt(trained_merger, members, layout, *given)
    assert set(taken) == {steps}


# ---------------------------------------------------------------------------- what is chosen


def test_labels_lift_the_fused_network(family, trained_merger, digits_zoo, monkeypatch):
    monkeypatch.setattr(adapting, "STEPS", (100, 100))
    members, layout, inputs, labels = family
    images, targets = digits_zoo.validation
    report = {}
    adapted = adapt(trained_merger, members, layout, inputs, labels, report=report)
    fused = fuse(trained_merger, members, layout)

    def score(weights):
        return float((predict(weights, layout, images)[0].argmax(-1) == targets).float().mean())

    assert report["lr"] > 0
    assert score(adapted) > score(fused)


def test_the_start_is_kept_where_every_rate_makes_it_worse(family, trained_merger, monkeypatch):
    members, layout, inputs, _ = family
    # What the fused network says itself: it is right everywhere, and harmful rates cannot be.
    labels = predict(fuse(trained_merger, members, layout), layout, inputs)[0].argmax(-1)
    monkeypatch.setattr(adapting, "RATES", (3.0, 10.0))
    report = {}
    found = adapt(trained_merger, members, layout, inputs, labels, report=report)
    assert (report["start"], report["lr"]) == ("weights only", 0.0)
    assert report["accuracies"]["weights only, lr 0"] == 1.0
    assert max(a for s, a in report["accuracies"].items() if not s.endswith("lr 0")) < 1.0
    assert furthest(found, fuse(trained_merger, members, layout)) < 1e-6


def test_what_is_told_are_accuracies_of_every_start_and_rate(family, trained_merger):
    members, layout, inputs, labels = family
    report = {}
    adapt(trained_merger, members, layout, inputs, labels, report=report)
    told = [
        *("weights only, lr 0", "calibrated, lr 0"),
        *("weights only, lr 0.001, 50% of the way", "weights only, lr 0.003, 50% of the way"),
        *("calibrated, lr 0.001, 50% of the way", "calibrated, lr 0.003, 50% of the way"),
        *("weights only, lr 0.001", "weights only, lr 0.003"),
        *("calibrated, lr 0.001", "calibrated, lr 0.003"),
    ]
    assert list(report["accuracies"]) == list(report["losses"]) == told
    fused = fuse(trained_merger, members, layout)
    right = predict(fused, layout, inputs)[0].argmax(-1) == labels
    # A rate of zero is the start itself, judged once on every input.
    found = report["accuracies"]["weights only, lr 0"]
    assert found == pytest.approx(float(right.float().mean()), abs=1e-4)


@pytest.mark.parametrize(("way", "moved"), [(0.5, 0.5), (1.0, 1.0)])
def test_half_way_is_the_middle_of_start_and_end(family, trained_merger, monkeypatch, way, moved):
    """Labels that the start does not know, so that it is surely left."""
    members, layout, inputs, labels = family
    monkeypatch.setattr(adapting, "WAYS", (way,))
    calls, report = record(monkeypatch), {}
    found = adapt(trained_merger, members, layout, inputs, (labels + 1) % 10, report=report)
    assert report["way"] == way
    canonical, perm = in_canonical_order(members, layout)
    starts, *_ = adapting._starts(trained_merger, canonical, layout, inputs)
    start, end = starts[report["start"]], calls[-1][2]
    expected = {key: (1 - moved) * t + moved * end[key] for key, t in start.items()}
    assert furthest(found, layout.spec.unpermute(expected, perm)) < 1e-6


def test_probes_hold_the_network_near_the_consensus(family, trained_merger):
    members, layout, inputs, labels = family
    probes = trained_merger.probes.for_members(members, layout)
    wanted = F.one_hot(torch.arange(len(probes)) % 10, 10).float()
    start = {key: tensor.mean(1) for key, tensor in members.items()}
    rate, seen = torch.tensor([1e-2]), torch.ones(1, 60, dtype=torch.bool)
    found = adapting._tune(start, layout, (inputs, labels), (probes, wanted), seen, rate, seeded())

    def losses(weights):
        own = F.cross_entropy(predict(weights, layout, inputs)[0], labels)
        return own, F.cross_entropy(predict(weights, layout, probes)[0], wanted)

    for before, after in zip(losses(start), losses(found), strict=True):
        assert after < before


# ---------------------------------------------------------------------------- symmetries


def test_the_same_generator_adapts_to_the_same_bits(family, trained_merger):
    members, layout, inputs, labels = family
    before = {key: tensor.clone() for key, tensor in members.items()}
    first, again, other = (
        adapt(trained_merger, members, layout, inputs, labels, generator=seeded(seed))
        for seed in (0, 0, 1)
    )
    assert furthest(first, again) == 0
    assert furthest(first, other) > 0
    assert furthest(members, before) == 0


def test_the_order_of_members_does_not_matter(family, trained_merger):
    members, layout, inputs, labels = family
    turned = {key: tensor[:, [2, 0, 3, 1]] for key, tensor in members.items()}
    found, expected = (
        adapt(trained_merger, some, layout, inputs, labels) for some in (turned, members)
    )
    assert furthest(found, expected) == 0


def test_inputs_and_labels_of_other_networks_are_refused(family, trained_merger):
    members, layout, inputs, labels = family
    with pytest.raises(ConfigError, match="the network takes"):
        adapt(trained_merger, members, layout, inputs[..., 1:], labels)
    with pytest.raises(ConfigError, match="classes 0 to 9"):
        adapt(trained_merger, members, layout, inputs, labels + 1)
