import pytest
import torch

from metamerge.errors import ConfigError
from metamerge.methods import breadcrumbs

ZERO = {"w": torch.zeros(10)}


def test_ten_numbers():
    # Of 1 to 10, a tenth of the largest goes (10), and the smallest until five are left.
    own = [{"w": torch.tensor([1.0, -2, 3, -4, 5, -6, 7, -8, 9, -10])}]
    fused = breadcrumbs(own, base=ZERO, density=0.5, gamma=0.1)
    assert fused["w"].tolist() == [0, 0, 0, 0, 5, -6, 7, -8, 9, 0]


def test_members_are_averaged_and_scaled_or_elected():
    own = [{"w": torch.full((10,), v)} for v in (1.0, 2.0, -3.0, -3.0)]
    given = {"base": ZERO, "density": 1.0}
    assert breadcrumbs(own, **given, scale=4)["w"].tolist() == [-3.0] * 10
    assert breadcrumbs(own, **given, elect=True)["w"].tolist() == [-3.0] * 10
    assert breadcrumbs(own[:3], **given, elect=True)["w"].tolist() == [0.0] * 10


@pytest.mark.parametrize("density", [0.05, 0.3, 0.85, 0.99])
@pytest.mark.parametrize("gamma", [0.0, 0.02, 0.5])
def test_agrees_with_sorting_in_float64(density, gamma):
    generator = torch.Generator().manual_seed(0)
    base, *own = (torch.randn(6, 9, generator=generator, dtype=torch.float64) for _ in range(4))
    fused = breadcrumbs([{"w": w} for w in own], base={"w": base}, density=density, gamma=gamma)[
        "w"
    ]
    total, count = torch.zeros_like(base), base.numel()
    for member in own:
        order = (member - base).abs().flatten().argsort(descending=True)
        kept = int(density * count)
        first = min(int(gamma * count), count - kept)
        mask = torch.zeros(count, dtype=torch.bool)
        mask[order[first : first + kept]] = True
        total += torch.where(mask.view(6, 9), member - base, 0)
    assert torch.allclose(fused, base + total / 3, atol=1e-12, rtol=0)


def test_every_tensor_has_cuts_of_its_own():
    base = {"small": torch.zeros(10), "large": torch.zeros(10)}
    own = [{"small": torch.arange(10.0) / 100, "large": torch.arange(10.0) * 100}]
    fused = breadcrumbs(own, base=base, density=0.5, gamma=0.0)
    assert [int((t != 0).sum()) for t in fused.values()] == [5, 5]


def test_a_tensor_of_one_entry_keeps_it():
    base = {"one": torch.tensor(1.0), "empty": torch.zeros(0, 3)}
    fused = breadcrumbs([{**base, "one": torch.tensor(3.0)}], base=base, density=0.5)
    assert fused["one"].item() == 3.0


def test_running_statistics_are_averaged():
    own = [{"n.running_var": torch.tensor([v, 1.0])} for v in (1.0, 3.0)]
    fused = breadcrumbs(own, base={"n.running_var": torch.tensor([9.0, 9.0])}, density=0.5)
    assert fused["n.running_var"].tolist() == [2.0, 1.0]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"density": 0}, r"breadcrumbs: density must be a number in \(0, 1\], got 0"),
        ({"gamma": 1.0}, r"gamma must be a number in \[0, 1\), got 1.0"),
        ({"gamma": -0.1}, "gamma must be a number"),
        ({"scale": float("nan")}, "scale must be a number"),
        ({"elect": "mass"}, "elect must be one of False, True"),
    ],
)
def test_options_out_of_range_are_refused(options, told):
    with pytest.raises(ConfigError, match=told):
        breadcrumbs([ZERO], base=ZERO, **options)
