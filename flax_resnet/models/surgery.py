"""Changes to a network's variables: blocks stacked and unstacked, a new head, given weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_resnet.errors import UserError
from flax_resnet.models.resnet import ResNet, block_name, blocks_name


def stack_blocks(module: ResNet, tree: Any) -> Any:
    """Turns the form that a network has unrolled into that with ``scan_blocks``.

    Args:
      module: the network; its ``scan_blocks`` does not matter.
      tree: variables, or whatever holds dicts named as the parameters are: one collection,
        gradients, an optimizer's state, a TrainState's arrays.

    Returns:
      The same with ``stageI_block2``, ... in one ``stageI_blocks`` of arrays with a leading axis.
      What is stacked already stays so.
    """

    def stack(node: Mapping[str, Any]) -> dict[str, Any]:
        node = dict(node)
        for stage in range(len(module.stage_sizes)):
            equal = [block_name(stage, i) for i in module.equal_blocks(stage)]
            if equal and set(equal) <= node.keys():
                blocks = [node.pop(name) for name in equal]
                node[blocks_name(stage)] = jax.tree.map(lambda *x: jnp.stack(x), *blocks)
        return node

    return _map_levels(stack, tree)


def unstack_blocks(module: ResNet, tree: Any) -> Any:
    """The inverse of ``stack_blocks``: one entry a block again."""

    def unstack(node: Mapping[str, Any]) -> dict[str, Any]:
        node = dict(node)
        for stage in range(len(module.stage_sizes)):
            if blocks_name(stage) in node:
                stacked = node.pop(blocks_name(stage))
                for at, index in enumerate(module.equal_blocks(stage)):
                    node[block_name(stage, index)] = jax.tree.map(lambda x, at=at: x[at], stacked)
        return node

    return _map_levels(unstack, tree)


def _map_levels(change: Callable[[Mapping[str, Any]], dict[str, Any]], tree: Any) -> Any:
    """Applies ``change`` to every dict in ``tree`` whose keys are a network's parts."""

    def is_level(node: Any) -> bool:
        return isinstance(node, Mapping) and block_name(0, 0) in node

    return jax.tree.map(lambda n: change(n) if is_level(n) else n, tree, is_leaf=is_level)


def replace_head(
    module: Any, variables: Mapping[str, Any], num_classes: int, seed: int = 0
) -> tuple[Any, dict[str, Any]]:
    """The network with a new head of ``num_classes``, freshly started; all else is kept.

    Args:
      module: a network of this library; a ResNet without its top gets one.
      variables: its variables.
      num_classes: width of the new head.
      seed: of the head's initialisation.

    Returns:
      (module, variables).
    """
    params = dict(variables["params"])
    if isinstance(module, ResNet):
        module, width = module.clone(include_top=True), module.num_features
    else:
        width = params["head"]["kernel"].shape[0]
    head = module.layers.dense(num_classes)
    params["head"] = head.init(jax.random.key(seed), jnp.zeros((1, width)))["params"]
    return module.clone(num_classes=num_classes), {**variables, "params": params}


def trainable(module: nn.Module, params: Mapping[str, Any]) -> Any:
    """A tree of bools like ``params``: False in the parts that ``frozen_stages`` freezes."""
    frozen = getattr(module, "frozen_stages", -1)

    def trains(name: str) -> bool:
        if name.startswith("stem_"):
            return frozen < 0
        if name.startswith("stage"):
            return int(name.removeprefix("stage").partition("_")[0]) > frozen
        return name != "final_norm" or frozen < len(module.stage_sizes)

    return {name: jax.tree.map(lambda _, t=trains(name): t, part) for name, part in params.items()}


def match_variables(module: nn.Module, want: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` in the form that ``module`` takes.

    Args:
      module: the network.
      want: shapes of its variables.
      given: variables, of blocks stacked or not; a head that is not wanted is dropped.

    Raises:
      UserError: what is missing, left over or of another shape.
    """
    if isinstance(module, ResNet):
        given = (stack_blocks if module.scan_blocks else unstack_blocks)(module, given)
    have, need = (flatten_dict(dict(tree), sep="/") for tree in (given, want))
    if not any(key.startswith("params/head/") for key in need):
        have = {key: x for key, x in have.items() if not key.startswith("params/head/")}
    _check_ends(have, need)
    problems = {
        "missing": sorted(need.keys() - have.keys()),
        "unexpected": sorted(have.keys() - need.keys()),
        "of another shape": [
            f"{key} {have[key].shape} for {need[key].shape}"
            for key in sorted(need.keys() & have.keys())
            if have[key].shape != need[key].shape
        ],
    }
    if any(problems.values()):
        raise UserError(
            f"the weights are not this {type(module).__name__}'s: "
            + "; ".join(f"{len(v)} {k} ({_some(v)})" for k, v in problems.items() if v)
        )
    return unflatten_dict({key: jnp.asarray(have[key]) for key in need}, sep="/")


def _check_ends(have: Mapping[str, Any], need: Mapping[str, Any]) -> None:
    """Input channels and classes are the differences that people meet: each has its own line."""
    for stem in ("params/stem_conv1/kernel", "params/stem_conv/kernel"):
        if stem in have and stem in need:
            theirs, ours = have[stem].shape[2], need[stem].shape[2]
            if theirs != ours:
                raise UserError(
                    f"input_shape has {ours} channels, the weights' stem takes {theirs}: repeat or "
                    "drop channels of the images, or leave out weights"
                )
            break
    head = "params/head/kernel"
    if head in have and head in need and have[head].shape[1] != need[head].shape[1]:
        theirs, ours = have[head].shape[1], need[head].shape[1]
        raise UserError(
            f"num_classes={ours}, the weights' head has {theirs}: say num_classes={theirs} and "
            "then replace_head, or include_top=False"
        )


def _some(items: list[str], most: int = 3) -> str:
    more = f", and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
