"""What tests of the networks share."""

import jax
import numpy as np

KEY = jax.random.key(0)


def images(rng, n=4, size=8, channels=3):
    return rng.normal(size=(n, size, size, channels)).astype(np.float32)


def run(module, variables, x, train=False, **kwargs):
    """(output, new statistics)."""
    out, new = module.apply(variables, x, train, mutable=["batch_stats"], **kwargs)
    return out, new.get("batch_stats", {})
