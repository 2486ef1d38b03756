"""What the compiled train step sends between eight devices, and that it holds the state once.

These are facts of the program, the same on any machine whose XLA makes it so; no time is taken.
"""

import functools
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import UNIT_STATS, device_bytes, tiny_resnet

from flax_resnet.data.augment import Augment
from flax_resnet.distributed import sharding
from flax_resnet.inspection.step_cost import collectives
from flax_resnet.models import cifar_resnet
from flax_resnet.optim.optimizers import SGD
from flax_resnet.training.config import TrainConfig
from flax_resnet.training.run import Run
from flax_resnet.training.step import create_state
from flax_resnet.training.step_programs import state_sharding

OPTIMIZED = True  # XLA's combiner of all-reduces is an optimisation
SHAPE = (8, 8, 3)
BATCH = 16
DEVICES = 8
OWN_ROWS = tiny_resnet(bn_group=BATCH // DEVICES)  # every device normalises its own images
MOVES = Augment(rotation=10, width_shift=0.1, flip=True, pad_crop=1, cutout=2)
FUSED = {"all-reduce": 2}
"""One of floats: gradients, running statistics, the loss; one of integers: right answers."""


@functools.cache
def step_of(model, batch_size=BATCH, **fields):
    """(run, compiled train step): as StepPrograms.compile_step makes it, for shapes alone."""
    mesh = sharding.data_mesh()
    config = TrainConfig(model=model, batch_size=batch_size, **fields)
    tx, schedule = SGD().build(100, 10)
    ema = config.ema_decay is not None
    state = jax.eval_shape(lambda: create_state(model, tx, 0, SHAPE, UNIT_STATS, ema=ema))
    state = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        state,
        state_sharding(state, mesh, config.sharding),
    )
    data = types.SimpleNamespace(batch_shape=SHAPE)
    run = Run(config, pathlib.Path(), mesh, data, 100, 10, schedule, state, start=None)
    return run, run.programs.compile_step()


def sent(model, **fields):
    """{kind: number} of what a train step sends."""
    return collectives(step_of(model, **fields)[1])


def split_parameters(run):
    return [x for x in jax.tree.leaves(run.state.params) if x.ndim > 1]


@pytest.mark.parametrize("model", [OWN_ROWS, cifar_resnet(8, bn_group=2)], ids=["4", "8"])
def test_per_device_norms_leave_one_all_reduce_of_floats(model):
    assert sent(model) == FUSED


@pytest.mark.parametrize(
    ("model", "norms"),
    [(tiny_resnet(), 3), (tiny_resnet(stage_sizes=(2,)), 5), (cifar_resnet(8), 7)],
    ids=["4", "6", "8"],
)
def test_global_norms_wait_for_two_all_reduces_each_and_the_other_gradients_for_none(model, norms):
    """2 N + 2: N forward (mean and mean square), N backward (two sums), of which the last takes the
    dense layer's gradients along; one for what waits for nothing, one of integers.
    """
    run, compiled = step_of(model)
    assert len(jax.tree.leaves(run.state.batch_stats)) == 2 * norms
    assert collectives(compiled) == {"all-reduce": 2 * norms + 2}


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        (OWN_ROWS, {}),
        (tiny_resnet(), {}),
        (OWN_ROWS, {"ema_decay": 0.9}),
        (OWN_ROWS, {"sharding": "fsdp"}),
        (OWN_ROWS, {"sharding": "zero"}),
    ],
    ids=["own", "global", "ema", "fsdp", "zero"],
)
def test_the_donated_state_has_no_second_copy(model, fields):
    run, compiled = step_of(model, **fields)
    memory, state = compiled.memory_analysis(), device_bytes(run.state)
    assert memory.alias_size_in_bytes == state
    images = BATCH // DEVICES * (np.prod(SHAPE) + 4)
    assert memory.argument_size_in_bytes == state + images
    assert state <= memory.output_size_in_bytes < state + 1000  # sums, and pointers to outputs


def test_what_moves_and_cuts_images_sends_nothing():
    assert sent(OWN_ROWS, augment=MOVES) == FUSED


@pytest.mark.parametrize("kind", [pytest.param("mixup", marks=pytest.mark.slow), "cutmix"])
def test_what_mixes_images_swaps_rows_and_gathers_none(kind):
    """Image i is mixed with image N - 1 - i, which the opposite device has: images and labels."""
    found = sent(OWN_ROWS, augment=Augment(**{kind: 0.5}))
    assert found.pop("collective-permute") == 2
    assert set(found) == {"all-reduce"}


def test_accumulation_sends_all_reduces_alone_and_keeps_the_state_in_place():
    run, compiled = step_of(OWN_ROWS, batch_size=4 * BATCH, accum_steps=4)
    assert set(collectives(compiled)) == {"all-reduce"}
    assert compiled.memory_analysis().alias_size_in_bytes == device_bytes(run.state)


def test_split_state_takes_an_eighth_and_each_split_parameter_is_gathered_once():
    model = cifar_resnet(8, bn_group=2)
    (whole, _), (run, compiled) = step_of(model), step_of(model, sharding="fsdp")
    assert device_bytes(run.state) < 1.1 * device_bytes(whole.state) / DEVICES
    found = collectives(compiled)
    assert found.pop("all-gather") == len(split_parameters(run))  # no image, no activation
    assert set(found) <= {"all-reduce", "reduce-scatter"}


def test_zero_gathers_what_the_split_optimizer_updates():
    run, compiled = step_of(OWN_ROWS, sharding="zero")
    gathers = {"all-gather": len(split_parameters(run))}
    assert collectives(compiled) == FUSED | gathers


def test_a_program_of_one_device_sends_nothing():
    assert collectives(jax.jit(lambda x: x @ x).lower(jnp.ones((4, 4))).compile()) == {}


def test_collectives_that_start_and_end_apart_count_once():
    """As XLA writes them for accelerators; names of operands are no operations."""
    text = """%start = (f32[3]{0:T(8)}, f32[]) all-reduce-start(%a, %b), to_apply=%add
      %done = (f32[3], f32[]) all-reduce-done(%start)
      ROOT %all-gather.7 = bf16[64,128]{1,0} all-gather(%p), metadata={op_name="all-reduce(a)"}
      %out = f32[3] add(f32[3] %done, f32[3] %all-reduce.3)"""
    program = types.SimpleNamespace(as_text=lambda: text)
    assert collectives(program) == {"all-reduce": 1, "all-gather": 1}
