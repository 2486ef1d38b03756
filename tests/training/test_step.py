import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from helpers import (
    UNIT_STATS,
    assert_trees_equal,
    make_state,
    max_difference,
    random_batch,
    tiny_resnet,
)

from flax_resnet.data.augment import Augment
from flax_resnet.data.normalization import normalize
from flax_resnet.distributed import sharding
from flax_resnet.models import cifar_resnet
from flax_resnet.optim.optimizers import SGD
from flax_resnet.training import metrics
from flax_resnet.training.step import (
    create_state,
    eval_step,
    main_label,
    soft_targets,
    train_step,
)

OPTIMIZED = True  # one device against eight, and more, as programs run
SHAPE = (8, 8, 3)
FULL = Augment(rotation=10, width_shift=0.1, flip=True, pad_crop=1, cutout=2, mixup=0.5)


class Linear(nn.Module):
    """No norms, no dropout: the gradient of a batch is the mean over its parts."""

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(10)(nn.tanh(nn.Dense(7)(x.reshape(len(x), -1))))


def run_on_mesh(mesh, steps, model, batches, **kwargs):
    """Steps as the loop compiles them: sharded batch, replicated and donated state."""
    whole = sharding.replicated(mesh)
    step = jax.jit(functools.partial(train_step, **kwargs), donate_argnums=0, out_shardings=whole)
    state = sharding.put_replicated(mesh, make_state(model))
    for batch in batches[:steps]:
        state, _ = step(state, sharding.put_batch(mesh, batch))
    return jax.device_get((state.params, state.batch_stats))


@pytest.mark.parametrize("accum_steps", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_one_device_and_eight_agree_to_1e_10_in_x64_after_5_steps(meshes, rng, accum_steps):
    batches = [random_batch(rng, 32) for _ in range(5)]
    with jax.enable_x64(True):
        model = tiny_resnet(stage_sizes=(1, 1), dtype="float64", param_dtype="float64")
        runs = [
            run_on_mesh(mesh, 5, model, batches, augment=FULL, accum_steps=accum_steps)
            for mesh in meshes
        ]
        start = make_state(model)
    assert {x.dtype for x in jax.tree.leaves(runs[0])} == {np.dtype("float64")}
    assert max_difference(*runs) < 1e-10
    assert max_difference(runs[0][0], start.params) > 1e-2


@pytest.mark.slow
def test_pmap_of_the_same_step_equals_jit(meshes, rng):
    batches = [random_batch(rng, 32) for _ in range(3)]
    with jax.enable_x64(True):
        model = tiny_resnet(dtype="float64", param_dtype="float64")
        want = run_on_mesh(meshes[1], 3, model, batches)
        state = make_state(model.clone(axis_name="batch"))
        step = jax.pmap(functools.partial(train_step, axis_name="batch"), axis_name="batch")
        state = jax.tree.map(lambda x: jnp.stack([x] * 8), state)
        for batch in batches:
            parts = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), batch)
            state, sums = step(state, parts)
        got = jax.device_get(jax.tree.map(lambda x: x[3], (state.params, state.batch_stats)))
        assert np.asarray(sums["count"]).tolist() == [32] * 8
    assert max_difference(got, want) < 1e-10


@pytest.mark.slow
def test_pmapped_replicas_draw_different_augmentations(rng):
    batch = random_batch(rng, 2)
    state = make_state(Linear())
    step = functools.partial(train_step, axis_name="batch", augment=Augment(cutout=4))
    twice = jax.tree.map(lambda x: jnp.stack([x] * 2), (state, batch))
    _, sums = jax.pmap(step, axis_name="batch")(*twice)
    alone = jax.jit(jax.vmap(functools.partial(train_step, augment=Augment(cutout=4))))(*twice)[1]
    assert float(sums["loss"][0]) != pytest.approx(2 * float(alone["loss"][0]), rel=1e-4)


def test_accumulated_gradients_equal_the_whole_batch_without_norms(rng):
    batch = random_batch(rng, 24)
    with jax.enable_x64(True):
        state = make_state(Linear(), max_grad_norm=0.1)
        whole, sums = jax.jit(functools.partial(train_step, augment=FULL))(state, batch)
        step = functools.partial(train_step, augment=FULL, accum_steps=3)
        parts, part_sums = jax.jit(step)(state, batch)
        assert max_difference(whole.params, parts.params) < 1e-7
        assert max_difference(sums, part_sums) < 1e-4


@pytest.mark.slow
def test_accumulation_runs_the_norms_part_by_part(rng):
    batch = random_batch(rng, 12)
    state = make_state()
    got, _ = jax.jit(functools.partial(train_step, accum_steps=3))(state, batch)
    stats, grads = state.batch_stats, []
    for i in range(3):
        part = jax.tree.map(lambda x, i=i: x[i::3], batch)

        def loss(params, part=part, stats=stats):
            logits, new = state.apply_fn(
                {"params": params, "batch_stats": stats},
                normalize(part["image"], UNIT_STATS), train=True, mutable=["batch_stats"],
            )  # fmt: skip
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, part["label"])
            return losses.mean(), new["batch_stats"]

        grad, stats = jax.grad(loss, has_aux=True)(state.params)
        grads.append(grad)
    mean = jax.tree.map(lambda *g: sum(g) / 3, *grads)
    updates, _ = state.tx.update(mean, state.opt_state, state.params)
    assert max_difference(got.batch_stats, stats) < 1e-5
    assert max_difference(got.params, optax.apply_updates(state.params, updates)) < 1e-5


