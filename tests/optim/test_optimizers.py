import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import speed_gradients

from flax_resnet.errors import UserError
from flax_resnet.optim import optimizers

PARAMS = {"conv": {"kernel": jnp.array([1.0, -2.0]), "bias": jnp.array([3.0])}}
GRADS = {"conv": {"kernel": jnp.array([0.5, 0.25]), "bias": jnp.array([-1.0])}}


def updates(optimizer, steps=1, params=PARAMS):
    tx, _ = optimizer.build(num_steps=100, steps_per_epoch=10)
    state = tx.init(params)
    for _ in range(steps):
        delta, state = tx.update(GRADS, state, params, value=jnp.float32(1.0))
        params = optax.apply_updates(params, delta)
    return delta["conv"]


def test_sgd_adds_decay_to_kernels_only_and_keeps_momentum():
    sgd = optimizers.SGD(learning_rate=0.1, weight_decay=0.01, momentum=0.9)
    first = updates(sgd)
    np.testing.assert_allclose(first["kernel"], [-0.1 * 0.51, -0.1 * 0.23], rtol=1e-6)
    np.testing.assert_allclose(first["bias"], [0.1], rtol=1e-6)
    second = updates(sgd, steps=2)
    velocity = 0.9 * 0.51 + 0.5 + 0.01 * (1 - 0.051)
    np.testing.assert_allclose(second["kernel"][0], -0.1 * velocity, rtol=1e-6)
    np.testing.assert_allclose(second["bias"], [0.19], rtol=1e-6)


KERNEL, GRADIENT = np.array([1.0, -2.0]), np.array([0.5, 0.25])
TRUST = np.linalg.norm(KERNEL) / np.linalg.norm(GRADIENT)
CLIPPED = 0.1 / np.linalg.norm([0.5, 0.25, -1.0])


@pytest.mark.parametrize(
    ("optimizer", "kernel", "bias"),
    [
        (optimizers.SGD(momentum=0.9, nesterov=True), -0.19 * GRADIENT, 0.19),
        (optimizers.SGD(weight_decay=0.01, decay_norm_and_bias=True),
         -0.1 * (GRADIENT + 0.01 * KERNEL), 0.1 * (1 - 0.03)),
        (optimizers.SGD(1.0, momentum=0.0, max_grad_norm=0.1), -CLIPPED * GRADIENT, CLIPPED),
        (optimizers.Adam(0.1), [-0.1, -0.1], 0.1),
        (optimizers.Adam(0.1, eps=0.25), -0.1 * GRADIENT / (GRADIENT + 0.25), 0.1 / 1.25),
        (optimizers.LARS(momentum=0.0, trust_coefficient=0.5), -0.05 * TRUST * GRADIENT, 0.1),
        (optimizers.LAMB(0.1, weight_decay=0.0), [-0.1 * np.sqrt(2.5)] * 2, 0.3),
    ],
)  # fmt: skip
def test_the_first_update(optimizer, kernel, bias):
    got = updates(optimizer)
    np.testing.assert_allclose(got["kernel"], kernel, rtol=1e-4)
    np.testing.assert_allclose(got["bias"], [bias], rtol=1e-4)


def test_adamw_decouples_its_decay():
    plain = updates(optimizers.AdamW(learning_rate=0.1, weight_decay=0.0))
    decayed = updates(optimizers.AdamW(learning_rate=0.1, weight_decay=0.5))
    shift = np.asarray(decayed["kernel"] - plain["kernel"])
    np.testing.assert_allclose(shift, -0.1 * 0.5 * np.asarray(PARAMS["conv"]["kernel"]), rtol=1e-5)
    np.testing.assert_array_equal(decayed["bias"], plain["bias"])


def test_plateau_reduces_after_patience_epochs_without_improvement():
    schedule = optimizers.ReduceOnPlateau(factor=0.5, patience=2)
    tx, rate = optimizers.SGD(learning_rate=1.0, momentum=0.0, schedule=schedule).build(1000, 10)
    state, rates = tx.init(PARAMS), []
    for step in range(60):
        loss = jnp.float32(1.0 - step / 100 if step < 20 else 0.9)
        rates.append(float(optimizers.learning_rate_at(rate, state, step)))
        _, state = tx.update(GRADS, state, PARAMS, value=loss)
    # Epochs 0 and 1 improve (mean losses 0.955, 0.855), epochs 2 and 3 do not: halved at 40.
    assert rates[:40] == [1.0] * 40
    assert rates[40:60] == [0.5] * 20


def test_is_kernel_goes_by_name_so_stacked_biases_are_not_decayed():
    stacked = {"norm": {"scale": jnp.ones((5, 3))}, "conv": {"kernel": jnp.ones((5, 3, 3, 1, 1))}}
    assert optimizers.is_kernel(stacked) == {"norm": {"scale": False}, "conv": {"kernel": True}}


def test_linear_scaling_rule():
    assert optimizers.linear_scaled_lr(0.1, 8192) == pytest.approx(3.2)


@pytest.mark.parametrize(
    "fields",
    [
        {"learning_rate": -0.1},
        {"learning_rate": float("nan")},
        {"weight_decay": float("inf")},
        {"max_grad_norm": 0.0},
        {"stage_decay": -1},
        {"unfreeze": (1.5,)},
        {"unfreeze": (0.5, 0.2)},
    ],
)
def test_numbers_that_are_no_rates_are_refused(fields):
    with pytest.raises(UserError, match=rf"optimizer\.{next(iter(fields))}="):
        optimizers.Adam(**fields)


def test_muon_makes_hidden_kernels_orthogonal_and_gives_the_rest_momentum(rng):
    params, grads = speed_gradients(rng, 1)
    muon = optimizers.Muon(learning_rate=0.5, rest_scale=0.4, rest_momentum=0.9, ns_steps=12)
    tx, _ = muon.build(4, 1)
    state = tx.init(params)
    delta, _ = jax.jit(tx.update)(grads[0], state, params, value=0.0)
    move = np.asarray(delta["stage1_block1"]["conv1"]["kernel"]).reshape(18, 4) / -0.5
    values = np.linalg.svd(move, compute_uv=False)
    assert ((values > 0.6) & (values < 1.3)).all()  # its iteration ends about one, not at it
    u, _, v = np.linalg.svd(grads[0]["stage1_block1"]["conv1"]["kernel"].reshape(18, 4),
                            full_matrices=False)  # fmt: skip
    assert np.sum(move * (u @ v)) / np.linalg.norm(move) / 2 > 0.95
    for name in ("head", "stem_conv"):
        for key, grad in grads[0][name].items():
            np.testing.assert_allclose(delta[name][key], -0.2 * 1.9 * grad, rtol=1e-5)
