"""Variants of a task: maps of classes and of places, by hand."""

import pytest
import torch

from metamerge.errors import IncompatibleWeights
from metamerge.structure import Layout, discover_program
from zoo.architectures import build, program_of
from zoo.parts import PARTS, TaskSplit
from zoo.tasks import Task
from zoo.training import init_networks, predict
from zoo.variants import Variants, draw_classes, draw_places, renamed

# Three classes; the first family knows them as 2, 0, 1, the second knows 0 and 2 alone, as 1 and 0.
CLASSES = torch.tensor([[2, 0, 1], [1, -1, 0]])
PLACES = torch.tensor([[1, 0, 3, 2], [3, 2, 1, 0]])  # of images 2 x 2: mirrored, turned round
FAMILIES = torch.tensor([0, 1])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def small_split():
    """24 images 2 x 2 whose places hold row + 0.0, 0.1, 0.2 and 0.3, over 24."""
    places = torch.tensor([[0.0, 0.1], [0.2, 0.3]])
    inputs = (torch.arange(24.0).reshape(24, 1, 1, 1) + places) / 24
    task = Task("small", inputs, torch.arange(24) % 3, classes=3)
    return TaskSplit(task, **{part: torch.arange(6) + 6 * i for i, part in enumerate(PARTS)})


# ---------------------------------------------------------------------------- what is seen


def test_classes_are_renamed_by_the_map_of_the_family():
    inputs, targets = torch.rand(2, 4, 5), torch.tensor([[0, 1, 2, 0], [0, 2, 2, 0]])
    seen, labels = Variants(classes=CLASSES).seen(inputs, targets, FAMILIES)
    assert labels.tolist() == [[2, 0, 1, 2], [1, 0, 0, 1]]
    assert seen is inputs


def test_images_are_read_at_the_places_of_the_map():
    image = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    inputs = torch.stack([image, 10 * image]).expand(2, 3, 2, 2, 2)  # two channels
    targets = torch.zeros(2, 3, dtype=torch.long)
    seen, labels = Variants(places=PLACES).seen(inputs, targets, FAMILIES)
    assert labels is targets
    mirrored, turned = [[2.0, 1.0], [4.0, 3.0]], [[4.0, 3.0], [2.0, 1.0]]
    for row in range(3):
        for channel, factor in enumerate((1, 10)):
            assert (seen[0, row, channel] / factor).tolist() == mirrored
            assert (seen[1, row, channel] / factor).tolist() == turned


@pytest.mark.parametrize("shape", [(2, 4), (4,)], ids=["signals", "tables"])
def test_signals_and_tables_are_read_at_the_places_of_the_map(shape):
    inputs = torch.rand(2, 3, *shape, generator=seeded())
    seen, _ = Variants(places=PLACES).seen(inputs, torch.zeros(2, 3), FAMILIES)
    for family in range(2):
        assert torch.equal(seen[family], inputs[family][..., PLACES[family]])


def test_one_family_may_come_several_times_and_in_any_order():
    families = torch.tensor([1, 0, 1])
    inputs, targets = torch.rand(3, 2, 1, 2, 2), torch.tensor([[0, 2], [1, 2], [2, 2]])
    seen, labels = Variants(CLASSES, PLACES).seen(inputs, targets, families)
    assert labels.tolist() == [[1, 0], [0, 1], [0, 0]]
    flat, found = inputs.flatten(2), seen.flatten(2)
    for place, family in enumerate(families):
        assert torch.equal(found[place], flat[place][:, PLACES[family]])


def test_without_maps_everything_is_as_it_is():
    inputs, targets = torch.rand(2, 3, 1, 2, 2), torch.zeros(2, 3, 2)
    assert not Variants()
    assert Variants(classes=CLASSES)
    assert Variants(places=PLACES)
    seen, labels = Variants().seen(inputs, targets, FAMILIES)
    assert seen is inputs
    assert labels is targets
    rows = torch.tensor([4, 2, 7])
    assert torch.equal(Variants().known(1, rows, torch.arange(9)), rows)
    assert Variants().records(3) == {}


def test_numbers_to_predict_stay_as_they_are():
    inputs, targets = torch.rand(2, 3, 4), torch.rand(2, 3, 2)
    seen, values = Variants(places=PLACES).seen(inputs, targets, FAMILIES)
    assert values is targets
    assert torch.equal(seen[1], inputs[1].flip(-1))


