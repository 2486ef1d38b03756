"""What a network is made of: a table of its layers, and what they cost.

``flax.linen.tabulate`` counts the FLOPs of every operation; papers count multiply-adds of
convolutions and dense layers, which are counted here, without computing anything.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_resnet.models import ResNet
from flax_resnet.records import text_tables

COUNTED = (nn.Conv, nn.Dense, nn.BatchNorm)
FLOPS_A_MAC = {"train": 6, "eval": 2}
"""A multiply-add is two operations; the backward pass has one of each for inputs and weights."""


class Row(NamedTuple):
    """One layer, or the sum over the layers of one part.

    Attributes:
      name: path of the layer, with dots.
      kind: what it is, kernel and stride included.
      shape: of its output, without the batch axis.
      parameters: trainable values.
      macs: multiply-adds of convolutions and dense layers, for one image.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    macs: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """A network's layers and totals.

    Attributes:
      rows: the layers, in the order in which they are called.
      parameters: trainable values.
      statistics: running means and variances.
      macs: multiply-adds of convolutions and dense layers, for one image, as papers and
        torchvision count "FLOPs"; norms, ReLUs, sums and pools are left out.
      output_bytes: bytes of the outputs of the rows, for one batch.
    """

    rows: tuple[Row, ...]
    parameters: int
    statistics: int
    macs: int
    output_bytes: int


def summarize(module: nn.Module, input_shape: tuple[int, int, int], batch_size: int = 1) -> Summary:
    """Counts a network without computing any of it.

    Args:
      module: the network; scanned blocks are listed one by one.
      input_shape: (H, W, C).
      batch_size: images in the batch whose ``output_bytes`` are counted.
    """
    if isinstance(module, ResNet):
        module = module.clone(scan_blocks=False, remat=False)
    images = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    rows: list[Row] = []

    def record(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        out, layer = call(*args, **kwargs), context.module
        if isinstance(layer, COUNTED) and context.method_name == "__call__":
            params, shape = layer.variables["params"], out.shape[1:]
            macs = params["kernel"].size * math.prod(shape[:-1]) if "kernel" in params else 0
            rows.append(Row(".".join(layer.path), _kind(layer), shape, _size(params), macs))
        return out

    with nn.intercept_methods(record):
        variables = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=False), images)
    itemsize = jnp.dtype(getattr(module, "dtype", None) or "float32").itemsize
    return Summary(
        rows=tuple(rows),
        parameters=_size(variables["params"]),
        statistics=_size(variables.get("batch_stats", {})),
        macs=sum(row.macs for row in rows),
        output_bytes=sum(math.prod(row.shape) for row in rows) * itemsize * batch_size,
    )


def _kind(layer: Any) -> str:
    """Such as "Dense", "Conv 3x3 /2 groups 32"."""
    if not isinstance(layer, nn.Conv):
        return type(layer).__name__
    conv: Any = layer
    others = {" /": conv.strides[0], " groups ": conv.feature_group_count,
              " dilation ": conv.kernel_dilation[0]}  # fmt: skip
    kind = "Conv " + "x".join(map(str, conv.kernel_size))
    return kind + "".join(f"{label}{value}" for label, value in others.items() if value != 1)


def _size(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


def by_part(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """One row for each part of the network (a block, the head, ...) in place of its layers."""
    parts = []
    for name, layers in itertools.groupby(rows, lambda row: row.name.partition(".")[0]):
        group = list(layers)
        kind = group[0].kind if len(group) == 1 else f"{len(group)} layers"
        sums = (sum(row.parameters for row in group), sum(row.macs for row in group))
        parts.append(Row(name, kind, group[-1].shape, *sums))
    return tuple(parts)


def show(title: str, summary: Summary, *, parts: bool = False) -> None:
    """Prints the table and the totals; with ``parts`` a line for each block, not each layer."""
    header = ("layer", "kind", "output", "parameters", "multiply-adds")
    rows = [
        (row.name, row.kind, "x".join(map(str, row.shape)), f"{row.parameters:,}", f"{row.macs:,}")
        for row in (by_part(summary.rows) if parts else summary.rows)
    ]
    text_tables.show(title, rows, header, numbers=2)
    print(
        f"parameters {summary.parameters:,}; running statistics {summary.statistics:,}\n"
        f"multiply-adds {summary.macs:,} for one image ({summary.macs / 1e9:.3f} G; convolutions "
        "and dense layers)\n"
        f"outputs of these layers {summary.output_bytes / 1e6:,.1f} MB for the batch"
    )
