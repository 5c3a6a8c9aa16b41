"""Shards: what is told of trained families, beside slow evaluations with modules."""

from copy import deepcopy
from dataclasses import replace
from math import ceil

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, r2_score

from metamerge.errors import ConfigError, ZooError
from metamerge.weights import stack
from zoo import architectures
from zoo.families import draw_families
from zoo.parts import split_task
from zoo.recipe import ZooOptions, factory_for
from zoo.reference import features_for
from zoo.shards import train_shard
from zoo.splits import SPLITS
from zoo.tasks import Task
from zoo.training import init_networks
from zoo.variants import Variants

OPTIONS = ZooOptions(widths=(8,), split="disjoint", segment_size=40, epochs=3.0)
CLASSES_ONLY = {"dirichlet", "classes"}


@pytest.fixture(scope="module")
def programs():
    """Programs that were traced before, by what they depend on."""
    return {}


@pytest.fixture
def train(programs):
    """Train a shard; options that are not named are small."""

    def call(parts, families=range(2), *, members=2, progress=None, **changes):
        options = replace(OPTIONS, **changes)
        network = factory_for(options, parts.task)
        shape = tuple(parts.task.inputs.shape[1:])
        key = (options.architecture, options.widths, shape, *network.args[1:])
        if key not in programs:
            programs[key] = architectures.program_of(network(), shape)
        return train_shard(
            options, parts, programs[key], ("train", members), families,
            features_for(options, parts), "cpu", progress,
        )  # fmt: skip

    return call


def drawn(parts, families=range(2), *, members=2, **changes):
    options = replace(OPTIONS, **changes)
    return draw_families(options, parts, ("train", members), families, {})


def every_member(found):
    """Family, member and weights of every network of a shard."""
    for family, member in torch.cartesian_prod(*map(torch.arange, found["records"]["rows"].shape)):
        place = (int(family), int(member))
        yield place, {key: tensor[place] for key, tensor in found["weights"].items()}


def outputs_of(split, weights, inputs, **changes):
    model = factory_for(replace(OPTIONS, **changes), split.task)().eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        return model(inputs)


def furthest(found, expected):
    assert found.keys() == expected.keys()
    return max(float((found[key] - expected[key]).abs().max()) for key in expected)


# ---------------------------------------------------------------------------- scores


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"relabel": True},
        {"classes_per_family": 4},
        {"permute_pixels": True, "relabel": True},
        {"flip_families": True},
        {"architecture": "cnn", "widths": (3, 4), "permute_pixels": True},
    ],
    ids=str,
)
def test_the_accuracy_of_every_member_is_that_of_its_module(digits, train, changes):
    found = train(digits, range(3), **changes)
    variants = Variants.from_records(found["records"])
    assert bool(variants) == bool(changes.keys() & {"relabel", "permute_pixels", "flip_families",
                                                    "classes_per_family"})  # fmt: skip
    told = found["records"]["validation_accuracy"]
    assert told.shape == (3, 2)
    images, labels = digits.images("validation")
    for (family, member), weights in every_member(found):
        right = seen = 0
        for image, label in zip(images, labels.tolist(), strict=True):
            known = label if variants.classes is None else int(variants.classes[family, label])
            if known < 0:
                continue
            if variants.places is not None:
                image = image.flatten(1)[:, variants.places[family]].reshape(image.shape)
            seen += 1
            right += int(outputs_of(digits, weights, image[None], **changes).argmax()) == known
        assert float(told[family, member]) == pytest.approx(right / seen, abs=1e-6)


def test_r2_of_every_member_is_that_of_scikit_learn(diabetes, train):
    found = train(diabetes, split="everything", epochs=8)
    inputs, targets = diabetes.images("validation")
    told = found["records"]["validation_r2"]
    for place, weights in every_member(found):
        expected = r2_score(targets, outputs_of(diabetes, weights, inputs))
        assert float(told[place]) == pytest.approx(expected, abs=1e-4)
    assert told.max() > 0.2  # they have learned something
    assert "rows_per_class" not in found["records"]


