"""The speed runs' network: its stem whitens, its parts are those of the paper, it stays frozen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_equal, count_parameters, drawn
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from experiments import cifar10_speedrun
from experiments.speedrun import SpeedNet, SpeedStage, Whitening, whitening_kernel
from flax_resnet.data.config import DataConfig
from flax_resnet.models import trainable
from flax_resnet.training.config import TrainConfig
from flax_resnet.training.setup import set_up
from flax_resnet.weights import read_weights, write_weights

TINY = SpeedNet(num_classes=2, stage_filters=(8, 8))


def correlated(rng, n=64, size=8):
    """Images whose channels and neighbours go together, of mean zero."""
    noise = rng.normal(size=(n, size + 2, size + 2, 3)) @ rng.normal(size=(3, 3))
    smooth = sum(noise[:, i : i + size, j : j + size] for i in range(3) for j in range(3))
    return (smooth - smooth.mean((0, 1, 2))).astype(np.float32)


def test_the_stem_whitens_what_it_is_made_from(rng):
    images = correlated(rng)
    kernel = whitening_kernel(images, epsilon=0.0)
    stem = Whitening()
    out = stem.apply({"params": {"kernel": kernel, "bias": np.zeros(24, np.float32)}}, images)
    assert out.shape == (64, 7, 7, 24)
    answers = np.asarray(out, np.float64).reshape(-1, 24)
    np.testing.assert_allclose(answers.T[:12] @ answers[:, :12] / len(answers), np.eye(12),
                               atol=2e-3)  # fmt: skip
    np.testing.assert_allclose(answers[:, 12:], -answers[:, :12], atol=1e-6)
    before = np.stack([images[:, i : i + 7, j : j + 7] for i in (0, 1) for j in (0, 1)], -1)
    assert np.abs(np.corrcoef(before.reshape(-1, 12).T) - np.eye(12)).max() > 0.5


def test_the_filters_are_numpys_and_their_epsilon_holds_back_what_hardly_varies(rng):
    images = correlated(rng, 300)  # more than are summed at a time
    patches = np.stack(
        [images[n, i : i + 2, j : j + 2].ravel() for n in range(300) for i in range(7)
         for j in range(7)]
    ).astype(np.float64)  # fmt: skip
    values, vectors = np.linalg.eigh(patches.T @ patches / len(patches))
    kernel = whitening_kernel(images, epsilon=0.5).reshape(12, 24)
    lengths = np.linalg.norm(kernel[:, :12], axis=0)
    np.testing.assert_allclose(lengths, 1 / np.sqrt(values[::-1] + 0.5), rtol=1e-4)
    along = np.abs(np.sum(kernel[:, :12] * vectors[:, ::-1], 0)) / lengths
    np.testing.assert_allclose(along, 1, atol=1e-3)


@pytest.mark.parametrize(
    ("target", "total"),
    [
        # 312 + 9 (24 64 + 64 64) + 128 + 9 (64 256 + 256 256) + 512 + 9 (2 256 256) + 512 + 2560
        (94, 1_971_640),
        # 312 + 175,104 + 256 + 1,769,472 + 768 + 2,654,208 + 768 + 3840
        (95, 4_604_728),
        # 312 + 322,560 + 384 + 3,096,576 + 1152 + 6,488,064 + 1536 + 5120
        (96, 9_915_704),
    ],
)
def test_parameters_of_the_three_networks(target, total):
    assert count_parameters(cifar10_speedrun.get_config(target).model, (32, 32, 3)) == total


def test_a_stage_starts_as_a_pool_of_its_input(rng):
    x = rng.uniform(size=(2, 5, 5, 4)).astype(np.float32)
    layers = dataclasses.replace(TINY.layers, norm_kind="none")
    variables = jax.jit(SpeedStage(6, layers=layers).init)(jax.random.key(0), x)
    kernel = np.asarray(variables["params"]["conv1"]["kernel"])
    np.testing.assert_array_equal(kernel[1, 1, :, :4], np.eye(4))
    assert np.count_nonzero(kernel[..., :4]) == 4
    drawn_ones = kernel[..., 4:]
    assert 0.5 < np.abs(drawn_ones).max() * 6 <= 1  # torch's bound, 1 / sqrt(9 * 4)
    out = jax.jit(SpeedStage(6, layers=layers).apply)(variables, x)
    pooled = np.max([x[:, i : i + 4 : 2, j : j + 4 : 2] for i in (0, 1) for j in (0, 1)], 0)
    want = jax.nn.gelu(jax.nn.gelu(pooled, approximate=False), approximate=False)
    np.testing.assert_allclose(out[..., :4], want, atol=1e-6)
    added = jax.jit(SpeedStage(6, 2, True, layers).apply)(variables, x)
    first = jax.nn.gelu(pooled, approximate=False)
    np.testing.assert_allclose(
        added[..., :4], jax.nn.gelu(first + first, approximate=False), atol=1e-6
    )


def test_the_whitening_kernel_alone_is_frozen(rng):
    images = correlated(rng, 4)
    variables = drawn(TINY, images)

    def loss(params):
        return jnp.sum(TINY.apply({**variables, "params": params}, images) ** 2)

    grads = jax.jit(jax.grad(loss))(variables["params"])
    assert not np.any(grads["stem_conv"]["kernel"])
    assert np.any(grads["stem_conv"]["bias"])
    trains = trainable(TINY, variables["params"])
    assert jax.tree.leaves(trains).count(False) == 1
    assert trains["stem_conv"] == {"kernel": False, "bias": True}
    free = TINY.clone(whiten=False)
    assert all(jax.tree.leaves(trainable(free, variables["params"])))
    assert free.from_images(variables["params"], images) == variables["params"]


def test_weight_files_are_read_by_the_networks_name_of_today_and_of_before(rng, tmp_path):
    variables = drawn(TINY, correlated(rng, 1))
    write_weights(tmp_path / "new.safetensors", TINY, variables, input_shape=(8, 8, 3))
    with safe_open(tmp_path / "new.safetensors", "numpy") as file:
        about = {name: text.replace("experiments.speedrun", "flax_resnet.models.speed")
                 for name, text in file.metadata().items()}  # fmt: skip
    tensors = load_file(tmp_path / "new.safetensors")
    save_file(tensors, tmp_path / "old.safetensors", about)
    for name in ("new", "old"):
        module, read = read_weights(tmp_path / f"{name}.safetensors")
        assert module == TINY
        assert_trees_equal(read, variables)


def test_a_run_starts_from_its_training_images(image_folder, tmp_path, mesh):
    config = TrainConfig(
        model=TINY, data=DataConfig(folder=str(image_folder)), ema_decay=0.9,
        batch_size=8, eval_batch_size=8, num_steps=2,
    )  # fmt: skip
    run = set_up(config, tmp_path / "w", mesh)
    images = np.concatenate(list(run.data.train_images())) / np.float32(255)
    stats = jax.device_get(run.state.normalization)
    want = whitening_kernel((images - stats["mean"]) / stats["std"])
    kernel = run.state.params["stem_conv"]["kernel"]
    np.testing.assert_allclose(kernel, want, rtol=1e-3, atol=1e-4)
    assert_trees_equal(run.state.ema["params"], run.state.params)
    plain = set_up(
        dataclasses.replace(config, model=TINY.clone(whiten=False)), tmp_path / "p", mesh
    )
    stage = lambda run: run.state.params["stage1_block1"]  # noqa: E731
    assert_trees_equal(stage(run), stage(plain))
