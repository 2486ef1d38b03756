"""What several tests share."""

import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from flax_resnet.models import ResNet
from flax_resnet.optim.optimizers import SGD
from flax_resnet.training.step import create_state

QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # for a process that compiles in half the time


def tiny_resnet(**fields):
    """One block of 8 filters: compiles in a second."""
    defaults = {"stage_sizes": (1,), "num_filters": 8, "num_classes": 10, "stem": "cifar"}
    return ResNet(**{**defaults, **fields})


def random_batch(rng, n=16, size=8, channels=3, num_classes=10):
    """A training batch of noise."""
    return {
        "image": rng.integers(0, 256, (n, size, size, channels), dtype=np.uint8),
        "label": rng.integers(0, num_classes, n).astype(np.int32),
    }


def class_folders(root, names, count, size):
    """A folder of ``count`` random RGB PNGs for each class, of ``size`` (H, W); returns root."""
    rng = np.random.default_rng(0)
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:02d}.png")
    return root


UNIT_STATS = {"mean": np.full(3, 0.5, np.float32), "std": np.full(3, 0.25, np.float32)}


def max_difference(a, b):
    """Largest absolute difference between two trees of arrays."""
    gaps = jax.tree.map(lambda x, y: float(np.max(np.abs(np.asarray(x) - np.asarray(y)))), a, b)
    return max(jax.tree.leaves(gaps))


def assert_trees_equal(a, b):
    """Every leaf of two trees is equal to the last bit."""
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def shapes_of(module, shape):
    """Shapes of a module's variables on images of ``shape`` (H, W, C), computing none."""
    images = jnp.zeros((1, *shape))
    return jax.eval_shape(lambda: module.init(jax.random.key(0), images, train=False))


def drawn(module, images):
    """Variables as a start has them, drawn by NumPy: no initialiser has to be compiled."""
    rng = np.random.default_rng(0)

    def draw(path, like):
        if path[-1].key == "kernel":
            fan_in, fan_out = like.size / like.shape[-1], like.size / like.shape[-2]
            variance = 1 / fan_in if like.ndim == 2 else 2 / fan_out
            return rng.normal(0, np.sqrt(variance), like.shape).astype(like.dtype)
        return np.full(like.shape, path[-1].key in ("scale", "var"), like.dtype)

    shapes = jax.eval_shape(module.init, jax.random.key(0), images)
    return jax.tree_util.tree_map_with_path(draw, shapes)


def noisy(module, images):
    """Variables of a network that has trained: no offset is 0, no scale or variance is 1."""
    rng = np.random.default_rng(0)

    def change(path, x):
        if path[-1].key in ("var", "scale"):
            return np.asarray(x * rng.uniform(0.5, 1.5, x.shape), np.float32)
        return np.asarray(x + 0.1 * rng.normal(size=x.shape), np.float32)

    return jax.tree_util.tree_map_with_path(change, drawn(module, images))


def count_parameters(module, shape):
    """Parameters of a module on images of ``shape`` (H, W, C), without computing any."""
    return sum(x.size for x in jax.tree.leaves(shapes_of(module, shape)["params"]))


def assert_one_line_error(result, message):
    """(exit status, stdout, stderr) of a command that was given bad input."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def line_of_bad_input(main, argv, capfd):
    """The one line that a command's ``main`` ends with where its flags are wrong."""
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    return error


def make_state(model=None, ema=False, **optimizer):
    """A training state of a network on 8x8 images, by default tiny_resnet()."""
    model = model or tiny_resnet()
    tx, _ = SGD(**{"learning_rate": 0.1, "weight_decay": 1e-3, **optimizer}).build(100, 10)
    init = lambda key, images: jax.tree.map(jnp.array, drawn(model, images))  # noqa: E731
    return create_state(model, tx, 0, (8, 8, 3), UNIT_STATS, ema=ema, init=init)


def device_bytes(tree):
    """Bytes of a tree's arrays on one device: of what is split, a part."""
    shards = ((x.sharding.shard_shape(x.shape), x.dtype) for x in jax.tree.leaves(tree))
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shards)


def speed_gradients(rng, steps):
    like = {
        "stem_conv": {"bias": (3,)},
        "stage1_block1": {"conv1": {"kernel": (3, 3, 2, 4)}, "norm1": {"bias": (4,)}},
        "head": {"kernel": (4, 2)},
    }

    def tree():
        is_shape = lambda n: isinstance(n, tuple)  # noqa: E731
        return jax.tree.map(lambda n: rng.normal(size=n), like, is_leaf=is_shape)

    return tree(), [tree() for _ in range(steps)]


def wait_for(condition):
    """Until it holds, for three minutes at most."""
    until = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)
