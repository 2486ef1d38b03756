import jax
import jax.numpy as jnp
import pytest

from flax_resnet.optim import optimizers

PARTS = (
    "stem_conv",
    "stage1_block1",
    "stage2_block1",
    "stage2_block2",
    "final_norm",
    "hidden1",
    "head",
)


def stepwise(optimizer, num_steps, wrap=lambda tree: tree):
    """How far each part moves in each step, on a gradient of one."""
    tx, _ = optimizer.build(num_steps, 1)
    params = wrap({name: {"kernel": jnp.zeros(2)} for name in PARTS})
    state, moves = tx.init(params), []
    for _ in range(num_steps):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params, value=1.0)
        moves.append([float(-x[0]) for x in jax.tree.leaves(updates)])
    names = [p[-2].key for p, _ in jax.tree_util.tree_leaves_with_path(params)]
    return [dict(zip(names, step, strict=True)) for step in moves]


@pytest.mark.parametrize("wrap", [lambda tree: tree, lambda tree: {"backbone": tree}])
def test_each_stage_has_its_share_of_the_learning_rate(wrap):
    (moves,) = stepwise(optimizers.SGD(learning_rate=1.0, momentum=0, stage_decay=0.5), 1, wrap)
    assert moves == {"head": 1, "hidden1": 1, "final_norm": 0.5, "stage2_block1": 0.5,
                     "stage2_block2": 0.5, "stage1_block1": 0.25, "stem_conv": 0.125}  # fmt: skip


def test_stages_begin_to_move_one_after_the_other():
    optimizer = optimizers.SGD(learning_rate=1.0, momentum=0, stage_decay=0.5, unfreeze=(0.25, 0.5))
    moves = stepwise(optimizer, 8)
    assert [m["head"] for m in moves] == [1] * 8
    assert [m["stage2_block2"] for m in moves] == [0] * 2 + [0.5] * 6
    assert [m["final_norm"] for m in moves] == [0] * 2 + [0.5] * 6
    assert [m["stage1_block1"] for m in moves] == [0] * 4 + [0.25] * 4
    assert [m["stem_conv"] for m in moves] == [0] * 8


def test_weight_decay_does_not_move_what_is_still_frozen():
    tx, _ = optimizers.AdamW(weight_decay=0.5, unfreeze=(0.5,)).build(4, 1)
    params = {name: {"kernel": jnp.ones(2)} for name in PARTS}
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params, value=1.0)
    assert not updates["stage2_block1"]["kernel"].any()
    assert updates["head"]["kernel"].all()
