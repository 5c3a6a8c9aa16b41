import subprocess
import sys
import time

import pytest
import torch

from metamerge.errors import ConfigError, ZooError
from zoo.parts import split_task
from zoo.splits import clusters, validate
from zoo.splits.algorithms import COVARIANCES, LINKAGES
from zoo.splits.clusters import ALGORITHMS
from zoo.splits.features import inputs
from zoo.tasks import load_task

BLOBS = 5
WAYS = [(algorithm, {}) for algorithm in ALGORITHMS]
WAYS += [("agglomerative", {"linkage": linkage}) for linkage in LINKAGES]
WAYS += [("gmm", {"covariance": covariance}) for covariance in COVARIANCES]
every_way = pytest.mark.parametrize(("algorithm", "options"), WAYS)

pytestmark = pytest.mark.filterwarnings("error")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_blobs(rows, dimensions, blobs=BLOBS, seed=0):
    """Features in blobs whose centres are many deviations apart, and the blob of every row."""
    generator = seeded(seed)
    centres = 30.0 * (torch.arange(dimensions) % blobs == torch.arange(blobs)[:, None])
    blob = torch.arange(rows)[torch.randperm(rows, generator=generator)] % blobs
    return centres[blob] + torch.randn(rows, dimensions, generator=generator), blob


def cut(features, members, rows=None, **options):
    targets = torch.zeros(len(features), dtype=torch.int64)
    rows = torch.arange(len(features)) if rows is None else rows
    generator = options.pop("generator", None) or seeded()
    return clusters(targets, rows, members, features=features, generator=generator, **options)


def as_sets(segments):
    return {frozenset(segment.tolist()) for segment in segments}


# ---------------------------------------------------------------------------- all algorithms


@every_way
@pytest.mark.parametrize(("dimensions", "fit_rows"), [(5, 2000), (5, 150), (120, 400)])
def test_blobs_far_apart_are_found_exactly(algorithm, options, dimensions, fit_rows):
    features, blob = make_blobs(1000, dimensions)
    segments = cut(features, BLOBS, algorithm=algorithm, fit_rows=fit_rows, **options)
    assert as_sets(segments) == as_sets((blob == b).nonzero().flatten() for b in range(BLOBS))


@every_way
def test_units_of_features_do_not_matter(algorithm, options):
    features, blob = make_blobs(500, BLOBS)
    scaled = features * torch.tensor([1e-6, 1e-3, 1.0, 1e3, 1e6]) + torch.tensor([0, 1, 2, 3, 4])
    segments = cut(scaled, BLOBS, algorithm=algorithm, **options)
    assert as_sets(segments) == as_sets((blob == b).nonzero().flatten() for b in range(BLOBS))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_same_seed_gives_the_same_clusters(algorithm):
    features = torch.rand(600, 8, generator=seeded())
    options = {"algorithm": algorithm, "min_rows": 1, "min_cluster_size": 2, "fit_rows": 300}
    assert all(map(torch.equal, cut(features, 3, **options), cut(features, 3, **options)))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_only_the_rows_to_cut_are_looked_at(algorithm):
    features, _ = make_blobs(600, 8)
    rows = torch.arange(100, 500)
    before = cut(features, BLOBS, rows, algorithm=algorithm, fit_rows=200)
    features[:100] = 1e6
    features[500:] = torch.nan
    after = cut(features, BLOBS, rows, algorithm=algorithm, fit_rows=200)
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("algorithm", ["kmeans", "agglomerative", "spectral", "gmm"])
def test_clusters_of_real_digits_are_purer_than_chance(algorithm):
    split = split_task(load_task("digits"), objective=400)
    features, targets, rows = inputs(split.task.inputs), split.task.targets, split.segments
    segments = clusters(
        targets, rows, 8, features=features, algorithm=algorithm, generator=seeded()
    )
    validate(segments, rows)
    commonest = sum(int(targets[segment].bincount().max()) for segment in segments)
    # Eight random segments of some 118 rows: a tenth each, and 15 % at the very most.
    assert commonest / len(rows) > 0.5


def test_members_get_clusters_in_random_order():
    features, blob = make_blobs(300, 5)
    generator, first = seeded(), set()
    for _ in range(20):
        segments = cut(features, BLOBS, algorithm="agglomerative", generator=generator)
        first.add(int(blob[segments[0][0]]))
    assert len(first) > 2  # twenty draws of five with at most two outcomes: 1e-7


def test_one_odd_row_does_not_make_a_cluster_of_its_own():
    generator = seeded()
    blob = torch.arange(1000) % 4
    features = torch.zeros(1000, 50)
    features[:, :4] = 10 * torch.eye(4)[blob] + torch.randn(1000, 4, generator=generator)
    features[17, 4:] = 1.0  # 46 features that are zero in all other rows
    segments = cut(features, 4)
    assert as_sets(segments) == as_sets((blob == b).nonzero().flatten() for b in range(4))


def test_a_size_is_drawn_from_every_cluster():
    features, blob = make_blobs(500, 5)
    segments = cut(features, BLOBS, size=60)
    assert [len(segment) for segment in segments] == [60] * BLOBS
    assert sorted(int(blob[segment].unique()) for segment in segments) == list(range(BLOBS))


