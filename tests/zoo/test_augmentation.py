"""Augmentation: what a step sees of its images, by hand and beside slow loops."""

import pytest
import torch

from metamerge.errors import ConfigError
from zoo.augmentation import Augmentation, uniform


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def seeds(inputs, first=0):
    """One seed per network."""
    return torch.arange(len(inputs)) + 1000 * first


def repeated(image, count):
    """One image many times over, for two networks: ``[2, count, ...]``."""
    return image.expand(2, count, *image.shape).clone()


def moved(image, down, right):
    """An image with one channel, moved place by place; what comes in is 0."""
    height, width = image.shape[1:]
    found = torch.zeros_like(image)
    for row in range(height):
        for column in range(width):
            if 0 <= row - down < height and 0 <= column - right < width:
                found[0, row, column] = image[0, row - down, column - right]
    return found


def different(images):
    """The different images among ``[n, b, ...]``, as nested lists."""
    return images.flatten(0, 1).unique(dim=0).tolist()


NUMBERS = torch.arange(1.0, 10.0).reshape(1, 3, 3)


# ---------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), Augmentation()),
        (("flip",), Augmentation(flip=True)),
        (("shift",), Augmentation(shift=2)),
        (("noise",), Augmentation(noise=0.1)),
        (("noise=0.25", "flip", "shift=3"), Augmentation(True, 3, 0.25)),
    ],
)
def test_words_are_read_in_any_order(words, expected):
    found = Augmentation.parse(words)
    assert found == expected
    assert isinstance(found.shift, int)
    assert bool(found) == bool(words)


@pytest.mark.parametrize(
    "words",
    [
        ("turn",), ("flip=1",), ("shift=0",), ("shift=-1",), ("noise=0",), ("noise=-0.1",),
        ("noise=nan",), ("noise=inf",), ("shift=two",), ("flip", "flip"), ("shift", "shift=3"),
        ("",), ("flip",  "turn"),
    ],
)  # fmt: skip
def test_other_words_are_refused_by_name(words):
    with pytest.raises(ConfigError, match=f"got {words[-1]!r}, expected flip, shift"):
        Augmentation.parse(words)


@pytest.mark.parametrize("word", ["shfit=2", "turn=90", "=2"])
def test_other_words_with_a_number_are_refused_by_name(word):
    with pytest.raises(ConfigError, match=f"got {word!r}, expected flip, shift"):
        Augmentation.parse((word,))


def test_a_shift_by_half_a_place_is_refused():
    with pytest.raises(ConfigError, match=r"whole number of places, got 1\.5"):
        Augmentation.parse(("shift=1.5",))


# ---------------------------------------------------------------------------- flips


def test_a_flip_mirrors_half_of_the_images_by_hand():
    image = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]])  # two channels
    mirror = [[[2.0, 1.0], [4.0, 3.0]], [[6.0, 5.0], [8.0, 7.0]]]
    found = Augmentation(flip=True).apply(repeated(image, 500), seeds(repeated(image, 500)), 3)
    assert different(found) == [image.tolist(), mirror]
    share = (found[:, :, 0, 0, 0] == 2).double().mean(1)
    assert ((share - 0.5).abs() < 5 * 0.5 / 500**0.5).all()  # five deviations of 500 coins
    assert not torch.equal(found[0], found[1])  # networks throw coins of their own


def test_a_signal_is_mirrored_along_its_length():
    signal = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    found = Augmentation(flip=True).apply(repeated(signal, 20), seeds(repeated(signal, 20)), 3)
    assert different(found) == [signal.tolist(), [[3.0, 2.0, 1.0], [6.0, 5.0, 4.0]]]


# ---------------------------------------------------------------------------- shifts