def test_r2_of_several_outputs_weighs_them_by_their_variance(train):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 6, generator=generator)
    targets = torch.stack([inputs[:, 0], 5 * inputs[:, 1].square()], 1)
    split = split_task(Task("two", inputs, targets, None), objective=100)
    found = train(split, split="everything", epochs=6, lr=0.03)
    images, values = split.images("validation")
    for place, weights in every_member(found):
        outputs = outputs_of(split, weights, images)
        expected = r2_score(values, outputs, multioutput="variance_weighted")
        assert float(found["records"]["validation_r2"][place]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("change", ["relabel", "permute_pixels", "flip_families"])
def test_a_variant_is_learned_about_as_well_as_the_task(digits, train, change):
    options = {"segment_size": 300, "epochs": 15, "widths": (16,), "members": 3}
    plain = train(digits, range(8), **options)["records"]["validation_accuracy"]
    found = train(digits, range(8), **options, **{change: True})
    varied = found["records"]["validation_accuracy"]
    assert plain.mean() > 0.85
    # Members differ by 0.03 (measured), two means of 24 by 0.009; five of those.
    assert abs(float(varied.mean() - plain.mean())) < 0.045
    if change == "flip_families":  # half of them see the task as it is
        return
    images, labels = digits.images("validation")
    wrong = [
        accuracy_score(labels, outputs_of(digits, weights, images, widths=(16,)).argmax(1))
        for _, weights in every_member(found)
    ]
    assert max(wrong) < 0.5  # nobody has learned the task as others know it


# ---------------------------------------------------------------------------- every split


@pytest.mark.parametrize("task", ["digits", "diabetes"])
@pytest.mark.parametrize("name", SPLITS)
def test_every_split_that_fits_trains_a_shard(request, train, name, task):
    split = request.getfixturevalue(task)
    if (name == "bins") if task == "digits" else (name in CLASSES_ONLY):
        with pytest.raises(ConfigError, match=name):
            train(split, split=name)
        return
    found = train(split, split=name, epochs=0.5)
    records = found["records"]
    rows = records["segment"]
    for place, _ in every_member(found):
        own = rows[place][rows[place] >= 0].long()
        assert len(own) == int(records["rows"][place])
        assert torch.isin(own, split.segments).all()
        assert int(records["steps"][place]) == ceil(0.5 * len(own) / 32)
        if task == "digits":
            counts = split.task.targets[own].bincount(minlength=10)
            assert torch.equal(records["rows_per_class"][place], counts)
    assert all(t.shape[:2] == (2, 2) for tensors in found.values() for t in tensors.values())
    assert found["snapshots"] == {}


# ---------------------------------------------------------------------------- what is recorded


def test_records_are_what_was_drawn(digits, train):
    ranges = {"epochs": (1.0, 4.0), "lr": (1e-3, 1e-2), "weight_decay": (0.0, 0.1)}
    ranges |= {"relabel": True, "permute_pixels": True, "augment": ("noise",), "augment_share": 0.5}
    found, expected = train(digits, range(4), **ranges), drawn(digits, range(4), **ranges)
    records = found["records"]
    assert records["init_seed"].flatten().tolist() == expected.init_seeds
    assert records["order_seed"].flatten().tolist() == expected.order_seeds
    assert torch.equal(records["augmented"].flatten(), expected.augmented)
    assert records["augmented"].any()
    assert not records["augmented"].all()
    for name, values in expected.hyper.items():
        assert torch.equal(records[name].flatten(), values.float())
    assert torch.equal(records["segment"].flatten(0, 1), torch.stack(expected.segments).int())
    steps = (expected.hyper["epochs"] * 40 / 32).ceil().long()
    assert torch.equal(records["steps"].flatten(), steps)
    assert records["losses"].shape == (4, 2, ceil(float(expected.hyper["epochs"].max())))
    assert (records["losses"].isfinite().sum(-1).flatten() == (32 * (steps - 1) // 40 + 1)).all()
    variants = Variants.from_records(records)
    assert torch.equal(variants.classes, expected.variants.classes)
    assert torch.equal(variants.places, expected.variants.places)


def test_segments_of_unequal_length_are_padded(digits, train):
    found, expected = train(digits, split="quantity"), drawn(digits, split="quantity")
    rows = found["records"]["segment"].flatten(0, 1)
    assert rows.shape[1] == max(map(len, expected.segments))
    for padded, own in zip(rows, expected.segments, strict=True):
        assert torch.equal(padded[: len(own)].long(), own)
        assert (padded[len(own) :] == -1).all()


def test_rows_held_back_are_recorded_and_judged(digits, train):
    options = {"patience": 2, "hold_back": 0.25, "epochs": 40, "lr": 0.03}
    options |= {"segment_size": 60}
    found, expected = train(digits, **options), drawn(digits, **options)
    records = found["records"]
    curves = records["held_back_losses"]
    for place, weights in every_member(found):
        i = 2 * place[0] + place[1]
        kept = expected.held_back[i]
        assert len(kept) == 15
        assert set(records["segment"][place].tolist()) == {
            *kept.tolist(), *expected.segments[i].tolist()
        }  # fmt: skip
        assert records["rows"][place] == 60
        inputs, targets = digits.task.inputs[kept], digits.task.targets[kept]
        loss = float(F.cross_entropy(outputs_of(digits, weights, inputs), targets))
        curve = curves[place][~curves[place].isnan()]
        assert float(curve.min()) == pytest.approx(loss, rel=1e-4)  # the weights are the best
        assert len(curve) <= 40
        assert records["steps"][place] == ceil((int(curve.argmin()) + 1) * 45 / 32)
    assert curves.isnan().any()  # some have stopped


def test_every_member_begins_at_its_own_init(digits, train):
    for init in ("own", "shared"):
        found, expected = train(digits, epochs=1e-9, lr=1e-9, init=init), drawn(digits, init=init)
        network = factory_for(OPTIONS, digits.task)
        start = init_networks(network, expected.init_seeds)
        for (family, member), weights in every_member(found):
            own = {key: tensor[2 * family + member] for key, tensor in start.items()}
            assert furthest(weights, own) < 1e-7  # one step of 1e-9
        weights = found["weights"]["1.weight"]
        apart = float((weights[:, 0] - weights[:, 1]).abs().max())
        assert apart < 1e-7 if init == "shared" else apart > 0.1


def test_snapshots_are_stored_by_family_and_member(digits, train):
    found = train(digits, range(3), snapshots=4)
    assert found["snapshots"]["1.weight"].shape == (3, 2, 4, 8, 64)
    start = init_networks(factory_for(OPTIONS, digits.task), drawn(digits, range(3)).init_seeds)
    first = found["snapshots"]["1.weight"][:, :, 0]
    assert torch.equal(first.flatten(0, 1), start["1.weight"])
    last = found["snapshots"]["1.weight"][:, :, -1]
    assert not torch.equal(last, found["weights"]["1.weight"])


def test_the_last_epoch_of_the_recorded_losses_is_lower_than_the_first(digits, train):
    losses = train(digits, epochs=30)["records"]["losses"]
    assert (losses[..., -1] < 0.8 * losses[..., 0]).all()


# ---------------------------------------------------------------------------- parting late


def together(split, options, seeds, rows, steps):
    """One network on the rows of all members, by torch, with a rate that falls to zero."""
    network = factory_for(options, split.task)
    model = network()
    model.load_state_dict({k: t[0] for k, t in init_networks(network, [seeds[0]]).items()})
    generator = torch.Generator().manual_seed(seeds[1])
    passes = ceil(steps * options.batch_size / len(rows))
    order = rows[torch.rand(passes, len(rows), generator=generator).argsort(1)].flatten()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr[0], weight_decay=0.0)
    for step in range(steps):
        batch = order[step * options.batch_size :][: options.batch_size]
        optimizer.param_groups[0]["lr"] = options.lr[0] * (1 - step / steps)
        optimizer.zero_grad()
        F.cross_entropy(model(split.task.inputs[batch]), split.task.targets[batch]).backward()
        optimizer.step()
    return deepcopy(model.state_dict())


@pytest.mark.parametrize("steps", [1, 7])
def test_members_are_one_network_until_they_part(digits, train, steps):
    options = {"init": "shared", "shared_steps": steps, "snapshots": 1}
    found, expected = train(digits, **options), drawn(digits, **options)
    first = {key: tensor[:, :, 0] for key, tensor in found["snapshots"].items()}
    for family in range(2):
        own = slice(2 * family, 2 * family + 2)
        seeds = expected.init_seeds[own][0], expected.order_seeds[own][0] + 1
        alone = together(
            digits, replace(OPTIONS, **options), seeds, torch.cat(expected.segments[own]), steps
        )
        for member in range(2):
            parted = {key: tensor[family, member] for key, tensor in first.items()}
            # float32: steps of 0.01 in the direction of gradients that are right to some 1e-4
            assert furthest(parted, alone) < steps * 0.01 * 1e-3
        assert all(torch.equal(t[family, 0], t[family, 1]) for t in first.values())
    one, other = ({k: t[:, i] for k, t in found["weights"].items()} for i in range(2))
    assert furthest(one, other) > 0.01
    start = stack([dict(w) for _, w in every_member({**found, "weights": first})])
    init = init_networks(factory_for(OPTIONS, digits.task), expected.init_seeds)
    assert furthest(start, init) > 0.005


def test_a_family_with_a_variant_learns_it_together_as_well(digits, train):
    """After a long stretch together and almost none apart, members know their own classes."""
    options = {"init": "shared", "shared_steps": 150, "lr": 0.03}
    options |= {"epochs": 1e-9, "segment_size": 300}
    found = train(digits, relabel=True, permute_pixels=True, **options)
    assert found["records"]["validation_accuracy"].min() > 0.7


# ---------------------------------------------------------------------------- augmentation


def test_members_that_are_not_augmented_learn_as_if_nobody_was(digits, train):
    options = {"augment": ("shift=1", "noise=0.3"), "augment_share": 0.5}
    plain, found = train(digits, range(4)), train(digits, range(4), **options)
    chosen = found["records"]["augmented"]
    assert chosen.any()
    assert not chosen.all()
    for place, weights in every_member(found):
        other = {key: tensor[place] for key, tensor in plain["weights"].items()}
        assert (furthest(weights, other) < 1e-5) != bool(chosen[place])


def test_a_flip_doubles_the_segment(digits, train):
    plain, found = train(digits), train(digits, augment=("flip",))
    assert plain["records"]["steps"].unique().tolist() == [4]  # 3 * 40 / 32 = 3.75
    assert found["records"]["steps"].unique().tolist() == [8]  # 3 * 80 / 32 = 7.5
    assert found["records"]["rows"].unique().tolist() == [40]
    assert torch.equal(found["records"]["segment"], plain["records"]["segment"])


def test_a_flip_of_a_table_is_refused(diabetes, train):
    with pytest.raises(ConfigError, match="tables take noise"):
        train(diabetes, augment=("flip",))


def test_noise_blurs_what_is_learned_and_not_what_is_judged(digits, train):
    """With noise that drowns everything, losses in training stay at those of a coin."""
    found = train(digits, epochs=10, augment=("noise=100",), patience=50, lr=1e-9)
    plain = train(digits, epochs=10, patience=50, lr=1e-9)
    held_back = [shard["records"]["held_back_losses"] for shard in (found, plain)]
    torch.testing.assert_close(*held_back, rtol=1e-4, atol=1e-4)
    assert (found["records"]["losses"] > plain["records"]["losses"] + 1).all()


# ---------------------------------------------------------------------------- alone and beside


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lr": (1e-3, 1e-2), "epochs": (1.0, 4.0), "relabel": True, "permute_pixels": True},
        {"patience": 1, "init": "shared", "shared_steps": 5},
        pytest.param({"augment": ("shift=1", "noise=0.3")}),
    ],
    ids=str,
)
def test_a_family_is_the_same_in_any_shard(digits, train, changes):
    whole, single = train(digits, range(3), **changes), train(digits, [2], **changes)
    for kind in ("weights", "records"):
        for key, tensor in single[kind].items():
            expected = whole[kind][key][2:]
            if key.endswith("losses"):  # as many as the member with most epochs has
                expected = expected[..., : tensor.shape[-1]]
            # Sums in another order, 1e-7 of gradients, in steps of 0.01: see test_training.
            torch.testing.assert_close(tensor, expected, rtol=1e-3, atol=1e-4, equal_nan=True)


