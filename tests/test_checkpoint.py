import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import UNIT_STATS, assert_trees_equal, random_batch, tiny_resnet

from flax_resnet import distributed
from flax_resnet.checkpoint import CheckpointConfig, Checkpoints
from flax_resnet.errors import UserError
from flax_resnet.optim import Adam
from flax_resnet.step import create_state, train_step


def tree(value):
    return {"a": jnp.full((3, 4), float(value)), "b": {"step": jnp.int32(value)}, "none": None}


@pytest.fixture
def checkpoints(tmp_path):
    opened = Checkpoints(tmp_path / "c", CheckpointConfig(keep_last=2, keep_best=1))
    yield opened
    opened.close()


def test_newest_and_best_are_kept(checkpoints):
    for step, top1 in ((0, 0.9), (1, 0.5), (2, 0.9), (3, None), (4, 0.7), (5, 0.6)):
        checkpoints.save(step, tree(step), {"step": step}, top1 and {"top1": top1})
    checkpoints.wait()
    assert (checkpoints.latest_step(), checkpoints.best_step()) == (5, 2)
    for which, step in (("latest", 5), ("best", 2), (4, 4)):
        state, meta = checkpoints.restore(tree(0), which)
        assert meta == {"step": step}
        assert_trees_equal(state, tree(step))
    with pytest.raises(UserError, match=r"no checkpoint 3 in .* it holds steps \[2, 4, 5\]"):
        checkpoints.restore(tree(0), 3)


def test_a_state_may_be_donated_as_soon_as_save_returns(checkpoints):
    step = jax.jit(lambda t: jax.tree.map(lambda x: x * 0 - 1, t), donate_argnums=0)
    for i in range(5):
        state = {"w": jnp.arange(250_000.0) + i}
        checkpoints.save(i, state, {}, None)
        step(state)
    checkpoints.wait()
    got, _ = checkpoints.restore({"w": jnp.zeros(250_000)})
    np.testing.assert_array_equal(got["w"], np.arange(250_000.0) + 4)


def test_a_save_that_was_cut_off_is_no_checkpoint(checkpoints, tmp_path):
    checkpoints.save(1, tree(1), {}, None)
    checkpoints.wait()
    partial = tmp_path / "c" / "2.orbax-checkpoint-tmp"
    partial.mkdir()
    (partial / "state").mkdir()
    again = Checkpoints(tmp_path / "c", CheckpointConfig())
    assert again.latest_step() == 1
    again.close()


def test_other_shapes_dtypes_and_names_are_refused(checkpoints):
    checkpoints.save(1, tree(1), {}, None)
    checkpoints.wait()
    wrong = [
        ({**tree(0), "a": jnp.zeros((4, 3))}, r"a is \(\(3, 4\), .* and \(\(4, 3\)"),
        ({**tree(0), "a": jnp.zeros((3, 4), jnp.bfloat16)}, "'float32'.* there .*'bfloat16'"),
        ({**tree(0), "c": jnp.zeros(2)}, "c is missing there"),
        ({"a": tree(0)["a"]}, "b/step is .* there and absent in this run"),
    ]
    for template, message in wrong:
        with pytest.raises(UserError, match=message):
            checkpoints.restore(template)


def test_reading_creates_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    reader = Checkpoints(tmp_path / "empty")
    with pytest.raises(UserError, match=r"no checkpoint 'latest' in .*empty: it holds steps \[\]"):
        reader.restore(tree(0))
    reader.close()
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.mark.parametrize("lost", ["state", "meta"])
def test_a_damaged_checkpoint_is_one_line(checkpoints, tmp_path, lost):
    checkpoints.save(7, tree(1), {}, None)
    checkpoints.wait()
    shutil.rmtree(tmp_path / "c" / "7" / lost)
    reader = Checkpoints(tmp_path / "c")
    with pytest.raises(
        UserError, match=r"checkpoint .*/7 cannot be read .*: remove that directory"
    ):
        reader.restore(tree(0))
    reader.close()


def test_a_state_resumed_on_other_devices_is_bit_equal(checkpoints, meshes, rng):
    tx, _ = Adam().build(10, 5)
    state = create_state(tiny_resnet(), tx, 0, (8, 8, 3), UNIT_STATS, ema=True)
    state, _ = jax.jit(functools.partial(train_step, ema_decay=0.9))(state, random_batch(rng))
    checkpoints.save(1, distributed.put_replicated(meshes[1], state).arrays(), {}, None)
    checkpoints.wait()
    for mesh in meshes:
        template = distributed.put_replicated(mesh, jax.tree.map(jnp.zeros_like, state))
        restored, _ = checkpoints.restore(template.arrays())
        assert_trees_equal(restored, state.arrays())
        assert {len(x.sharding.device_set) for x in jax.tree.leaves(restored)} == {mesh.size}


@pytest.mark.parametrize(
    "fields", [{"keep_last": 0}, {"keep_best": -1}, {"every_steps": 0}, {"every_evals": 0}]
)
def test_bad_fields(fields):
    with pytest.raises(UserError, match=f"checkpoint.{next(iter(fields))}="):
        CheckpointConfig(**fields)
