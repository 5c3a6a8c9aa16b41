"""Families as mergers are trained on them: aligned, questioned, with classes of their own."""

import pytest
import torch

from evaluation.metrics import accuracy, family_logits
from metamerge.alignment import weight_matching
from metamerge.errors import ConfigError
from metamerge.mergers import ThresholdObjective
from trainers.families import load_families, read_data, thresholds_of
from zoo.build import ZooOptions, build, split_of
from zoo.variants import Variants

# Two members on four images of two classes: the first one is right three times, the second twice,
# and what both say together is right four times.
SURE, UNSURE = [[9.0, 0.0], [0.0, 9.0]], [[0.0, 1.0], [1.0, 0.0]]
ANSWERS = torch.tensor([[[*SURE, SURE[0], UNSURE[0]], [*UNSURE, SURE[0], [9.0, 0.0]]]])
TARGETS = torch.tensor([[0, 1, 0, 0]])


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (ThresholdObjective("best_member"), 0.75),
        (ThresholdObjective("best_member", 0.1), 0.85),
        (ThresholdObjective("ensemble"), 1.0),
        (ThresholdObjective("ensemble", -0.2), 0.8),
        (ThresholdObjective("absolute", 0.6), 0.6),
    ],
)
def test_thresholds_by_hand(objective, expected):
    assert thresholds_of(ANSWERS, TARGETS, objective).tolist() == pytest.approx([expected])


def test_families_without_variants_know_all_images_by_the_tasks_classes(make_families):
    families = make_families()
    known = families.images[1]
    assert torch.equal(families.targets(), known.expand(36, -1))
    rows, chosen = torch.tensor([5, 1, 5]), torch.tensor([7, 3])
    assert torch.equal(families.targets(rows, chosen), known[[7, 3]].expand(3, -1))


def test_relabelled_families_know_images_by_classes_of_their_own(make_families, renamed_classes):
    families = make_families(variants=Variants(renamed_classes))
    known = families.images[1]
    everything = families.targets()
    for family in (0, 17, 35):
        assert torch.equal(everything[family], renamed_classes[family][known])
    rows, chosen = torch.tensor([5, 1, 5]), torch.tensor([7, 3])
    assert torch.equal(families.targets(rows, chosen), everything[rows][:, chosen])
    assert torch.equal(families.targets(chosen=chosen), everything[:, chosen])


def test_the_number_of_families_and_of_members_is_known(make_families):
    families = make_families(members=3)
    assert len(families) == 36
    assert families.members == 3


def test_thresholds_of_a_group_are_those_on_all_its_images(make_families, renamed_classes):
    families = make_families()
    best = accuracy(families.answers.float(), families.images[1]).amax(1)
    found = families.thresholds(ThresholdObjective("best_member"))
    assert torch.allclose(found, best)
    # Families that call the same classes otherwise are not nearly as good by these names.
    other = make_families(variants=Variants(renamed_classes))
    assert (other.thresholds(ThresholdObjective("best_member")) < found - 0.1).all()


# ---------------------------------------------------------------------------- out of a zoo


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "relabelled"])
def zoo(request, tmp_path_factory):
    return build(
        ZooOptions(
            out=str(tmp_path_factory.mktemp("zoos") / "small"),
            widths=(16,),
            segment_size=150,
            members=(2, 3),
            train_families=3,
            validation_families=2,
            test_families=1,
            epochs=40.0,
            relabel=request.param,
        )
    )


def test_families_of_a_zoo_are_aligned_and_questioned(zoo):
    images = split_of(zoo).images("objective")
    found = load_families(zoo, "train", images)
    assert {members: (group.name, len(group)) for members, group in found.items()} == {
        2: ("k2", 3),
        3: ("k3", 3),
    }
    for members, group in found.items():
        raw = zoo.families("train", members)
        spec = zoo.layout.spec
        aligned = spec.permute(raw, weight_matching(raw, spec))
        for key, tensor in aligned.items():
            assert torch.equal(group.weights[key], tensor)
        said = family_logits(zoo.layout.program, raw, images[0])  # permuting changes nothing
        # Half precision has 11 bits.
        assert torch.allclose(group.answers.float(), said, rtol=2**-11, atol=1e-3)


def test_each_part_of_a_zoo_has_families_of_its_own(zoo):
    images = split_of(zoo).images("validation")
    found = load_families(zoo, "validation", images, prefix="small_")
    assert {group.name: len(group) for group in found.values()} == {"small_k2": 2, "small_k3": 2}
    train = load_families(zoo, "train", images)
    for members, group in found.items():
        for key, tensor in group.weights.items():
            assert not torch.equal(tensor, train[members].weights[key][:2])


def test_members_are_right_by_the_names_that_their_family_knows(zoo):
    images = split_of(zoo).images("validation")
    for part in ("train", "validation"):
        for group in load_families(zoo, part, images).values():
            own = accuracy(group.answers.float(), group.targets()[:, None])
            assert own.mean() > 0.3  # chance is 0.1
            if group.variants:
                task = accuracy(group.answers.float(), images[1])
                assert task.mean() < own.mean() - 0.15


def test_one_validation_family_is_too_few_to_be_compared(tmp_path):
    options = ZooOptions(
        out=str(tmp_path / "lone"),
        widths=(4,),
        segment_size=50,
        members=(2,),
        train_families=2,
        validation_families=1,
        test_families=1,
        epochs=1.0,
    )
    lone = build(options)
    told = r"lone: expected 2 validation families or more of K=2, got 1\. .*--validation-families"
    with pytest.raises(ConfigError, match=told):
        read_data([(lone, split_of(lone))], torch.device("cpu"))
