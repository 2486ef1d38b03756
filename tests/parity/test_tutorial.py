"""The tutorial's network, its augmentation and the optimizers equal Keras's and torch's.

The residual networks are in test_families. Installed by the [parity] extra.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import noisy
from parity_helpers import assert_close, keras, torch
from peer_parity import KERAS_NORM, load_keras, named

from experiments.benchmarks.peers import keras_nets, specs
from flax_resnet.data import augment
from flax_resnet.models import MiniModel
from flax_resnet.optim import optimizers

OPTIMIZED = True


@pytest.mark.parametrize("train", [False, True])
def test_mini_model_equals_the_tutorials_keras_network(rng, train):
    ours, theirs = MiniModel(dropout_rate=0.0), keras_nets.build(specs.Mini(dropout=0.0), 32)
    assert sum(np.prod(w.shape) for w in theirs.trainable_weights) == 4_368_714
    x = rng.normal(size=(4, 32, 32, 3)).astype(np.float32)
    variables = noisy(ours, x)
    load_keras(theirs, variables)
    want = theirs(x, training=train)
    got, new = ours.apply(variables, x, train, mutable=["batch_stats"])
    assert_close(got, want)
    for (layer, leaf), value in named({"batch_stats": new["batch_stats"]}).items():
        its = getattr(theirs.get_layer(layer), KERAS_NORM[leaf])
        assert_close(value, its, what=f"{layer} {leaf}")


def test_mini_model_starts_as_keras_starts():
    """Glorot uniform: every kernel fills its own range, every bias is zero."""
    ours = MiniModel().init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    theirs = keras_nets.build(specs.Mini(), 32)
    for (layer, leaf), value in named({"params": ours["params"]}).items():
        its = theirs.get_layer(layer)
        if leaf == "bias":
            assert not value.any()
        elif leaf == "kernel":
            kernel = np.asarray(its.kernel)
            assert np.std(value) == pytest.approx(np.std(kernel), rel=0.05)
            assert np.max(np.abs(value)) == pytest.approx(np.max(np.abs(kernel)), rel=0.05)


@pytest.mark.filterwarnings("ignore:Please import")  # Keras's own use of scipy
def test_rotation_shift_and_flip_equal_the_keras_generator(rng):
    generator = keras.src.legacy.preprocessing.image.ImageDataGenerator(fill_mode="nearest")
    images = rng.normal(size=(16, 32, 32, 3)).astype(np.float32)
    theta = rng.uniform(-10, 10, 16)
    tx, ty = rng.uniform(-5, 5, (2, 16))
    # Keras turns the other way and swaps the axes: its tx, drawn from the height range, moves
    # columns. Over the tutorial's symmetric ranges and square images that is the same distribution.
    angle, rows, columns = (jnp.asarray(x, jnp.float32) for x in (-np.deg2rad(theta), ty, tx))
    got = augment.rotate_and_shift(images, angle, rows, columns)
    for i in range(16):
        transform = {"theta": theta[i], "tx": tx[i], "ty": ty[i], "flip_horizontal": True}
        want = generator.apply_transform(images[i], transform)
        np.testing.assert_allclose(np.asarray(got[i])[:, ::-1], want, atol=1e-4)


def test_adam_equals_keras(rng):
    start = rng.normal(size=(4, 3)).astype(np.float32)
    grads = [rng.normal(size=(4, 3)).astype(np.float32) for _ in range(5)]
    theirs, variable = keras.optimizers.Adam(1e-3), keras.Variable(start)
    tx, _ = optimizers.Adam(learning_rate=1e-3, eps=1e-7).build(10, 5)
    ours, state = {"kernel": jnp.asarray(start)}, tx.init({"kernel": jnp.asarray(start)})
    for grad in grads:
        theirs.apply([jnp.asarray(grad)], [variable])
        updates, state = tx.update({"kernel": grad}, state, ours, value=jnp.float32(0))
        ours = optax.apply_updates(ours, updates)
    assert_close(np.asarray(ours["kernel"]) - start, np.asarray(variable) - start, 1e-3)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_with_decay_equals_torch(rng, nesterov):
    start = rng.normal(size=(4, 3)).astype(np.float32)
    theirs = torch.nn.Parameter(torch.tensor(start))
    sgd = torch.optim.SGD([theirs], 0.1, momentum=0.9, weight_decay=0.01, nesterov=nesterov)
    config = optimizers.SGD(0.1, weight_decay=0.01, momentum=0.9, nesterov=nesterov)
    tx, _ = config.build(10, 5)
    ours, state = {"kernel": jnp.asarray(start)}, tx.init({"kernel": jnp.asarray(start)})
    for _ in range(5):
        grad = rng.normal(size=(4, 3)).astype(np.float32)
        theirs.grad = torch.tensor(grad)
        sgd.step()
        updates, state = tx.update({"kernel": grad}, state, ours, value=jnp.float32(0))
        ours = optax.apply_updates(ours, updates)
    assert_close(ours["kernel"], theirs.detach().numpy())