def test_rows_of_unknown_classes_are_left_out_in_their_order():
    targets = torch.tensor([0, 1, 2, 1, 0, 2])
    rows = torch.tensor([5, 3, 0, 1])
    assert Variants(classes=CLASSES).known(0, rows, targets).tolist() == [5, 3, 0, 1]
    assert Variants(classes=CLASSES).known(1, rows, targets).tolist() == [5, 0]


# ---------------------------------------------------------------------------- images of a family


def test_images_of_a_family_are_those_of_its_classes_at_its_places():
    split = small_split()
    inputs, targets = Variants(CLASSES, PLACES).images(split, "objective", 1)
    # Rows 6 to 11 are of classes 0, 1, 2, 0, 1, 2; those of class 1 are not known.
    assert targets.tolist() == [1, 0, 1, 0]
    rows = [6, 8, 9, 11]
    expected = [[[[r + 0.3, r + 0.2], [r + 0.1, r + 0.0]]] for r in rows]
    torch.testing.assert_close(inputs * 24, torch.tensor(expected))
    inputs, targets = Variants(CLASSES, PLACES).images(split, "objective", 0)
    assert targets.tolist() == [2, 0, 1, 2, 0, 1]
    assert torch.equal(inputs, split.images("objective")[0].flip(-1))


@pytest.mark.parametrize("part", PARTS)
def test_images_of_families_without_a_variant_are_those_of_the_split(part):
    split = small_split()
    for found, expected in zip(Variants().images(split, part, 3), split.images(part), strict=True):
        assert torch.equal(found, expected)


def test_images_of_a_family_do_not_share_memory_with_the_task():
    split = small_split()
    before = split.task.inputs.clone()
    for variants in (Variants(), Variants(CLASSES, PLACES)):
        for tensor in variants.images(split, "objective", 0):
            tensor.zero_()
    assert torch.equal(split.task.inputs, before)
    assert split.task.targets[:4].tolist() == [0, 1, 2, 0]


# ---------------------------------------------------------------------------- records


@pytest.mark.parametrize(
    "variants",
    [Variants(), Variants(CLASSES), Variants(places=PLACES), Variants(CLASSES, PLACES)],
    ids=["none", "classes", "places", "both"],
)
def test_variants_come_back_from_the_records_of_members(variants):
    records = variants.records(5)
    assert all(tensor.shape[:2] == (2, 5) for tensor in records.values())
    assert {tensor.dtype for tensor in records.values()} <= {torch.int32}
    found = Variants.from_records({"steps": torch.zeros(2, 5), **records})
    for name in ("classes", "places"):
        maps = getattr(variants, name)
        assert (maps is None) == (getattr(found, name) is None)
        assert maps is None or torch.equal(getattr(found, name), maps)
    assert bool(found) == bool(variants)


# ---------------------------------------------------------------------------- drawing


def test_known_classes_keep_their_order_or_get_it_at_random():
    straight = [draw_classes(5, 3, False, seeded(seed)) for seed in range(60)]
    for mapping in straight:
        known = mapping[mapping >= 0]
        assert known.tolist() == [0, 1, 2]
        assert (mapping == -1).sum() == 2
    assert len({tuple(mapping.tolist()) for mapping in straight}) == 10  # of 5 over 3
    shuffled = {tuple(draw_classes(4, 3, True, seeded(seed)).tolist()) for seed in range(400)}
    assert all(sorted(mapping) == [-1, 0, 1, 2] for mapping in shuffled)
    assert len(shuffled) == 24  # 4 choices, 6 orders


def test_all_classes_are_known_where_nobody_says_how_many():
    assert draw_classes(4, 0, False, seeded()).tolist() == [0, 1, 2, 3]
    found = {tuple(draw_classes(3, 0, True, seeded(seed)).tolist()) for seed in range(100)}
    assert len(found) == 6
    assert all(sorted(mapping) == [0, 1, 2] for mapping in found)


