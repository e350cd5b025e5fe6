"""Instances that stand for all: k-means, and of every cluster those nearest to its centroid.

Step 3 of SSR (Huang et al. 2024, arXiv 2403.01244; `custom/icl_gen/kmeans_self.py` of its code):
20 clusters of the inputs' embeddings, which it first scales to length 1. There every cluster's
share is rounded by itself, so that their sum may miss the number wanted; here it is met exactly.

Shapes: N points, D features, K clusters.
"""

from __future__ import annotations

import numpy as np

from cfs.errors import UserError

MAX_ITERATIONS = 50
"""Of Lloyd's algorithm, whose last ones move few points; rounding could make it go in circles."""
CHUNK_ROWS = 8192
"""Points in float64 at a time: memory beside the features is this many times D, however large N."""


def nearest_to_centroids(
    features: np.ndarray, num_keep: int, num_clusters: int, seed: int
) -> np.ndarray:
    """Indices of `num_keep` points: of every cluster its share, nearest to the centroid first.

    features  (N, D) any float dtype, finite; distances are Euclidean, in float64

    Returns (num_keep,) int64, distinct and ascending, a function of the arguments alone. A share
    is proportional to the cluster's size, by largest remainders. Where fewer than `num_clusters`
    points are distinct, each is a cluster of its own; equally near points go by index.

    Raises `UserError` where there are not that many points to keep, or for no clusters.
    """
    if not 0 <= num_keep <= len(features):
        raise UserError(
            f"{num_keep} instances to keep of {len(features)}: expected 0 to {len(features)}; "
            "keep fewer or bring more"
        )
    if num_clusters < 1:
        raise UserError(f"{num_clusters} clusters: expected 1 or more")
    if num_keep == 0:
        return np.empty(0, dtype=np.int64)
    assert np.isfinite(features).all(), "features are finite"
    labels, distances = _lloyd(features, _spread_start(features, num_clusters, seed))
    sizes = np.bincount(labels)
    kept = []
    for cluster, share in enumerate(_shares(sizes, num_keep)):
        members = np.flatnonzero(labels == cluster)
        kept.append(members[np.argsort(distances[members], kind="stable")[:share]])
    return np.sort(np.concatenate(kept))


def _spread_start(points: np.ndarray, num_clusters: int, seed: int) -> np.ndarray:
    """Centroids to start from, distinct points: (K, D), K lower where no more are distinct.

    k-means++ (Arthur & Vassilvitskii 2007): each is drawn with probability proportional to the
    squared distance to the nearest one before it.
    """
    rng = np.random.default_rng(seed)
    first = int(rng.integers(len(points)))
    centroids = points[[first]].astype(np.float64)
    nearest = _squared_distances(points, centroids, np.zeros(len(points), dtype=np.int64))
    while len(centroids) < num_clusters and nearest.any():
        drawn = int(rng.choice(len(points), p=nearest / nearest.sum()))
        centroids = np.concatenate([centroids, points[[drawn]]], dtype=np.float64)
        last = np.full(len(points), len(centroids) - 1)
        nearest = np.minimum(nearest, _squared_distances(points, centroids, last))
    return centroids


def _lloyd(points: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each point's cluster (N,) and squared distance to its centroid (N,).

    A cluster that loses all its points stays where it was; it may stay empty.
    """
    labels = np.full(len(points), -1)
    centroids = centroids.copy()
    for _ in range(MAX_ITERATIONS):
        new_labels, sums = _assigned(points, centroids)
        if np.array_equal(new_labels, labels):
            break
        labels = new_labels
        sizes = np.bincount(labels, minlength=len(centroids))
        filled = sizes > 0
        centroids[filled] = sums[filled] / sizes[filled, None]
    return labels, _squared_distances(points, centroids, labels)


def _assigned(points: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each point's nearest centroid (N,), and the sum of each centroid's points (K, D)."""
    labels, sums = np.empty(len(points), dtype=np.int64), np.zeros_like(centroids)
    half_norms = np.square(centroids).sum(1) / 2
    for rows in _chunks(len(points)):
        chunk = points[rows].astype(np.float64)
        # |x - c|^2 = |x|^2 + 2 (|c|^2 / 2 - x.c), of which |x|^2 is the same for every centroid.
        nearest = (half_norms - chunk @ centroids.T).argmin(1)
        labels[rows] = nearest
        sums += (nearest == np.arange(len(centroids))[:, None]).astype(np.float64) @ chunk
    return labels, sums


def _squared_distances(points: np.ndarray, centroids: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Of each point to the centroid that its label names: (N,) float64.

    By differences, so that it is exactly 0 for equal ones: the expanded square is not.
    """
    distances = np.empty(len(points))
    for rows in _chunks(len(points)):
        difference = points[rows] - centroids[labels[rows]]
        distances[rows] = np.einsum("nd,nd->n", difference, difference)
    return distances


def _chunks(num_rows: int) -> list[slice]:
    return [slice(start, start + CHUNK_ROWS) for start in range(0, num_rows, CHUNK_ROWS)]


def _shares(sizes: np.ndarray, total: int) -> np.ndarray:
    """`total` dealt out in proportion to `sizes`, which none exceeds: largest remainders.

    In whole numbers, so that no rounding loses one; equal remainders go by place.
    """
    shares, remainders = np.divmod(total * sizes, sizes.sum())
    first = np.argsort(-remainders, kind="stable")[: total - shares.sum()]
    shares[first] += 1
    return shares
