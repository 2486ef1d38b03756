"""Changes to a network's variables: blocks stacked and unstacked, a new head, given weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_resnet.errors import UserError, check_range, first_few
from flax_resnet.models.resnet import ResNet
from flax_resnet.models.stages import block_name, blocks_name


def stack_blocks(module: ResNet, tree: Any) -> Any:
    """Turns the form that a network has unrolled into that with ``scan_blocks``.

    Args:
      module: the network; its ``scan_blocks`` does not matter.
      tree: variables, or whatever holds dicts named as the parameters are: one collection,
        gradients, an optimizer's state, a TrainState's arrays.

    Returns:
      The same with ``stageI_block2``, ... in one ``stageI_blocks`` of arrays with a leading axis.
      What is stacked already stays so. Of several seeds at once, ``jax.vmap`` it; of shapes,
      ``jax.eval_shape`` it.
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
                stacked, equal = node.pop(blocks_name(stage)), module.equal_blocks(stage)
                for leaf in jax.tree.leaves(stacked):
                    if leaf.shape[:1] != (len(equal),):
                        raise UserError(
                            f"{blocks_name(stage)} holds arrays of {leaf.shape}, this network has "
                            f"{len(equal)} equal blocks there: they are of another depth"
                        )
                for at, index in enumerate(equal):
                    node[block_name(stage, index)] = jax.tree.map(lambda x, at=at: x[at], stacked)
        return node

    return _map_levels(unstack, tree)


def _map_levels(change: Callable[[Mapping[str, Any]], dict[str, Any]], tree: Any) -> Any:
    """Applies ``change`` to every dict in ``tree`` whose keys are a network's parts."""

    def is_level(node: Any) -> bool:
        return isinstance(node, Mapping) and block_name(0, 0) in node

    return jax.tree.map(lambda n: change(n) if is_level(n) else n, tree, is_leaf=is_level)


def variable_shapes(module: nn.Module, images: Any) -> Any:
    """Shapes and dtypes of a network's variables, computing none.

    Args:
      module: the network.
      images: (N, H, W, C) as an array, or its shape and dtype.
    """
    return jax.eval_shape(initializer(module, images), jax.random.key(0))


def initialize(module: nn.Module, key: jax.Array, images: Any) -> dict[str, Any]:
    """Fresh variables of a network.

    A ResNet's are the same for one key whether its blocks are scanned or not: they are drawn
    in the scanned form, which compiles in seconds at any depth.

    Args:
      module: the network.
      key: random key.
      images: (N, H, W, C), or their shape and dtype; only the shape matters.
    """
    return initializer(module, images)(key)


def initializer(module: nn.Module, images: Any) -> Callable[[jax.Array], Any]:
    """key -> fresh variables, compiled once for all keys; otherwise as ``initialize``."""

    @jax.jit
    def init(key: jax.Array) -> Any:
        zeros = jnp.zeros(images.shape, images.dtype)
        if not isinstance(module, ResNet) or module.scan_blocks:
            return module.init(key, zeros, train=False)
        return unstack_blocks(module, module.clone(scan_blocks=True).init(key, zeros, train=False))

    return init


