import pytest
import torch

from metamerge.errors import ConfigError, ZooError
from zoo.splits import choose_members, clusters, coefficients

# ---------------------------------------------------------------------------- by hand


def test_two_pairs_on_a_line():
    # 0, 1 | 4, 5: to its own 1; to the others 4.5 or 3.5: (1 - 1/4.5) and (1 - 1/3.5)
    points = torch.tensor([[0.0], [1.0], [4.0], [5.0]])
    found = coefficients(points, [torch.tensor([0, 1]), torch.tensor([2, 3])])
    assert found["silhouette"] == pytest.approx((1 - 1 / 4.5 + 1 - 1 / 3.5) / 2)
    assert found["calinski_harabasz"] == pytest.approx((4 * 4 / 1) / (1.0 / 2))
    assert found["davies_bouldin"] == pytest.approx((0.5 + 0.5) / 4)


def test_units_and_rows_outside_do_not_matter():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(50, 3, generator=generator)
    segments = torch.arange(40).split(20)
    scaled = points * torch.tensor([1000.0, 1.0, 0.01]) + 7
    scaled[40:] = torch.nan
    expected = coefficients(points, segments)
    assert coefficients(scaled, segments) == pytest.approx(expected, rel=1e-4)


# ---------------------------------------------------------------------------- choosing


def test_the_number_of_blobs_is_found_by_every_coefficient():
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    points = centres.repeat(50, 1) + torch.randn(200, 2, generator=generator)
    targets, rows = torch.zeros(200, dtype=torch.int64), torch.arange(200)
    found = {
        k: coefficients(
            points, clusters(targets, rows, k, features=points, generator=generator, min_rows=1)
        )
        for k in range(2, 7)
    }
    for by in ("all", "silhouette", "calinski_harabasz", "davies_bouldin"):
        assert choose_members(found, by=by) == 4


def test_all_is_the_smallest_mean_rank_and_equals_go_to_the_smaller_number():
    names = ("silhouette", "calinski_harabasz", "davies_bouldin")
    found = {
        2: dict(zip(names, (0.9, 5.0, 0.9), strict=True)),  # ranks 0, 2, 2
        3: dict(zip(names, (0.5, 7.0, 0.5), strict=True)),  # ranks 1, 1, 1
        4: dict(zip(names, (0.4, 9.0, 0.4), strict=True)),  # ranks 2, 0, 0
    }
    assert choose_members(found) == 4
    assert choose_members(found, by="silhouette") == 2
    assert choose_members({5: found[3], 3: found[3]}) == 3


def test_one_cluster_and_unknown_coefficients_are_refused():
    with pytest.raises(ZooError, match="at least two clusters"):
        coefficients(torch.randn(5, 2), [torch.arange(5)])
    with pytest.raises(ConfigError, match="gap"):
        choose_members({2: {}}, by="gap")
    with pytest.raises(ConfigError, match="no numbers"):
        choose_members({})
