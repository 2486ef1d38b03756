"""Keras's transfer-learning form: what Keras saves of a ResNet inside a model is read, or named."""

import contextlib

import numpy as np
import pytest
from parity_helpers import assert_close, keras

from flax_resnet.errors import Note, UserError
from flax_resnet.weights.reading import open_file

L = keras.layers
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def trunk(version, **options):
    """A network of keras.applications with one block in each of two stages (V2: two)."""
    from keras.src.applications import resnet

    stack = getattr(resnet, f"stack_residual_blocks_v{version}")

    def stages(x):
        x = stack(x, 64, version, name="conv2", **({"stride1": 1} if version == 1 else {}))
        return stack(x, 128, version, **({"stride1": 1} if version == 2 else {}), name="conv3")

    net = resnet.ResNet(stages, version == 2, True, weights=None, weights_name="own",
                        include_top=False, input_shape=(32, 32, 3), name="resnet50",
                        **options)  # fmt: skip
    rng = np.random.default_rng(0)
    for weight in net.weights:
        mean = 1 if "gamma" in weight.path or "var" in weight.path else 0
        weight.assign(rng.normal(mean, 0.05, weight.shape).astype(np.float32))
    return net


def chained(inputs, x, *layers):
    for layer in layers:
        x = layer(x)
    return keras.Model(inputs, x)


def functional(base, *layers, before=()):
    x, drop = keras.Input((32, 32, 3)), L.Dropout(0.2)
    return chained(x, x, *before, base, L.GlobalAveragePooling2D(), drop, *layers)


def flat(base, *layers):
    return chained(base.input, base.output, L.GlobalAveragePooling2D(), *layers)


def sequential(base, *layers):
    grow = keras.Sequential([L.RandomFlip("horizontal")])
    return keras.Sequential([keras.Input((32, 32, 3)), grow, base, L.GlobalAveragePooling2D(),
                             keras.Sequential([*layers])])  # fmt: skip


@pytest.mark.parametrize("ending", [".keras", ".h5", ".weights.h5"])
@pytest.mark.parametrize(
    ("make", "version", "hidden"),
    [(functional, 1, ()), (functional, 2, (8,)), (sequential, 1, (512, 16)), (flat, 1, (8,))],
)
def test_a_resnet_inside_a_model(tmp_path, rng, make, version, hidden, ending):
    dense = [L.Dense(width, activation="relu") for width in hidden]
    model = make(trunk(version), *dense, L.Dense(3))
    path = tmp_path / f"net{ending}"
    (model.save_weights if ending == ".weights.h5" else model.save)(path)
    assumes = hidden != () and ending != ".keras"
    with pytest.warns(Note, match="ReLU between") if assumes else contextlib.nullcontext():
        opened = open_file(path)
    assert (opened.module.num_classes, opened.module.hidden_units) == (3, hidden)
    x = rng.normal(size=(2, 32, 32, 3)).astype(np.float32)
    assert_close(opened.module.apply(opened.variables, x), model.predict(x, verbose=0))
    assert opened.assumed.startswith("keras.applications.resnet")
    assert opened.preprocessing.size == (32 if ending == ".keras" else 224)


def test_a_model_that_rescales_says_how_images_are_prepared(tmp_path):
    base = trunk(2)
    model = functional(base, L.Dense(1, activation="sigmoid"),
                       before=[L.Rescaling(1 / 127.5, offset=-1)])  # fmt: skip
    model.save(tmp_path / "net.keras")
    with pytest.warns(Note, match="sigmoid is left out"):
        opened = open_file(tmp_path / "net.keras")
    for name, value in opened.preprocessing.statistics().items():
        np.testing.assert_allclose(value, 0.5, rtol=1e-6, err_msg=name)
    assert opened.assumed == ""


OTHERS = {
    "tanh": (lambda: functional(trunk(1), L.Dense(8, activation="tanh"), L.Dense(3)),
             "(Dense)", "ReLU"),
    "linear": (lambda: functional(trunk(1), L.Dense(8), L.Dense(3)), "without ReLU", "Dense"),
    "maximum": (lambda: keras.Sequential([trunk(1, pooling="max"), L.Dense(3)]),
                "(GlobalMaxPooling2D)", "save the ResNet alone"),
    "no names": (lambda: keras.Sequential([keras.Input((32, 32, 3)), L.Conv2D(8, 3), L.Conv2D(8, 3),
                                           L.GlobalAveragePooling2D(), L.Dense(3)]),
                 "no layer conv2_block1_1_conv", "get_layer"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_that_computes_more_is_refused_by_its_layers(tmp_path, name):
    make, *words = OTHERS[name]
    make().save(tmp_path / "net.keras")
    with pytest.raises(UserError) as caught:
        open_file(tmp_path / "net.keras")
    for word in (str(tmp_path / "net.keras"), *words):
        assert word in str(caught.value)


def test_what_is_not_a_chain_of_dense_layers_is_named(tmp_path):
    x = trunk(1)
    y = L.GlobalAveragePooling2D()(x.output)
    keras.Model(x.input, [L.Dense(3)(y), L.Dense(4)(y)]).save(tmp_path / "net.h5")
    with pytest.raises(UserError, match=r"net.h5.*unexpected \(.*dense"):
        open_file(tmp_path / "net.h5")