def split_top(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(parameters of the trunk, parameters of the head and of the hidden layers before it)."""
    top = {name: x for name, x in params.items() if is_top(name)}
    return {name: x for name, x in params.items() if name not in top}, top


def is_top(name: str) -> bool:
    """Whether parameters of this name are those of the head or of a hidden layer before it."""
    return name == "head" or name.startswith("hidden")


def has_top(node: Any) -> bool:
    """Whether a node of a state's tree holds a network's parameters, the head among them."""
    return isinstance(node, Mapping) and "head" in node


def replace_head(
    module: Any, variables: Mapping[str, Any], num_classes: int
) -> tuple[Any, dict[str, Any]]:
    """The network with a new head of ``num_classes``, freshly started; all else is kept.

    Hidden layers before the head (``hidden_units``) are kept where the variables have them.

    Args:
      module: a network of this library; a ResNet without its top gets one.
      variables: its variables.
      num_classes: width of the new head.

    Returns:
      (module, variables).
    """
    check_range("num_classes", num_classes, 1)
    params, key = dict(variables["params"]), jax.random.key(0)
    if isinstance(module, ResNet):
        module = module.clone(include_top=True, num_classes=num_classes)
        features = jnp.zeros((1, module.num_features))
        fresh = module.init(key, features, method="classify")["params"]
    else:
        module = module.clone(num_classes=num_classes)
        features = jnp.zeros((1, params["head"]["kernel"].shape[0]))
        fresh = module.layers.dense(num_classes).init(key, features)["params"]
        fresh = {"head": {name: fresh[name] for name in params["head"]}}
    params = {**fresh, **params, "head": fresh["head"]}
    return module, {**variables, "params": params}


def trainable(module: nn.Module, params: Mapping[str, Any]) -> Any:
    """A tree of bools like ``params``: False in the parts that ``frozen_stages`` freezes.

    And at the leaves that the module names in ``frozen_parameters``, as "layer/kernel". A network
    may be a field of the module, ``backbone`` of your own classifier, say.
    """
    frozen = getattr(module, "frozen_stages", -1)

    def trains(name: str) -> bool:
        if frozen < 0:
            return True
        if name.startswith("stage"):
            return int(name.removeprefix("stage").partition("_")[0]) > frozen
        last = name == "final_norm" and frozen >= len(module.stage_sizes)
        return not (name.startswith("stem_") or last)

    tree = {
        name: trainable(field, part)
        if isinstance(field := getattr(module, name, None), nn.Module)
        else jax.tree.map(lambda _, t=trains(name): t, part)
        for name, part in params.items()
    }
    leaves = flatten_dict(tree, sep="/")
    held = {name: False for name in getattr(module, "frozen_parameters", ()) if name in leaves}
    return unflatten_dict({**leaves, **held}, sep="/") if held else tree


class WeightsError(UserError):
    """Weights that do not fit a network.

    Attributes:
      missing: names that the network has and the weights lack.
      unexpected: names that the weights have and the network lacks.
      misshaped: {name: (shape there, shape in the network)}.
    """

    def __init__(self, what: str, missing: Any, unexpected: Any, misshaped: Mapping[str, Any]):
        self.missing, self.unexpected = tuple(sorted(missing)), tuple(sorted(unexpected))
        self.misshaped = dict(sorted(misshaped.items()))
        shapes = [f"{name} {have} for {want}" for name, (have, want) in self.misshaped.items()]
        lists = {"missing": self.missing, "unexpected": self.unexpected, "of another shape": shapes}
        some = [
            f"{len(names)} {kind} ({first_few(names)})" for kind, names in lists.items() if names
        ]
        super().__init__(f"{what}: {'; '.join(some)}")


class Naming(NamedTuple):
    """How a file calls and lays out a network's variables; as they are, unless said otherwise."""

    name: Callable[[Any], str] = lambda path: path
    """Path of a variable to its name in the file."""
    read: Callable[[Any, Any], Any] = lambda path, value: value
    """A path and an array in the file's layout to the array in ours."""
    write: Callable[[Any, Any], Any] = lambda path, value: value
    """A path and an array in our layout to the array in the file's."""

    def shape(self, path: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A variable's shape in the file's layout; nothing of that size is allocated."""
        axes = self.write(path, np.empty(range(2, 2 + len(shape)), np.float32)).shape
        return tuple(shape[axis - 2] if axis > 1 else 1 for axis in axes)


def match(
    what: str, needed: Mapping[Any, Any], given: Mapping[str, Any], naming: Naming | None = None
) -> dict[Any, Any]:
    """The arrays of ``given`` by the paths of ``needed`` and in their layout.

    Args:
      what: the start of an error's line.
      needed: shapes (``jax.ShapeDtypeStruct``) by path.
      given: arrays by name.
      naming: from paths to names; by default they are the same.

    Raises:
      WeightsError: what is missing, left over or of another shape, by the names of ``given``.
    """
    naming = naming or Naming()
    names = {path: naming.name(path) for path in needed}
    found = {p: naming.read(p, given[name]) for p, name in names.items() if name in given}
    misshaped = {
        names[path]: (given[names[path]].shape, naming.shape(path, needed[path].shape))
        for path, value in found.items()
        if value.shape != needed[path].shape
    }
    missing = [name for path, name in names.items() if path not in found]
    unexpected = given.keys() - set(names.values())
    if missing or unexpected or misshaped:
        raise WeightsError(what, missing, unexpected, misshaped)
    return found


def match_variables(module: nn.Module, want: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` in the form that ``module`` takes.

    Args:
      module: the network.
      want: shapes of its variables.
      given: variables, of blocks stacked or not; a head that is not wanted is dropped.

    Raises:
      WeightsError: what is missing, left over or of another shape.
      UserError: what is no floating-point array.
    """
    if isinstance(module, ResNet):
        given = (stack_blocks if module.scan_blocks else unstack_blocks)(module, given)
    have, need = (flatten_dict(dict(tree), sep="/") for tree in (given, want))
    if not any(key.startswith("params/head/") for key in need):
        have = {k: x for k, x in have.items() if k[:7] != "params/" or not is_top(k.split("/")[1])}
    dtypes = {key: getattr(value, "dtype", str) for key, value in have.items()}
    if odd := [key for key, dtype in dtypes.items() if not jnp.issubdtype(dtype, jnp.floating)]:
        raise UserError(f"the weights hold what is no floating-point array: {first_few(odd)}")
    # Input channels and classes are the differences that people meet: each has its own line.
    stem = "stem_conv1" if "params/stem_conv1/kernel" in need else "stem_conv"
    for key, axis, text in (
        (f"params/{stem}/kernel", 2, "input_shape has {0} channels, the weights' stem takes {1}: "
         "repeat or drop channels of the images, or leave out weights"),
        ("params/head/kernel", 1, "num_classes={0}, the weights' head has {1}: say num_classes={1} "
         "and then replace_head, or include_top=False"),
    ):  # fmt: skip
        if key in have and key in need and have[key].shape[axis] != need[key].shape[axis]:
            raise UserError(text.format(need[key].shape[axis], have[key].shape[axis]))
    found = match(f"the weights are not this {type(module).__name__}'s", need, have)
    return unflatten_dict({k: jnp.asarray(found[k], need[k].dtype) for k in need}, sep="/")
