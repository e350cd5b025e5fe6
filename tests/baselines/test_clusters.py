"""k-means and the instances nearest to its centroids."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cfs.baselines import clusters
from cfs.baselines.clusters import nearest_to_centroids
from cfs.errors import UserError


def blobs(sizes: list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Points around far centres, shuffled, and the blob of each."""
    rng = np.random.default_rng(seed)
    of_point = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    centres = 100.0 * np.eye(len(sizes), 5)
    return centres[of_point] + rng.normal(size=(len(of_point), 5)), of_point


@pytest.mark.parametrize("seed", range(5))
def test_every_cluster_gives_its_share_of_nearest(seed: int) -> None:
    """Catches shares that are equal or random, and points far from the centroids."""
    points, of_point = blobs([40, 20, 60])
    kept = nearest_to_centroids(points, 12, 3, seed)
    assert np.bincount(of_point[kept]).tolist() == [4, 2, 6]
    for blob in range(3):
        members = np.flatnonzero(of_point == blob)
        distances = np.linalg.norm(points[members] - points[members].mean(0), axis=1)
        nearest = members[np.argsort(distances)][: np.sum(of_point[kept] == blob)]
        assert sorted(nearest) == kept[of_point[kept] == blob].tolist()


def test_shares_that_do_not_divide_meet_the_number() -> None:
    """Catches shares rounded one by one, whose sum is not what was asked for."""
    points, of_point = blobs([10, 10, 10])
    for num_keep in range(31):
        counts = np.bincount(of_point[nearest_to_centroids(points, num_keep, 3, 0)], minlength=3)
        assert counts.sum() == num_keep
        assert counts.max() - counts.min() <= 1


@given(
    rows=st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2)), min_size=1, max_size=30),
    fraction=st.floats(0, 1),
    num_clusters=st.integers(1, 40),
    seed=st.integers(0, 5),
)
def test_always_that_many_distinct_and_ascending(
    rows: list[tuple[int, int]], fraction: float, num_clusters: int, seed: int
) -> None:
    """Catches duplicates, few points and lost clusters that repeat or lose an index."""
    num_keep = round(fraction * len(rows))
    points = np.array(rows, dtype=np.float32)
    kept = nearest_to_centroids(points, num_keep, num_clusters, seed)
    assert kept.dtype == np.int64
    assert len(kept) == num_keep
    assert (np.diff(kept) > 0).all()
    assert num_keep == 0 or 0 <= kept[0] <= kept[-1] < len(rows)
    again = nearest_to_centroids(points, num_keep, num_clusters, seed)
    assert np.array_equal(kept, again), "a function of its arguments"


def test_equal_points_are_one_cluster() -> None:
    """Catches a start at one place twice: 90 copies and 10 of another give 9 and 1 of 10."""
    points = np.repeat([[0.0, 0.0], [1.0, 1.0]], [90, 10], axis=0)
    kept = nearest_to_centroids(points, 10, 20, 0)
    assert kept.tolist() == [*range(9), 90]


def test_chunks_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches rows lost or met twice where chunks meet, and a last chunk that is shorter."""
    points, _ = blobs([40, 20, 60])
    whole = nearest_to_centroids(points, 50, 7, 0)
    for rows in (1, 7, 119, 120):
        monkeypatch.setattr(clusters, "CHUNK_ROWS", rows)
        assert np.array_equal(nearest_to_centroids(points, 50, 7, 0), whole)


def test_equal_points_far_from_zero_are_one_cluster() -> None:
    """Catches squared distances by |x|^2 - 2 x.c + |c|^2, which are not 0 for equal points, so
    that copies of one point would start several clusters and another point might start none."""
    rng = np.random.default_rng(0)
    places = (1e4 + rng.normal(size=(3, 64))).astype(np.float32)
    points = np.repeat(places, [60, 30, 10], axis=0)
    centroids = clusters._spread_start(points, 20, 0)
    assert len(centroids) == 3
    kept = nearest_to_centroids(points, 10, 20, 0)
    assert kept.tolist() == [*range(6), 60, 61, 62, 90]


def test_a_cluster_without_points_has_no_share() -> None:
    """Catches a centroid that becomes NaN when Lloyd's steps take its last point."""
    points = np.array([[0.0], [1.0], [10.0]])
    labels, distances = clusters._lloyd(points, np.array([[0.5], [9.0], [1e6]]))
    assert labels.tolist() == [0, 0, 1]
    assert distances.tolist() == [0.25, 0.25, 0.0]


@pytest.mark.parametrize("num_keep", [-1, 4])
def test_more_than_there_are(num_keep: int) -> None:
    """Catches a mixture that is quietly smaller than asked for."""
    message = rf"^{num_keep} instances to keep of 3: expected 0 to 3"
    with pytest.raises(UserError, match=message):
        nearest_to_centroids(np.zeros((3, 2)), num_keep, 2, 0)


def test_no_clusters() -> None:
    """Catches a traceback for `0` clusters."""
    with pytest.raises(UserError, match=r"^0 clusters: expected 1 or more$"):
        nearest_to_centroids(np.zeros((3, 2)), 1, 0, 0)


def test_nothing_of_nothing() -> None:
    """Catches a draw from an empty range."""
    assert nearest_to_centroids(np.zeros((0, 2)), 0, 20, 0).tolist() == []
