import pytest
import torch

from metamerge.errors import ConfigError
from metamerge.methods import _selection, average, ties

ZERO = {"w": torch.zeros(4)}


def members(*vectors):
    return [{"w": torch.tensor(v)} for v in vectors]


def test_four_numbers():
    # Half of each stays: (4, 3, 0, 0), (-6, 0, 0, 2), (1, 0, -5, 0). Elected: -, +, -, +.
    three = members([4.0, 3, -1, 1], [-6.0, 0, 1, 2], [1.0, 0, -5, 0.5])
    fused = ties(three, base=ZERO, density=0.5)
    assert fused["w"].tolist() == [-6.0, 3.0, -5.0, 2.0]


def test_those_who_agree_are_averaged_and_scaled_onto_the_base():
    two = members([3.0, 0, 0, 0], [5.0, 0, 0, 0], [-1.0, 0, 0, 0])
    base = {"w": torch.tensor([1.0, 1, 1, 1])}
    fused = ties(two, base=base, density=1.0, scale=0.5)  # task vectors 2, 4, -2 and -1s
    assert fused["w"].tolist() == [2.5, 0.5, 0.5, 0.5]


def test_signs_can_be_elected_by_count():
    three = members([1.0, 0, 0, 0], [1.0, 0, 0, 0], [-9.0, 0, 0, 0])
    assert ties(three, base=ZERO, density=1.0, elect="mass")["w"][0].item() == -9.0
    assert ties(three, base=ZERO, density=1.0, elect="count")["w"][0].item() == 1.0


def test_equal_counts_are_decided_by_mass_and_exact_opposites_cancel():
    two = members([1.0, 2, 0, 0], [-3.0, -2, 0, 0])
    fused = ties(two, base=ZERO, density=1.0, elect="count")
    assert fused["w"].tolist() == [-3.0, 0.0, 0.0, 0.0]


def test_flipping_all_signs_flips_the_outcome():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(4, 200, generator=generator).round(decimals=1)
    base = {"w": torch.zeros(200)}
    for elect in ("mass", "count"):
        one = ties([{"w": d} for d in drawn], base=base, elect=elect)["w"]
        other = ties([{"w": -d} for d in drawn], base=base, elect=elect)["w"]
        assert torch.equal(one, -other)


def slow(vectors, density):
    """The paper's algorithm entry by entry, on task vectors that are lists."""
    kept = []
    for vector in vectors:
        count = max(1, int(density * len(vector)))
        floor = sorted((abs(v) for v in vector), reverse=True)[count - 1]
        kept.append([v if abs(v) >= floor else 0.0 for v in vector])
    merged = []
    for column in zip(*kept, strict=True):
        sign = 1 if sum(column) > 0 else -1
        agreeing = [v for v in column if v * sign > 0]
        merged.append(sum(agreeing) / max(1, len(agreeing)))
    return torch.tensor(merged, dtype=torch.float64)


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("density", [0.01, 0.2, 0.9, 1.0])
def test_agrees_with_slow_lists_in_float64(scope, density):
    generator = torch.Generator().manual_seed(1)
    shapes = {"a": (3, 7), "b": (10,)}
    base, *own = (
        {k: torch.randn(s, generator=generator, dtype=torch.float64) for k, s in shapes.items()}
        for _ in range(6)
    )
    fused = ties(own, base=base, density=density, scope=scope)
    parts = [["a", "b"]] if scope == "model" else [["a"], ["b"]]
    for keys in parts:
        vectors = [torch.cat([(w[k] - base[k]).flatten() for k in keys]).tolist() for w in own]
        found = torch.cat([(fused[k] - base[k]).flatten() for k in keys])
        assert torch.allclose(found, slow(vectors, density), atol=1e-12, rtol=0)


KINDS = {
    "noise": lambda x: x,
    "mostly zeros": lambda x: torch.where(x > 1, x, 0),
    "all equal": torch.ones_like,
    "two values": torch.sign,
    "few values": lambda x: x.round(),
    "sorted": lambda x: x.sort().values,
    "heavy tails": lambda x: x**9,
    "striped": lambda x: x * (torch.arange(len(x)) % 256 == 0),
    "only sampled entries": lambda x: x * (torch.arange(len(x)) % 5 != 0),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 1e-4, 0.2, 0.5, 0.999, 1.0])
def test_the_magnitude_of_a_rank_is_exact_however_values_are_spread(monkeypatch, kind, share):
    monkeypatch.setattr(_selection, "_PIECE", 1000)
    monkeypatch.setattr(_selection, "_SAMPLE", 4000)
    generator = torch.Generator().manual_seed(2)
    values = KINDS[kind](torch.randn(20_000, generator=generator))
    base = torch.zeros(20_000)
    rank = max(1, int(share * len(values)))
    cut = [5000, 1, 14_999]
    found = _selection.largest_magnitude(values.split(cut), base.split(cut), rank, torch.float32)
    assert found == values.abs().sort(descending=True).values[rank - 1]


def test_a_sample_that_misleads_does_no_harm(monkeypatch):
    monkeypatch.setattr(_selection, "_PIECE", 1000)
    monkeypatch.setattr(_selection, "_SAMPLE", 4000)
    values = torch.arange(20_000.0)
    values[::5] = 0  # every sampled entry
    found = _selection.largest_magnitude([values], [torch.zeros(20_000)], 100, torch.float32)
    assert found == values.sort(descending=True).values[99]


def test_density_one_of_members_that_agree_is_the_average():
    generator = torch.Generator().manual_seed(3)
    own = [{"w": torch.rand(8, generator=generator)} for _ in range(3)]
    fused = ties(own, base={"w": torch.zeros(8)}, density=1.0)
    assert torch.allclose(fused["w"], average(own)["w"])


def test_running_statistics_are_averaged_and_do_not_count_in_the_cut():
    base = {"w": torch.zeros(2), "n.running_var": torch.tensor([900.0, 1.0])}
    own = [{"w": torch.tensor([1.0, 2.0]), "n.running_var": torch.tensor([v, 1.0])} for v in (1, 3)]
    fused = ties(own, base=base, density=0.5)
    assert fused["n.running_var"].tolist() == [2.0, 1.0]
    assert fused["w"].tolist() == [0.0, 2.0]


def test_tensors_without_entries_and_members_like_the_base_pass():
    base = {"w": torch.ones(3), "empty": torch.zeros(0, 2), "one": torch.tensor(1.0)}
    for scope in ("model", "tensor"):
        fused = ties([base, base], base=base, scope=scope)
        assert all(torch.equal(fused[key], tensor) for key, tensor in base.items())
    assert ties([{}, {}], base={}) == {}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"density": 0}, r"ties: density must be a number in \(0, 1\], got 0"),
        ({"density": 1.5}, r"in \(0, 1\], got 1.5"),
        ({"density": float("nan")}, "got nan"),
        ({"density": None}, "got None"),
        ({"density": True}, "got True"),
        ({"scale": float("inf")}, "scale must be a number"),
        ({"scope": "layer"}, "scope must be one of 'model', 'tensor'"),
        ({"elect": "vote"}, "elect must be one of 'mass', 'count'"),
    ],
)
def test_options_out_of_range_are_refused(options, told):
    with pytest.raises(ConfigError, match=told):
        ties(members([1.0, 2, 3, 4]), base=ZERO, **options)
