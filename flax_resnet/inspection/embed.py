"""Features in the plane: principal components, t-SNE."""

from __future__ import annotations

import dataclasses

import numpy as np

from flax_resnet.errors import UserError

LEAST_EXAMPLES = 5


@dataclasses.dataclass(frozen=True)
class Embedding:
    """Points in the plane."""

    points: np.ndarray
    """(n, 2)."""
    axes: tuple[str, str]
    """What the axes are."""


def pca(features: np.ndarray) -> tuple[Embedding, np.ndarray]:
    """The first two principal components, by scikit-learn.

    The sign of a component is such that its entry of the largest size is positive.

    Args:
      features: (n, F).

    Returns:
      (embedding, share of the variance in each of the two, (2,)).

    Raises:
      UserError: there are too few examples.
    """
    _check(features)
    from sklearn.decomposition import PCA

    count = min(2, features.shape[1])
    model = PCA(count, svd_solver="full")
    with np.errstate(invalid="ignore"):  # features that are all the same have no variance
        points = model.fit_transform(np.asarray(features, np.float64))
    points = np.pad(points, ((0, 0), (0, 2 - count)))
    shares = np.pad(np.nan_to_num(model.explained_variance_ratio_), (0, 2 - count))
    names = [f"principal component {i + 1} ({100 * s:.1f} % of variance)"
             for i, s in enumerate(shares)]  # fmt: skip
    return Embedding(points, (names[0], names[1])), shares


def tsne(features: np.ndarray, seed: int = 0) -> Embedding:
    """t-SNE (van der Maaten and Hinton 2008) by scikit-learn, from principal components.

    Distances between far groups, and the sizes of groups, mean nothing in it.

    Args:
      features: (n, F).
      seed: the same one gives the same points.

    Raises:
      UserError: there are too few examples.
    """
    _check(features)
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits  # scikit-learn's own

    perplexity = min(30.0, (len(features) - 1) / 3)
    model = TSNE(perplexity=perplexity, init="pca", random_state=seed)
    axes = (f"t-SNE 1 (no unit; perplexity {perplexity:.3g})", "t-SNE 2 (no unit)")
    # Several threads add up in another order each time, and wait for one another on a busy machine.
    with threadpool_limits(1):
        return Embedding(model.fit_transform(np.asarray(features, np.float64)), axes)


def _check(features: np.ndarray) -> None:
    if len(features) < LEAST_EXAMPLES:
        raise UserError(
            f"{len(features)} examples are too few to place in the plane: expected "
            f"{LEAST_EXAMPLES} or more"
        )
