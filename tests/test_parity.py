"""The tutorial's network, its images and two optimizers are those of Keras and torch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from parity_helpers import assert_close, keras, torch

from experiments.benchmarks.peer_nets import keras_nets, specs
from flax_resnet import augment, optim
from flax_resnet.models import MiniModel

OPTIMIZED = True


def randomized(variables, rng):
    """Random parameters near their initial scale, and statistics of their own."""

    def draw(path, x):
        name = path[-1].key
        noise = rng.normal(size=x.shape)
        if name in ("scale", "var"):
            return np.exp(0.3 * noise).astype(np.float32)
        return np.asarray(x + 0.1 * noise, np.float32)

    return jax.tree_util.tree_map_with_path(draw, variables)


# --- the CIFAR-10 tutorial in Keras -----------------------------------------------------------


def keras_mini():
    """The tutorial's layers, its dropout left out."""
    return keras_nets.build(specs.Mini(dropout=0), 32)


KERAS_ORDER = {
    "conv": [("params", "kernel"), ("params", "bias")],
    "norm": [
        ("params", "scale"),
        ("params", "bias"),
        ("batch_stats", "mean"),
        ("batch_stats", "var"),
    ],
}


def keras_weights(layer, variables):
    """Our variables of the same name, in the order of a Keras layer's weights."""
    order = KERAS_ORDER["norm" if "norm" in layer.name else "conv"]
    values = []
    for collection, leaf in order:
        node = variables[collection]
        for part in layer.name.split("."):
            node = node[part]
        values.append(np.asarray(node[leaf]))
    return values


def load_keras(model, variables):
    for layer in model.layers:
        if layer.weights:
            for theirs, ours in zip(layer.weights, keras_weights(layer, variables), strict=True):
                theirs.assign(ours)


def weights_of(layer):
    return [keras.ops.convert_to_numpy(w.value) for w in layer.weights]


@pytest.mark.parametrize("train", [False, True])
def test_mini_model_equals_the_tutorials_keras_network(rng, train):
    ours, theirs = MiniModel(dropout_rate=0.0), keras_mini()
    assert sum(np.prod(w.shape) for w in theirs.trainable_weights) == 4_368_714
    default = keras.layers.BatchNormalization()
    assert (default.momentum, default.epsilon) == (specs.KERAS.momentum, specs.KERAS.epsilon)
    x = rng.normal(size=(4, 32, 32, 3)).astype(np.float32)
    variables = randomized(ours.init(jax.random.key(0), x), rng)
    load_keras(theirs, variables)
    want = theirs(x, training=train)
    got, new = ours.apply(variables, x, train, mutable=["batch_stats"])
    assert_close(got, want)
    for layer in theirs.layers:
        if "norm" in layer.name:
            updated = {**variables, "batch_stats": new["batch_stats"]}
            for mine, its in zip(keras_weights(layer, updated), weights_of(layer), strict=True):
                assert_close(mine, its)


def test_mini_model_starts_as_keras_starts():
    """Glorot uniform: every kernel fills its own range, every bias is zero."""
    params = MiniModel().init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    theirs = keras_mini()
    for layer in theirs.layers:
        if not layer.weights or "norm" in layer.name:
            continue
        node = params
        for part in layer.name.split("."):
            node = node[part]
        kernel, bias = weights_of(layer)
        assert not bias.any()
        assert not np.asarray(node["bias"]).any()
        assert np.std(node["kernel"]) == pytest.approx(np.std(kernel), rel=0.05)
        assert np.max(np.abs(node["kernel"])) == pytest.approx(np.max(np.abs(kernel)), rel=0.05)


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
    tx, _ = optim.Adam(learning_rate=1e-3, eps=1e-7).build(10, 5)
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
    config = optim.SGD(0.1, weight_decay=0.01, momentum=0.9, nesterov=nesterov)
    tx, _ = config.build(10, 5)
    ours, state = {"kernel": jnp.asarray(start)}, tx.init({"kernel": jnp.asarray(start)})
    for _ in range(5):
        grad = rng.normal(size=(4, 3)).astype(np.float32)
        theirs.grad = torch.tensor(grad)
        sgd.step()
        updates, state = tx.update({"kernel": grad}, state, ours, value=jnp.float32(0))
        ours = optax.apply_updates(ours, updates)
    assert_close(ours["kernel"], theirs.detach().numpy())
