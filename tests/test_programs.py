"""What the compiled train step sends between eight devices, and that it holds the state once.

These are facts of the program, the same on any machine whose XLA makes it so; no time is taken.
"""

import collections
import functools
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import UNIT_STATS, tiny_resnet

from flax_resnet import distributed, programs
from flax_resnet.augment import Augment
from flax_resnet.config import TrainConfig
from flax_resnet.models import cifar_resnet
from flax_resnet.optim import SGD
from flax_resnet.programs import Array, Collective
from flax_resnet.run import Run, held
from flax_resnet.step import create_state

OPTIMIZED = True  # XLA's combiner of all-reduces is an optimisation
SHAPE = (8, 8, 3)
BATCH = 16
DEVICES = 8
OWN_ROWS = tiny_resnet(bn_group=BATCH // DEVICES)  # every device normalises its own images
MOVES = Augment(rotation=10, width_shift=0.1, flip=True, pad_crop=1, cutout=2)
POINTER = 8  # bytes: a program's outputs are a tuple of pointers to them


@functools.cache
def step_of(model, batch_size=BATCH, **fields):
    """(run, compiled train step): as Run.compile_step makes it, for shapes alone."""
    mesh = distributed.data_mesh()
    config = TrainConfig(model=model, batch_size=batch_size, **fields)
    tx, schedule = SGD().build(100, 10)
    ema = config.ema_decay is not None
    state = jax.eval_shape(lambda: create_state(model, tx, 0, SHAPE, UNIT_STATS, ema=ema))
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state,
        held(state, mesh, config.sharding),
    )
    data = types.SimpleNamespace(batch_shape=SHAPE)
    run = Run(config, pathlib.Path(), mesh, data, 100, 10, schedule, state, start=None)
    return run, run.compile_step()


def sizes(*trees):
    """Elements of each array, sorted: XLA may reduce a gradient with its axes merged."""
    return sorted(int(np.prod(x.shape)) for x in jax.tree.leaves(trees))


def of_floats(found):
    """The all-reduces of floats: all but the sums of counts."""
    reduces = [each for each in found if each.kind == "all-reduce"]
    return [each for each in reduces if each.operands[0].dtype == "f32"]


def bytes_of(*trees):
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(trees))


# Replicated state.


@pytest.mark.parametrize("model", [OWN_ROWS, cifar_resnet(8, bn_group=2)], ids=["4", "8"])
def test_per_device_norms_leave_one_fused_reduction_and_it_has_each_gradient_once(model):
    run, compiled = step_of(model)
    found = programs.collectives(compiled)
    # One of floats: gradients, running statistics, the summed loss. One of integers: right
    # answers. The number of images is known.
    assert [each.kind for each in found] == ["all-reduce"] * 2
    (fused,) = of_floats(found)
    loss = jnp.zeros(())
    assert sizes(fused.operands) == sizes(run.state.params, run.state.batch_stats, loss)
    assert programs.carried([fused], run.state.params) == {"all-reduce": 1.0}
    (counts,) = (each for each in found if each is not fused)
    assert counts.operands == (Array("s32", ()),) * 2
    assert not any(each.looped for each in found)


@pytest.mark.parametrize(
    ("model", "norms"),
    [(tiny_resnet(), 3), (tiny_resnet(stage_sizes=(2,)), 5), (cifar_resnet(8), 7)],
    ids=["4", "6", "8"],
)
def test_global_norms_wait_for_two_reductions_each_and_the_other_gradients_for_none(model, norms):
    """2 N + 2. Forward, each norm waits for its mean and mean square over all devices: N. Backward,
    each waits for two sums, its scale's and its offset's gradients: N, of which the last norm's
    takes the dense layer's gradients along, and the first norm's every one that nothing waits for.
    The first convolution's gradient waited for that, and is in one more, with the loss. One of
    integers.
    """
    run, compiled = step_of(model)
    found = programs.collectives(compiled)
    assert len(jax.tree.leaves(run.state.batch_stats)) == 2 * norms
    assert collections.Counter(each.kind for each in found) == {"all-reduce": 2 * norms + 2}
    forward, backward = of_floats(found)[:norms], of_floats(found)[norms:]
    assert [len(each.operands) for each in forward] == [2] * norms
    # Each gradient once.
    carried = sizes([each.operands for each in backward])
    assert carried == sizes(run.state.params, jnp.zeros(()))
    # The gradients of all convolutions but the first are in one.
    kernels = sizes([x for path, x in flat(run.state.params) if x.ndim == 4 and "stem" not in path])
    assert any(not count(kernels) - count(sizes(each.operands)) for each in backward)


def flat(tree):
    return [(jax.tree_util.keystr(path), x) for path, x in jax.tree.leaves_with_path(tree)]