def test_every_second_family_is_mirrored_by_hand():
    straight, mirrored = (0, 1, 2, 3, 4, 5), (2, 1, 0, 5, 4, 3)
    drawn = [
        tuple(draw_places((7, 2, 3), False, True, seeded(s)).tolist()) for s in range(400)
    ]  # 7 channels, 2 rows, 3 columns
    assert set(drawn) == {straight, mirrored}
    assert abs(drawn.count(mirrored) / 400 - 0.5) < 5 * 0.5 / 400**0.5


@pytest.mark.parametrize(("shape", "count"), [((3, 4, 5), 20), ((2, 6), 6), ((8,), 8)], ids=str)
def test_places_are_permuted_without_their_channels(shape, count):
    drawn = [draw_places(shape, True, False, seeded(seed)) for seed in range(20)]
    for places in drawn:
        assert places.sort().values.tolist() == list(range(count))
    assert len({tuple(places.tolist()) for places in drawn}) > 15
    assert draw_places(shape, False, False, seeded()).tolist() == list(range(count))


def test_a_permutation_changes_images_and_loses_nothing():
    images = torch.rand(1, 5, 2, 3, 4)
    places = draw_places((2, 3, 4), True, True, seeded())
    seen, _ = Variants(places=places[None]).seen(images, torch.zeros(1, 5), torch.tensor([0]))
    assert not torch.equal(seen, images)
    back = Variants(places=places.argsort()[None]).seen(seen, torch.zeros(1, 5), torch.tensor([0]))
    assert torch.equal(back[0], images)


# ---------------------------------------------------------------------------- renamed networks

ORDERS = torch.tensor([[2, 0, 1], [1, 2, 0]])


def networks(architecture):
    """Two families of two networks for three classes, their layout, and inputs."""
    shape = (1, 8, 8)

    def network():
        return build(architecture, shape, 3, widths=(4, 4, 4))

    program = program_of(network(), shape)
    members = {k: t.unflatten(0, (2, 2)) for k, t in init_networks(network, range(4)).items()}
    inputs = torch.rand(5, *shape, generator=seeded())
    return members, Layout(program, discover_program(program)), inputs


def outputs(layout, members, inputs):
    flat = {key: tensor.flatten(0, 1) for key, tensor in members.items()}
    return predict(layout.program, flat, inputs).unflatten(0, (2, 2))  # [f, m, b, c]


@pytest.mark.parametrize("architecture", ["mlp", "cnn"])
def test_output_i_of_renamed_networks_is_the_output_that_the_map_names(architecture):
    members, layout, inputs = networks(architecture)
    before = outputs(layout, members, inputs)
    found = outputs(layout, renamed(members, layout, ORDERS), inputs)
    for family, order in enumerate(ORDERS):
        for place, former in enumerate(order.tolist()):
            assert torch.allclose(found[family, ..., place], before[family, ..., former], atol=1e-6)


def test_families_that_are_renamed_are_right_about_the_classes_of_the_task():
    _, layout, inputs = networks("mlp")
    first = {k: t[:, 0] for k, t in networks("mlp")[0].items()}
    targets = torch.arange(5) % 3
    own = predict(layout.program, first, inputs).argmax(-1)  # [f, b]
    named = predict(layout.program, renamed(first, layout, ORDERS), inputs).argmax(-1)
    assert torch.equal(own == ORDERS[:, targets], named == targets)


def test_renaming_there_and_back_gives_the_same_numbers_and_changes_nothing_in_place():
    members, layout, _ = networks("mlp")
    kept = {key: tensor.clone() for key, tensor in members.items()}
    there = renamed(members, layout, ORDERS)
    back = renamed(there, layout, ORDERS.argsort(-1))
    assert all(torch.equal(members[key], tensor) for key, tensor in kept.items())
    assert all(torch.equal(back[key], tensor) for key, tensor in kept.items())
    changed = {key for key, tensor in kept.items() if not torch.equal(there[key], tensor)}
    assert changed == {layout.layers[-1].weight, layout.layers[-1].bias}


def test_what_is_no_permutation_of_the_outputs_is_refused():
    members, layout, _ = networks("mlp")
    with pytest.raises(IncompatibleWeights, match="do not know all classes"):
        renamed(members, layout, torch.tensor([[0, 1, -1], [0, 1, 2]]))
    with pytest.raises(IncompatibleWeights, match="has 3 rows, expected 2"):
        renamed(members, layout, torch.tensor([[0, 1], [1, 0]]))