def test_a_shift_moves_images_in_all_directions_by_hand():
    found = Augmentation(shift=1).apply(repeated(NUMBERS, 200), seeds(repeated(NUMBERS, 200)), 3)
    expected = [moved(NUMBERS, down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    assert different(found) == different(torch.stack(expected)[None])
    assert [[[0.0, 0.0, 0.0], [2.0, 3.0, 0.0], [5.0, 6.0, 0.0]]] in different(found)  # down, left
    assert [[[0.0, 4.0, 5.0], [0.0, 7.0, 8.0], [0.0, 0.0, 0.0]]] in different(found)  # up, right


def test_a_shift_goes_as_far_as_was_said_and_all_are_as_likely():
    line = torch.zeros(1, 1, 11)
    line[0, 0, 5] = 1.0  # goes up and down as well, out of its one row
    places = Augmentation(shift=2).apply(repeated(line, 3000), seeds(repeated(line, 3000)), 3)[
        ..., 0, 0, :
    ]
    found = places.sum(1).double()  # [2, 11]
    assert found[:, :3].sum() == found[:, 8:].sum() == 0
    share = found[:, 3:8] / 3000  # each of five, in the fifth of the images that stay in the row
    assert ((share - 0.04).abs() < 5 * (0.04 * 0.96 / 3000) ** 0.5).all()


def test_channels_move_together_and_images_apart():
    images = torch.arange(2 * 30 * 3 * 16.0).reshape(2, 30, 3, 4, 4) + 1
    images[:, :, 1] = 10 * images[:, :, 0]
    images[:, :, 2] = -images[:, :, 0]
    found = Augmentation(flip=True, shift=2).apply(images, seeds(images), 3)
    assert torch.equal(found[:, :, 1], 10 * found[:, :, 0])
    assert torch.equal(found[:, :, 2], -found[:, :, 0])
    seen = (found[:, :, 0] != 0).flatten(0, 1).unique(dim=0)
    assert len(seen) > 10  # of 25 shifts


def test_a_shift_beyond_the_image_leaves_nothing():
    found = Augmentation(shift=9).apply(repeated(NUMBERS, 300), seeds(repeated(NUMBERS, 300)), 3)
    kept = {tuple(image) for image in found.flatten(0, 1).flatten(1).tolist()}
    moves = [moved(NUMBERS, down, right) for down in range(-9, 10) for right in range(-9, 10)]
    assert kept <= {tuple(image.flatten().tolist()) for image in moves}
    assert (0.0,) * 9 in kept


def test_a_signal_moves_along_its_length():
    signal = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    found = Augmentation(shift=1).apply(repeated(signal, 50), seeds(repeated(signal, 50)), 3)
    left, right = [[2.0, 3.0, 0.0], [5.0, 6.0, 0.0]], [[0.0, 1.0, 2.0], [0.0, 4.0, 5.0]]
    assert sorted(different(found)) == sorted([left, right, signal.tolist()])


# ---------------------------------------------------------------------------- noise


@pytest.mark.parametrize("shape", [(1, 6, 5), (2, 15), (30,)])
def test_noise_has_mean_zero_and_the_deviation_that_was_said(shape):
    inputs = torch.rand(4, 200, *shape, generator=seeded(1))
    noise = Augmentation(noise=0.2).apply(inputs, seeds(inputs), 3) - inputs
    count = noise.numel()
    assert float(noise.mean().abs()) < 5 * 0.2 / count**0.5
    assert float((noise.std() - 0.2).abs()) < 5 * 0.2 / (2 * count) ** 0.5
    # No two numbers share theirs: neither networks nor images nor places.
    assert len(noise.flatten().unique()) > 0.9 * count  # the others met by rounding


def test_noise_is_bounded_by_nothing_but_its_deviation():
    images = torch.zeros(2, 50, 1, 8, 8)
    found = Augmentation(noise=0.1).apply(images, seeds(images), 3)
    assert (found < 0).any()  # an image in training may leave [0, 1]


# ---------------------------------------------------------------------------- all of them


def test_tables_take_noise_alone():
    table = torch.rand(2, 40, 7, generator=seeded())
    for refused in (Augmentation(flip=True), Augmentation(shift=3, noise=0.1)):
        with pytest.raises(ConfigError, match="tables take noise"):
            refused.apply(table, seeds(table), 0)
    assert not torch.equal(Augmentation(noise=0.1).apply(table, seeds(table), 3), table)


def test_nothing_asked_for_changes_nothing():
    images = torch.rand(2, 3, 1, 4, 4)
    assert torch.equal(Augmentation().apply(images, seeds(images), 3), images)


@pytest.mark.parametrize("shape", [(1, 5, 4), (2, 9), (6,)])
def test_seeds_decide_and_inputs_stay_as_they_are(shape):
    inputs = torch.rand(3, 20, *shape, generator=seeded())
    before, everything = inputs.clone(), Augmentation(len(shape) > 1, int(len(shape) > 1), 0.1)
    one, same, other = (everything.apply(inputs, seeds(inputs, seed), 3) for seed in (1, 1, 2))
    assert one.shape == inputs.shape
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(inputs, before)
    state = torch.get_rng_state()
    everything.apply(inputs, seeds(inputs), 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_kind_of_numbers_is_kept():
    images = torch.rand(2, 3, 1, 4, 4, dtype=torch.float64)
    assert Augmentation(True, 1, 0.1).apply(images, seeds(images), 3).dtype == torch.float64


# ---------------------------------------------------------------------------- random numbers


def splitmix(state):
    """SplitMix64's output function, on Python's whole numbers."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return state ^ (state >> 31)


def test_numbers_are_those_of_splitmix_on_whole_numbers():
    golden, own = 0x9E3779B97F4A7C15, [0, 7, 2**60 + 3]
    found = uniform(torch.tensor(own), 5, 4, stream=3)
    for row, seed in zip(found.tolist(), own, strict=True):
        start = splitmix((splitmix((seed + 3 * golden) % 2**64) + 5) % 2**64)
        expected = [splitmix((start + k * golden) % 2**64) >> 40 for k in range(1, 5)]
        assert row == [number / 2**24 for number in expected]


def test_numbers_are_even_and_have_nothing_to_do_with_each_other():
    own = torch.arange(200)
    sets = [uniform(own, step, 500, stream=stream) for step, stream in ((0, 0), (1, 0), (0, 1))]
    for numbers in sets:
        assert 0 <= numbers.min() < numbers.max() < 1
        assert abs(float(numbers.mean()) - 0.5) < 4 * (1 / 12 / numbers.numel()) ** 0.5
        counts = torch.histc(numbers, 10, 0, 1)
        assert (counts - 10_000).abs().max() < 5 * (100_000 * 0.1 * 0.9) ** 0.5
    flat = torch.stack([numbers.flatten() for numbers in sets] + [sets[0].roll(1, 0).flatten()])
    assert (torch.corrcoef(flat) - torch.eye(4)).abs().max() < 5 / 100_000**0.5


def test_what_a_network_sees_does_not_depend_on_those_beside_it():
    images = torch.rand(3, 5, 1, 6, 6, generator=seeded())
    everything, own = Augmentation(True, 2, 0.3), torch.tensor([11, 12, 13])
    together = everything.apply(images, own, 4)
    assert torch.equal(everything.apply(images[1:2], own[1:2], 4)[0], together[1])
    assert not torch.equal(everything.apply(images, own, 5), together)