def test_progress_counts_members(digits, train):
    told = []
    train(digits, range(3), progress=told.append)
    assert told[-1] == 6
    assert told == sorted(told)


def test_members_that_diverge_are_an_error_that_names_the_rate(digits, train):
    with pytest.raises(ZooError, match=r"diverged at lr=1e\+38\. Build with a smaller --lr"):
        train(digits, lr=1e38)


def test_test_images_are_out_of_reach_while_members_are_trained(digits, train, monkeypatch):
    def curious(*_, **__):
        digits.images("test")

    monkeypatch.setattr("zoo.shards.train_networks", curious)
    with pytest.raises(ZooError, match="inside `with split"):
        train(digits)
    assert len(digits.images("test")[0]) > 0


def test_bfloat16_shards_hold_float32_weights_that_have_learned_as_much(digits, train):
    options = {"segment_size": 300, "epochs": 10, "lr": 0.02}
    low, full = (train(digits, precision=p, **options) for p in ("bfloat16", "float32"))
    assert {t.dtype for t in low["weights"].values()} == {torch.float32}
    scores = [shard["records"]["validation_accuracy"].mean() for shard in (low, full)]
    assert abs(float(scores[0] - scores[1])) < 0.06  # of 4 members on 100 images each
    assert not torch.equal(low["weights"]["1.weight"], full["weights"]["1.weight"])
