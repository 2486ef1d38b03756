"""Equality with Keras and torch, block by block; installed by the [parity] extra."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from parity_helpers import assert_close, channels_first, keras, torch, torch_layout

from flax_resnet import augment, optim
from flax_resnet.models import BasicBlock, MiniModel, ResidualUnit, cifar_resnet

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


def keras_unit(x, filters, pool, name):
    layers, shortcut = keras.layers, x
    if pool:
        x = layers.MaxPooling2D((2, 2))(x)
        shortcut = layers.Conv2D(filters, 1, strides=2, padding="same", name=f"{name}.shortcut")(
            shortcut
        )
    for i in (1, 2):
        x = layers.BatchNormalization(name=f"{name}.norm{i}")(x)
        x = layers.Conv2D(filters, 3, padding="same", name=f"{name}.conv{i}")(
            layers.Activation("relu")(x)
        )
    return layers.add([x, shortcut])


def keras_mini(size, stage_sizes=(3, 3, 3, 3)):
    """The tutorial's layers, its dropout left out."""
    layers = keras.layers
    images = keras.Input((size, size, 3))
    x = layers.Conv2D(32, 3, padding="same", name="stem_conv")(images)
    for stage, units in enumerate(stage_sizes):
        for unit in range(units):
            name = f"stage{stage + 1}_unit{unit + 1}"
            x = keras_unit(x, 32 * 2**stage, stage > 0 and unit == 0, name)
    x = layers.Activation("relu")(layers.BatchNormalization(name="final_norm")(x))
    x = layers.AveragePooling2D(size // 2 ** (len(stage_sizes) - 1))(x)
    x = layers.Dense(10, name="head")(layers.Flatten()(x))
    return keras.Model(images, x)


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
    ours, theirs = MiniModel(dropout_rate=0.0), keras_mini(32)
    assert sum(np.prod(w.shape) for w in theirs.trainable_weights) == 4_368_714
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


@pytest.mark.parametrize("pool", [False, True])
def test_residual_unit_equals_keras(rng, pool):
    x = rng.normal(size=(4, 9, 8, 16)).astype(np.float32)[:, : 8 if pool else 9]
    ours = ResidualUnit(16, pool=pool)
    variables = randomized(ours.init(jax.random.key(0), x), rng)
    images = keras.Input(x.shape[1:])
    theirs = keras.Model(images, keras_unit(images, 16, pool, "unit"))
    load_keras(theirs, jax.tree.map(lambda x: x, {k: {"unit": v} for k, v in variables.items()}))
    got, _ = ours.apply(variables, x, True, mutable=["batch_stats"])
    assert_close(got, theirs(x, training=True))


def test_mini_model_starts_as_keras_starts():
    """Glorot uniform: every kernel fills its own range, every bias is zero."""
    params = MiniModel().init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    theirs = keras_mini(32)
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


# --- He et al.'s CIFAR network in torch -------------------------------------------------------


class TorchBlock(torch.nn.Module):
    """Two 3x3 convolutions; shortcut A (subsample, pad with zeros) or B (project)."""

    def __init__(self, inputs, filters, stride, shortcut):
        super().__init__()
        nn = torch.nn
        self.conv1 = nn.Conv2d(inputs, filters, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(filters)
        self.stride, self.missing = stride, filters - inputs
        if shortcut == "B" and (stride != 1 or self.missing):
            self.shortcut_conv = nn.Conv2d(inputs, filters, 1, stride, bias=False)
            self.shortcut_norm = nn.BatchNorm2d(filters)

    def forward(self, x):
        h = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        if hasattr(self, "shortcut_conv"):
            x = self.shortcut_norm(self.shortcut_conv(x))
        elif self.stride != 1 or self.missing:
            x = x[:, :, :: self.stride, :: self.stride]
            half = self.missing // 2
            x = torch.nn.functional.pad(x, (0, 0, 0, 0, half, self.missing - half))
        return torch.relu(h + x)


class TorchResNet(torch.nn.Module):
    """ResNet-20, 32, ... for CIFAR."""

    def __init__(self, n, shortcut):
        super().__init__()
        nn = torch.nn
        self.stem_conv = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.stem_norm = nn.BatchNorm2d(16)
        inputs = 16
        for stage in range(3):
            for block in range(n):
                filters, stride = 16 * 2**stage, 2 if stage and not block else 1
                name = f"stage{stage + 1}_block{block + 1}"
                self.add_module(name, TorchBlock(inputs, filters, stride, shortcut))
                inputs = filters
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        x = torch.relu(self.stem_norm(self.stem_conv(x)))
        for name, module in self.named_children():
            if name.startswith("stage"):
                x = module(x)
        return self.head(x.mean((2, 3)))


def torch_names(variables):
    """{torch parameter name: value in torch's layout} of our variables."""
    named = {}
    for path, value in jax.tree_util.tree_leaves_with_path(variables):
        *modules, leaf = [part.key for part in path[1:]]
        leaf, value = torch_layout(leaf, value)
        named[".".join([*modules, leaf])] = value
    return named


def load_torch(module, variables):
    state = {k: torch.tensor(v) for k, v in torch_names(variables).items()}
    missing = module.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert all("num_batches_tracked" in name for name in missing.missing_keys)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_cifar_resnet_20_equals_torch(rng, shortcut, train):
    ours, theirs = cifar_resnet(20, shortcut=shortcut), TorchResNet(3, shortcut).train(train)
    assert sum(p.numel() for p in theirs.parameters()) == {"A": 269_722, "B": 272_474}[shortcut]
    x = rng.normal(size=(8, 32, 32, 3)).astype(np.float32)
    variables = randomized(ours.init(jax.random.key(0), x), rng)
    load_torch(theirs, variables)
    with torch.no_grad():
        want = theirs(channels_first(x)).numpy()
    got, new = ours.apply(variables, x, train, mutable=["batch_stats"])
    assert_close(got, want)
    state = theirs.state_dict()
    for name, value in torch_names({"batch_stats": new["batch_stats"]}).items():
        # torch's running variance is of the sample (n - 1); ours and Keras's of the population.
        before = np.asarray(torch_names(variables)[name])
        its = state[name].numpy()
        if train and name.endswith("running_var"):
            n = 8 * (32 // 2 ** max(0, int(name[5]) - 1 if name.startswith("stage") else 0)) ** 2
            its = before * 0.9 + (its - 0.9 * before) * (n - 1) / n
        assert_close(value, its)


@pytest.mark.parametrize(("strides", "filters"), [(1, 8), (2, 16)])
@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_basic_block_equals_torch_forward_and_backward(rng, strides, filters, shortcut):
    x = rng.normal(size=(4, 8, 8, 8)).astype(np.float32)
    ours = BasicBlock(filters, strides, shortcut=shortcut)
    theirs = TorchBlock(8, filters, strides, shortcut)
    variables = randomized(ours.init(jax.random.key(0), x), rng)
    load_torch(theirs, variables)
    out = theirs(channels_first(x))
    weight = rng.normal(size=out.shape).astype(np.float32)
    (out * torch.tensor(weight)).sum().backward()

    def loss(params):
        y, _ = ours.apply({**variables, "params": params}, x, True, mutable=["batch_stats"])
        return (y * weight.transpose(0, 2, 3, 1)).sum()

    value, grads = jax.value_and_grad(loss)(variables["params"])
    assert_close(value, (out * torch.tensor(weight)).sum().item())
    theirs_grads = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    for name, grad in torch_names({"params": grads}).items():
        assert_close(grad, theirs_grads[name])


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