count = collections.Counter


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
    memory = programs.memory(compiled)
    state = programs.device_bytes(run.state)
    assert memory.aliased == state
    images = BATCH // DEVICES * (np.prod(SHAPE) + 4)
    assert memory.arguments == state + images
    outputs = len(jax.tree.leaves(compiled.output_shardings))
    sums = 4 * (outputs - len(jax.tree.leaves(run.state)))
    assert memory.outputs == state + sums + POINTER * outputs


# Augmentation.


def test_what_moves_and_cuts_images_sends_nothing():
    plain, moved = (
        programs.collectives(step_of(OWN_ROWS, augment=augment)[1])
        for augment in (Augment(), MOVES)
    )
    assert [(each.kind, each.operands) for each in moved] == [
        (each.kind, each.operands) for each in plain
    ]


@pytest.mark.parametrize("kind", [pytest.param("mixup", marks=pytest.mark.slow), "cutmix"])
def test_what_mixes_images_sends_each_device_its_partners_rows_alone(kind):
    """Image i is mixed with image N - 1 - i, which the opposite device has: a swap, no gather."""
    _, compiled = step_of(OWN_ROWS, augment=Augment(**{kind: 0.5}))
    found = programs.collectives(compiled)
    swaps = [each for each in found if each.kind == "collective-permute"]
    rows = BATCH // DEVICES
    assert sorted(each.operands[0].shape for each in swaps) == [(rows,), (rows, *SHAPE)]
    others = [each for each in found if each not in swaps]
    assert {each.kind for each in others} == {"all-reduce"}
    masks = [x for each in others for x in each.operands if x.dtype == "pred"]
    # One box for the whole batch: at most a mask of an image is shared.
    assert sum(x.size for x in masks) <= SHAPE[0] * SHAPE[1]


# Accumulation.


def test_accumulation_reduces_the_gradient_of_every_part():
    """The partitioner has no sum that is still to be reduced: each part's is, before it is added.

    On a CPU, unrolled, all are in one operation, of ``accum_steps`` times the bytes.
    """
    run, compiled = step_of(OWN_ROWS, batch_size=4 * BATCH, accum_steps=4)
    found = programs.collectives(compiled)
    assert {each.kind for each in found} == {"all-reduce"}
    carried = count(x.size for each in of_floats(found) for x in each.operands)
    gradients = count({size: 4 * n for size, n in count(sizes(run.state.params)).items()})
    assert not gradients - carried
    kernel = 3 * 3 * 8 * 8
    assert carried[kernel] == gradients[kernel] == 4 * 2
    assert programs.memory(compiled).aliased == programs.device_bytes(run.state)


# Split state.


def test_split_state_takes_an_eighth_and_only_it_is_gathered():
    model = cifar_resnet(8, bn_group=2)
    (whole_run, _), (run, compiled) = step_of(model), step_of(model, sharding="fsdp")
    split = [x for x in jax.tree.leaves(run.state.params) if x.ndim > 1]
    rest = bytes_of(whole_run.state) - 2 * bytes_of(split)  # momentum is split as well
    state = programs.device_bytes(run.state)
    assert state == 2 * bytes_of(split) // DEVICES + rest
    assert state < 1.1 * bytes_of(whole_run.state) / DEVICES
    found = programs.collectives(compiled)
    gathers = [each for each in found if each.kind == "all-gather"]
    # Each split parameter once, and nothing else: no image, no activation.
    assert sizes([each.results for each in gathers]) == sizes(split)
    assert sorted(each.bytes for each in gathers) == sorted(map(bytes_of, split))
    # XLA on a CPU reduces a gradient whole and takes its part; others may scatter it.
    others = [each for each in found if each not in gathers]
    assert {each.kind for each in others} <= {"all-reduce", "reduce-scatter"}
    assert sum(programs.carried(others, run.state.params).values()) == 1.0
    assert len(of_floats(others)) == 1


def test_zero_gathers_what_the_split_optimizer_updates():
    run, compiled = step_of(OWN_ROWS, sharding="zero")
    split = [x for x in jax.tree.leaves(run.state.params) if x.ndim > 1]
    found = programs.collectives(compiled)
    gathers = [each for each in found if each.kind == "all-gather"]
    assert sizes([each.results for each in gathers]) == sizes(split)
    assert sum(each.kind == "all-reduce" for each in found) == len(found) - len(gathers) == 2


# Reading texts: parts of programs as XLA writes them for other devices.

