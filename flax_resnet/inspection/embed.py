"""Features in the plane: principal components, t-SNE."""

from __future__ import annotations

import numpy as np

from flax_resnet.errors import UserError

LEAST_EXAMPLES = 5
Embedding = tuple[np.ndarray, tuple[str, str]]
"""(points (n, 2), what the two axes are)."""


def pca(features: np.ndarray) -> Embedding:
    """The first two principal components, by scikit-learn.

    The sign of a component is such that its entry of the largest size is positive.

    Args:
      features: (n, F), F of 2 or more.

    Raises:
      UserError: there are too few examples.
    """
    from sklearn.decomposition import PCA

    model = PCA(2, svd_solver="full")
    points = model.fit_transform(_checked(features))
    one, two = (f"{100 * share:.1f} % of variance" for share in model.explained_variance_ratio_)
    return points, (f"principal component 1 ({one})", f"principal component 2 ({two})")


def tsne(features: np.ndarray, seed: int = 0) -> Embedding:
    """t-SNE (van der Maaten and Hinton 2008) by scikit-learn, from principal components.

    Distances between far groups, and the sizes of groups, mean nothing in it.

    Args:
      features: (n, F).
      seed: the same one gives the same points.

    Raises:
      UserError: there are too few examples.
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits  # scikit-learn's own

    perplexity = min(30.0, (len(features) - 1) / 3)
    model = TSNE(perplexity=perplexity, init="pca", random_state=seed)
    # Several threads add up in another order each time, and wait for one another on a busy machine.
    with threadpool_limits(1):
        points = model.fit_transform(_checked(features))
    return points, (f"t-SNE 1 (no unit; perplexity {perplexity:.3g})", "t-SNE 2 (no unit)")


def _checked(features: np.ndarray) -> np.ndarray:
    if len(features) < LEAST_EXAMPLES:
        raise UserError(
            f"{len(features)} examples are too few to place in the plane: expected "
            f"{LEAST_EXAMPLES} or more"
        )
    return np.asarray(features, np.float64)
