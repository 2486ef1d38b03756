"""Variables between stacked and unstacked forms, and what trains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import (
    UNIT_STATS,
    assert_trees_equal,
    drawn,
    max_difference,
    random_batch,
    shapes_of,
    tiny_resnet,
)

from flax_resnet.models import (
    BottleneckBlock,
    MiniModel,
    PreActBasicBlock,
    create,
    replace_head,
    stack_blocks,
    trainable,
    unstack_blocks,
)
from flax_resnet.optim import optimizers
from flax_resnet.training.step import create_state, train_step


@pytest.mark.parametrize(
    "model",
    [
        tiny_resnet(stage_sizes=(3, 1, 2)),
        tiny_resnet(stage_sizes=(4, 2), stride_block="last", block_cls=PreActBasicBlock),
    ],
)
def test_stacking_and_unstacking_are_inverse_and_put_equal_blocks_together(model):
    variables = drawn(model, jnp.zeros((1, 8, 8, 3)))
    stacked = stack_blocks(model, variables)
    names = {n for n in stacked["params"] if n.startswith("stage")}
    want = {
        (3, 1, 2): "1_block1 1_blocks 2_block1 3_block1 3_blocks",
        (4, 2): "1_block1 1_blocks 1_block4 2_block1 2_block2",
    }[model.stage_sizes]
    assert names == {f"stage{name}" for name in want.split()}
    for i in (2, 3):
        assert_trees_equal(
            jax.tree.map(lambda x, i=i: x[i - 2], stacked["params"]["stage1_blocks"]),
            variables["params"][f"stage1_block{i}"],
        )
    assert_trees_equal(unstack_blocks(model, stacked), variables)
    assert_trees_equal(stack_blocks(model, stacked), stacked)
    assert_trees_equal(unstack_blocks(model, variables), variables)


def test_a_state_is_stacked_with_its_moments_and_averages():
    model = tiny_resnet(stage_sizes=(3,), num_filters=4)
    tx, _ = optimizers.Adam(learning_rate=1e-2).build(10, 5)
    arrays, scanned = (
        create_state(net, tx, 0, (8, 8, 3), UNIT_STATS, ema=True).arrays()
        for net in (model, model.clone(scan_blocks=True))
    )
    assert_trees_equal(stack_blocks(model, arrays), scanned)
    assert_trees_equal(unstack_blocks(model, scanned), arrays)


def test_frozen_parts_are_kept_from_the_optimizer(rng):
    """Weight decay would move them even without a gradient."""
    model = tiny_resnet(stage_sizes=(1, 1), frozen_stages=1)
    tx, _ = optimizers.AdamW(learning_rate=0.1, weight_decay=0.5).build(10, 5)
    state = create_state(model, tx, 0, (8, 8, 3), UNIT_STATS)
    after, _ = jax.jit(train_step)(state, random_batch(rng))
    for name in ("stem_conv", "stem_norm", "stage1_block1"):
        assert_trees_equal(after.params[name], state.params[name])
    assert_trees_equal(after.batch_stats["stage1_block1"], state.batch_stats["stage1_block1"])
    for name in ("stage2_block1", "head"):
        assert max_difference(after.params[name], state.params[name]) > 0.01
    moments = [x for x in jax.tree.leaves(after.opt_state) if x.shape == (3, 3, 8, 8)]
    assert moments == []  # and take no memory there


class Classifier(nn.Module):
    """Somebody's own network around a frozen one."""

    backbone: nn.Module

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(10, name="stage_of_mine")(self.backbone(x, train))


def test_a_frozen_network_inside_another_is_kept_from_the_optimizer_too(rng):
    backbone = tiny_resnet(include_top=False, pooling="avg", frozen_stages=1)
    tx, _ = optimizers.AdamW(learning_rate=0.1, weight_decay=0.5).build(10, 5)
    state = create_state(Classifier(backbone), tx, 0, (8, 8, 3), UNIT_STATS)
    after, _ = jax.jit(train_step)(state, random_batch(rng))
    assert_trees_equal(after.params["backbone"], state.params["backbone"])
    assert max_difference(after.params["stage_of_mine"], state.params["stage_of_mine"]) > 0.01


def test_trainable_says_what_frozen_stages_freezes():
    model = tiny_resnet(stage_sizes=(2, 1), block_cls=PreActBasicBlock, scan_blocks=True)
    params = shapes_of(model, (8, 8, 3))["params"]

    def frozen(stages):
        tree = trainable(model.clone(frozen_stages=stages), params)
        assert jax.tree.structure(tree) == jax.tree.structure(params)
        return {name for name, part in tree.items() if not any(jax.tree.leaves(part))}

    stem, stage1 = {"stem_conv"}, {"stage1_block1", "stage1_blocks"}
    assert frozen(-1) == set()
    assert frozen(0) == stem
    assert frozen(1) == stem | stage1
    assert frozen(2) == stem | stage1 | {"stage2_block1", "final_norm"}
    mini = shapes_of(MiniModel(stage_sizes=(1,)), (8, 8, 3))["params"]
    assert all(jax.tree.leaves(trainable(MiniModel(), mini)))


@pytest.mark.parametrize(
    "model",
    [
        MiniModel(stage_sizes=(1,), num_filters=4),
        tiny_resnet(block_cls=BottleneckBlock),
        create("dropblock_resnet", stage_filters=(4,), dense_features=(6,)),
    ],
)
def test_a_replaced_head_has_its_classes_and_starts_afresh(model, rng):
    x = rng.normal(size=(2, 8, 8, 3)).astype(np.float32)
    variables = drawn(model, x)
    other, changed = replace_head(model, variables, 3)
    assert other == model.clone(num_classes=3)
    assert other.apply(changed, x).shape == (2, 3)
    assert shapes_of(other, (8, 8, 3)) == jax.eval_shape(lambda: changed)
    assert np.any(changed["params"]["head"]["kernel"])
    for name in variables["params"].keys() - {"head"}:
        assert_trees_equal(changed["params"][name], variables["params"][name])