TEXT = """\
HloModule jit_step, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias) }

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(f32[] %x, f32[] %y)
}

%inner.1 (p: bf16[8,128]) -> bf16[64,128] {
  %p = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.7 = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather(%p), dimensions={0}
}

%body (arg: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %arg = (s32[], bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %part = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=1
  %call = bf16[64,128]{1,0} call(%part), to_apply=%inner.1
  ROOT %tuple.1 = (s32[], bf16[8,128]{1,0}) tuple(%i, %part)
}

%condition (arg.1: (s32[], bf16[8,128])) -> pred[] {
  ROOT %less = pred[] compare(%j, %n), direction=LT
}

ENTRY %main (a: f32[3,3], b: f32[], c: f32[8]) -> (f32[3,3], f32[]) {
  %a = f32[3,3]{1,0:T(8,128)S(1)} parameter(0), metadata={op_name="all-reduce(a)"}
  %b = f32[] parameter(1)
  %c = f32[8]{0} parameter(2)
  %flags = pred[8]{0} compare(%c, %c), direction=EQ
  %start = (f32[3,3]{1,0:T(8,128)}, /*index=1*/f32[]) all-reduce-start(%a, %b), channel_id=1, \
to_apply=%add, metadata={op_name="jit(step)/transpose(x)/dot" stack_frame_id=3}
  %done = (f32[3,3]{1,0:T(8,128)}, f32[]) all-reduce-done(%start)
  %gather = (f32[8]{0}, f32[64]{0}) all-gather-start(%c), dimensions={0}
  %gathered = f32[64]{0} all-gather-done(%gather)
  %many = ((f32[8]{0}, pred[8]{0}), (f32[64]{0}, pred[64]{0})) all-gather-start(%c, %flags)
  %send = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%c), channel_id=4
  %sent = f32[8]{0} collective-permute-done(%send)
  %scatter = ((f32[8]{0}), f32[1]{0}) reduce-scatter-start(f32[8]{0} %c), to_apply=%add
  %scattered = f32[1]{0} reduce-scatter-done(%scatter)
  %turned = (f32[8]{0}) all-to-all(%c), dimensions={0}
  %loop = (s32[], bf16[8,128]{1,0}) while(%t), condition=%condition, body=%body
  ROOT %out = (f32[3,3]{1,0}, f32[]) tuple(%a, %b)
}
"""
EIGHT, WHOLE = Array("f32", (8,)), Array("f32", (64,))


def test_texts_of_other_devices_are_read():
    square, scalar = Array("f32", (3, 3)), Array("f32", ())
    gathered = Array("bf16", (8, 128)), Array("bf16", (64, 128))
    assert programs.collectives(TEXT) == [
        Collective("all-gather", (gathered[0],), (gathered[1],), looped=True),
        Collective("all-reduce", (square, scalar), (square, scalar), False,
                   "jit(step)/transpose(x)/dot"),
        Collective("all-gather", (EIGHT,), (WHOLE,)),
        Collective("all-gather", (EIGHT, Array("pred", (8,))), (WHOLE, Array("pred", (64,)))),
        Collective("collective-permute", (EIGHT,), (EIGHT,)),
        Collective("reduce-scatter", (EIGHT,), (Array("f32", (1,)),)),
        Collective("all-to-all", (EIGHT,), (EIGHT,)),
    ]  # fmt: skip


def test_a_text_without_percent_signs_is_the_same():
    assert programs.collectives(TEXT.replace("%", "")) == programs.collectives(TEXT)


def test_totals_count_whole_arrays():
    assert programs.totals(programs.collectives(TEXT)) == {
        "all-gather": (3, 2 * 64 * 128 + 4 * 64 + 5 * 64),
        "all-reduce": (1, 4 * 9 + 4),
        "collective-permute": (1, 4 * 8),
        "reduce-scatter": (1, 4 * 8),
        "all-to-all": (1, 4 * 8),
    }


@pytest.mark.parametrize(
    ("dtype", "want"),
    [("pred", 3), ("s4", 2), ("bf16", 6), ("f8e4m3fn", 3), ("u64", 24), ("c128", 48)],
)
def test_bytes_go_by_the_dtypes_width(dtype, want):
    assert Array(dtype, (3,)).bytes == want


def test_shares_count_each_array_once_and_go_by_width():
    reduced = Collective("all-reduce", (Array("f32", (6,)), EIGHT), (Array("f32", (6,)), EIGHT))
    tree = [np.zeros((2, 3), np.float32)] * 2 + [np.zeros(8, np.float64)]
    assert programs.carried([reduced], tree) == {"all-reduce": 24 / (24 + 24 + 64)}
    assert programs.carried([], tree) == {}
    assert programs.carried([reduced], []) == {}


def test_a_program_of_one_device_sends_nothing():
    compiled = jax.jit(lambda x: x @ x).lower(jnp.ones((4, 4))).compile()
    assert programs.collectives(compiled) == []
    assert programs.memory(compiled).aliased == 0