def test_randomness_follows_key_and_step_only(rng):
    batch = random_batch(rng, 16)
    step = jax.jit(functools.partial(train_step, augment=FULL))
    state = make_state()
    assert_trees_equal(step(state, batch)[0].params, step(state, batch)[0].params)
    later = step(state.replace(step=jnp.int32(1)), batch)[0].params
    other_key = step(state.replace(key=state.key + 1), batch)[0].params
    for changed in (later, other_key):
        assert max_difference(step(state, batch)[0].params, changed) > 1e-4


def test_ema_follows_its_recurrence(rng):
    batches = [random_batch(rng, 8) for _ in range(4)]
    step = jax.jit(functools.partial(train_step, ema_decay=0.3))
    state = make_state(ema=True)
    want = {"params": state.params, "batch_stats": state.batch_stats}
    for t, batch in enumerate(batches):
        state, _ = step(state, batch)
        keep = min(0.3, (2 + t) / (11 + t))
        now = {"params": state.params, "batch_stats": state.batch_stats}
        want = jax.tree.map(lambda e, c, k=keep: k * e + (1 - k) * c, want, now)
    assert max_difference(state.ema, want) < 1e-6
    assert max_difference(state.ema["params"], state.params) > 1e-3
    batch = {**batches[0], "mask": np.ones(8, bool)}
    averaged = state.replace(params=state.ema["params"], batch_stats=state.ema["batch_stats"])
    assert_trees_equal(eval_step(state, batch), eval_step(averaged.replace(ema=None), batch))


@pytest.mark.parametrize(
    ("threshold", "shares"),
    [
        (None, [[0.25, 0, 0.75, 0], [0, 1, 0, 0], [0.9, 0, 0.1, 0]]),
        (0.2, [[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0]]),  # both labels of a mixed image count
    ],
)
def test_soft_targets_mix_and_smooth(threshold, shares):
    label = jnp.array([0, 1, 0])
    mixed = {"label": label, "label_mixed": jnp.array([2, 1, 2]),
             "mix": jnp.array([0.25, 0.25, 0.9])}  # fmt: skip
    got = soft_targets(mixed, 4, 0.2, threshold)
    np.testing.assert_allclose(got, 0.8 * np.array(shares) + 0.05, rtol=1e-5)
    assert main_label(mixed).tolist() == [2, 1, 0]
    assert main_label({"label": label}).tolist() == [0, 1, 0]


@pytest.mark.slow
def test_threshold_and_randaugment_reach_the_step(rng):
    batch, state = random_batch(rng, 8), make_state(Linear())
    augment = Augment(randaugment_ops=1, randaugment_probability=1.0, mixup=1.0)
    step = functools.partial(train_step, loss=metrics.binary_cross_entropy, target_threshold=0.0)
    _, sums = jax.jit(functools.partial(step, augment=augment))(state, batch)

    @jax.jit
    def expected(key):
        key, _ = jax.random.split(jax.random.fold_in(key, 0))
        pixels = augment.pixels(key, batch["image"], state.normalization)
        images = normalize(pixels, state.normalization)
        mixed = Augment(mixup=1.0)(key, {**batch, "image": images})["image"]
        logits = Linear().apply({"params": state.params}, mixed)
        both = sum(jax.nn.one_hot(label, 10) for label in (batch["label"], batch["label"][::-1]))
        losses = optax.sigmoid_binary_cross_entropy(logits, jnp.minimum(both, 1))
        return losses.mean(-1).sum(), (pixels != batch["image"]).any((1, 2, 3)).mean()

    want, changed = expected(jax.random.wrap_key_data(state.key))
    assert changed > 0.8
    assert float(sums["loss"]) == pytest.approx(float(want), rel=1e-5)


def test_bfloat16_step_keeps_float32_state_and_follows_float32(rng):
    batch = random_batch(rng, 32)
    full, full_sums = jax.jit(train_step)(make_state(), batch)
    half, half_sums = jax.jit(train_step)(make_state(tiny_resnet(dtype="bfloat16")), batch)
    dtypes = {x.dtype for x in jax.tree.leaves((half.params, half.batch_stats, half_sums["loss"]))}
    assert dtypes == {jnp.dtype("float32")}
    assert float(half_sums["loss"]) == pytest.approx(float(full_sums["loss"]), rel=0.02)
    assert 0 < max_difference(half.params, full.params) < 0.05


@pytest.mark.slow
def test_a_thousand_layers_and_two_take_a_training_step(rng):
    model = cifar_resnet(1202, scan_blocks=True)
    blocks = sum(model.stage_sizes)
    assert blocks * len(model.block(0, 0).convs()) + 2 == 1202
    tx, _ = SGD(0.01).build(10, 5)
    state = create_state(model, tx, 0, SHAPE, UNIT_STATS)
    after, sums = jax.jit(train_step)(state, random_batch(rng, n=4))
    assert np.isfinite(float(sums["loss"]))
    moved = jax.tree.map(
        lambda a, b: np.any(a != b, axis=tuple(range(1, a.ndim))), after.params, state.params
    )
    for stage in (1, 2, 3):  # every one of the scanned blocks has learned
        kernel = moved[f"stage{stage}_blocks"]["conv1"]["kernel"]
        assert kernel.shape == (blocks // 3 - 1,)
        assert kernel.all()
    assert jax.tree.all(jax.tree.map(lambda x: bool(np.all(np.isfinite(x))), after.params))