def test_a_size_beyond_the_smallest_cluster_is_refused():
    features, _ = make_blobs(500, 5)
    rows = torch.arange(450)
    with pytest.raises(ZooError, match=r"'kmeans' made clusters of \[.*\] rows, size=90"):
        cut(features, BLOBS, rows, size=90)


def test_a_cluster_of_too_few_rows_is_refused():
    features, blob = make_blobs(500, 5)
    rows = torch.cat([(blob > 0).nonzero().flatten(), (blob == 0).nonzero().flatten()[:9]])
    with pytest.raises(
        ZooError, match=r"made clusters of \[9, 100, 100, 100, 100\] rows, min_rows"
    ):
        cut(features, BLOBS, rows)
    assert min(len(segment) for segment in cut(features, BLOBS, rows, min_rows=9)) == 9


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_fewer_different_features_than_members_are_refused(algorithm):
    features = (torch.arange(300) % 2).float().unsqueeze(1)
    with pytest.raises(ZooError, match="have 2 different vectors of features, 3 members need"):
        cut(features, 3, algorithm=algorithm)


def test_features_that_never_change_are_no_trouble():
    features, blob = make_blobs(500, 5)
    padded = torch.cat([features, torch.full((500, 3), 0.1)], 1)
    assert as_sets(cut(padded, BLOBS)) == as_sets(
        (blob == b).nonzero().flatten() for b in range(BLOBS)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"algorithm": "dbscan"},
            "algorithm must be one of kmeans, agglomerative, .* got 'dbscan'",
        ),
        ({"linkage": "median"}, "linkage must be one of ward, .* got 'median'"),
        ({"covariance": "none"}, "covariance must be one of full, .* got 'none'"),
        ({"neighbours": 0}, "neighbours must be a whole number above 0, got 0"),
        ({"neighbours": 1}, "neighbours counts the row itself, so 2 at least"),
        ({"min_cluster_size": 1}, "min_cluster_size counts the row itself"),
        ({"fit_rows": 0}, "fit_rows must be a whole number above 0"),
        ({"min_rows": 2.5}, "min_rows must be a whole number above 0"),
    ],
)
def test_an_option_out_of_range_is_refused(options, message):
    with pytest.raises(ConfigError, match=f"clusters: {message}"):
        cut(make_blobs(100, 5)[0], 2, **options)


# ---------------------------------------------------------------------------- single algorithms


def test_hdbscan_joins_the_smallest_clusters_with_their_nearest():
    # Five blobs on a line, of 100, 100, 40, 30 and 100 rows: 30 joins 40, and then their 70 the
    # blob on their left, which is nearer than that on their right.
    places = torch.tensor([0.0] * 100 + [50.0] * 100 + [80.0] * 40 + [90.0] * 30 + [150.0] * 100)
    features = (places + 0.1 * torch.randn(370, generator=seeded())).unsqueeze(1)
    found = {m: cut(features, m, algorithm="hdbscan") for m in (5, 4, 3)}
    assert {m: sorted(map(len, segments)) for m, segments in found.items()} == {
        5: [30, 40, 100, 100, 100],
        4: [70, 100, 100, 100],
        3: [100, 100, 170],
    }
    largest = max(found[3], key=len)
    assert largest.sort().values.equal(torch.arange(100, 270))


def test_hdbscan_puts_noise_with_its_nearest_cluster():
    features, blob = make_blobs(400, 5, blobs=2)
    features[7] = features[blob == 1].mean(0) + 8  # nobody's neighbour, but nearer to blob 1
    segments = cut(features, 2, algorithm="hdbscan")
    home = next(segment for segment in segments if 7 in segment)
    others = home[home != 7]
    assert (blob[others] == 1).all()
    assert sorted(map(len, segments)) == [200 - int(blob[7] == 0), 200 + int(blob[7] == 0)]


def test_hdbscan_says_how_many_clusters_it_found_and_what_to_change():
    features, _ = make_blobs(400, 5, blobs=3)
    with pytest.raises(
        ZooError, match=r"'hdbscan' found 3 clusters .*Lower min_cluster_size \(now"
    ):
        cut(features, 4, algorithm="hdbscan")


def test_single_linkage_follows_rings_that_kmeans_cuts_through():
    angle = torch.arange(400) / 200 * 2 * torch.pi  # twice around
    radius = torch.tensor([1.0, 5.0]).repeat_interleave(200)
    features = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    rings = as_sets([torch.arange(200), torch.arange(200, 400)])
    assert as_sets(cut(features, 2, algorithm="agglomerative", linkage="single")) == rings
    assert as_sets(cut(features, 2, algorithm="spectral")) == rings
    assert as_sets(cut(features, 2, algorithm="kmeans")) != rings


def test_spectral_refuses_to_fit_no_more_rows_than_members():
    features, _ = make_blobs(100, 5)
    with pytest.raises(ZooError, match=r"'spectral' needs more than 5 rows to fit .* got 5"):
        cut(features, 5, algorithm="spectral", fit_rows=5)


# ---------------------------------------------------------------------------- cost


def test_fifty_thousand_images_are_clustered_in_seconds():
    features, _ = make_blobs(50_000, 784, blobs=10)
    cut(features[:100], 2)  # the import of scikit-learn, a second
    start = time.perf_counter()
    cut(features, 10)
    assert time.perf_counter() - start < 3


def test_importing_the_splits_does_not_import_scikit_learn():
    code = "import sys, zoo.splits, zoo.splits.features; print('sklearn' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
