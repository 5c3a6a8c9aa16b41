import sys

import pytest
import torch

from metamerge.errors import ConfigError
from metamerge.methods import dare, ties

LENGTH = 20_000


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_entries_are_dropped_or_doubled():
    fused = dare(
        [{"w": torch.full((50,), 3.0)}], base={"w": torch.ones(50)}, generator=seeded(), density=0.5
    )
    assert set(fused["w"].tolist()) == {1.0, 5.0}  # the base, or 1 + 2 / 0.5


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_nothing_changes_in_expectation(density):
    fused = dare(
        [{"w": torch.ones(LENGTH)}] * 2,
        base={"w": torch.zeros(LENGTH)},
        generator=seeded(),
        density=density,
    )["w"]
    deviation = ((1 - density) / density / (2 * LENGTH)) ** 0.5
    assert abs(float(fused.mean()) - 1) < 5 * deviation


def test_members_are_thinned_independently():
    own = [{"w": torch.ones(LENGTH)}, {"w": torch.full((LENGTH,), 10.0)}]
    fused = dare(own, base={"w": torch.zeros(LENGTH)}, generator=seeded(), density=0.5)["w"]
    counts = {value: int((fused == value).sum()) for value in (0.0, 1.0, 10.0, 11.0)}
    assert sum(counts.values()) == LENGTH
    assert all(abs(n - LENGTH / 4) < 5 * (LENGTH * 3 / 16) ** 0.5 for n in counts.values())


def test_agrees_with_drawing_one_member_after_the_other_in_float64():
    generator = torch.Generator().manual_seed(1)
    base, *own = ({"w": torch.randn(4, 5, generator=generator)} for _ in range(4))
    fused = dare(own, base=base, generator=seeded(2), density=0.6, scale=0.7)["w"]
    draws, total = seeded(2), torch.zeros(4, 5, dtype=torch.float64)
    for member in own:
        staying = torch.bernoulli(torch.full((4, 5), 0.6), generator=draws)
        total += staying * (member["w"].double() - base["w"].double()) / 0.6
    expected = base["w"].double() + 0.7 * total / 3
    assert torch.allclose(fused.double(), expected, atol=1e-6, rtol=0)


def test_draws_do_not_depend_on_the_pieces_that_are_computed(monkeypatch):
    own = [{"w": torch.randn(9000, generator=seeded(i))} for i in range(3)]
    base = {"w": torch.zeros(9000)}
    whole = dare(own, base=base, generator=seeded(3))["w"]
    monkeypatch.setattr("metamerge.methods._combination._PIECE", 1)
    monkeypatch.setattr(sys.modules["metamerge.methods.dare"], "_DRAWN", 100)
    assert torch.equal(dare(own, base=base, generator=seeded(3))["w"], whole)


def test_with_all_entries_and_an_election_it_is_ties_without_trimming():
    own = [{"w": torch.randn(30, generator=seeded(i))} for i in range(3)]
    base = {"w": torch.randn(30, generator=seeded(9))}
    fused = dare(own, base=base, generator=seeded(), density=1.0, elect=True)
    assert torch.equal(fused["w"], ties(own, base=base, density=1.0)["w"])


def test_running_statistics_are_averaged():
    own = [{"n.running_var": torch.tensor([v])} for v in (1.0, 3.0)]
    fused = dare(own, base={"n.running_var": torch.tensor([9.0])}, generator=seeded(), density=0.1)
    assert fused["n.running_var"].tolist() == [2.0]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"density": 0.0}, r"dare: density must be a number in \(0, 1\], got 0.0"),
        ({"density": "most"}, "density must be a number"),
        ({"scale": None}, "scale must be a number"),
        ({"elect": 1}, "elect must be one of False, True, got 1"),
    ],
)
def test_options_out_of_range_are_refused(options, told):
    with pytest.raises(ConfigError, match=told):
        dare([{"w": torch.ones(2)}], base={"w": torch.ones(2)}, generator=seeded(), **options)
