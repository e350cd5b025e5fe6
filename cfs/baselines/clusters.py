"""Instances that stand for all: k-means, and of every cluster those nearest to its centroid.

Step 3 of SSR (Huang et al. 2024, arXiv 2403.01244; `custom/icl_gen/kmeans_self.py` of its code):
20 clusters of the inputs' embeddings, which it first scales to length 1. There every cluster's
share is rounded by itself, so that their sum may miss the number wanted; here it is met exactly.

Shapes: N points, D features, K clusters.
"""

from __future__ import annotations

import numpy as np

from cfs.errors import UserError

MAX_ITERATIONS = 300
"""Of Lloyd's algorithm, which ends far sooner; rounding could make it go in circles."""


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
    points = features.astype(np.float64)
    assert np.isfinite(points).all(), "features are finite"
    labels, distances = _lloyd(points, _spread_start(points, num_clusters, seed))
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
    centroids = [points[rng.integers(len(points))]]
    nearest = _squared_distances(points, centroids[0])
    while len(centroids) < num_clusters and nearest.any():
        centroids.append(points[rng.choice(len(points), p=nearest / nearest.sum())])
        nearest = np.minimum(nearest, _squared_distances(points, centroids[-1]))
    return np.stack(centroids)


def _lloyd(points: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each point's cluster (N,) and squared distance to its centroid (N,).

    A cluster that loses all its points stays where it was; it may stay empty.
    """
    labels = np.full(len(points), -1)
    centroids = centroids.copy()
    for _ in range(MAX_ITERATIONS):
        distances = np.stack([_squared_distances(points, c) for c in centroids], axis=1)
        new_labels = distances.argmin(1)
        if np.array_equal(new_labels, labels):
            break
        labels = new_labels
        for cluster in np.unique(labels):
            centroids[cluster] = points[labels == cluster].mean(0)
    return labels, _squared_distances(points, centroids[labels])


def _squared_distances(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Of each point to one centroid (D,) or to its own (N, D): (N,), exactly 0 for equal ones."""
    return np.square(points - centroids).sum(1)


def _shares(sizes: np.ndarray, total: int) -> np.ndarray:
    """`total` dealt out in proportion to `sizes`, which none exceeds: largest remainders.

    In whole numbers, so that no rounding loses one; equal remainders go by place.
    """
    shares, remainders = np.divmod(total * sizes, sizes.sum())
    first = np.argsort(-remainders, kind="stable")[: total - shares.sum()]
    shares[first] += 1
    return shares
