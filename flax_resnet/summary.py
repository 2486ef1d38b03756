"""What a network is made of: a table of its layers, and what it costs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.extend.core import Var
from rich.console import Console
from rich.table import Table

from flax_resnet.models import ResNet

COUNTED = (nn.Conv, nn.Dense, nn.BatchNorm)
FLOPS_A_MAC = {"train": 6, "eval": 2}
"""A multiply-add is two operations; the backward pass has one of each for inputs and weights."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer, or the sum over the layers of one part.

    Attributes:
      name: path of the layer, with dots.
      kind: what it is, kernel and stride included.
      shape: of its output, without the batch axis.
      parameters: trainable values.
      macs: multiply-adds of convolutions and dense layers, for one image.
      activation: values in its output, for one image.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    macs: int
    activation: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """A network's layers and totals.

    Attributes:
      rows: the layers, in the order in which they are called.
      parameters: trainable values.
      statistics: running means and variances.
      macs: multiply-adds of convolutions and dense layers, for one image, as papers and
        torchvision count "FLOPs"; norms, ReLUs, sums and pools are left out.
      outputs: values in the outputs of the rows, for one image.
      output_bytes: bytes of one of these values.
      kept_bytes: what reverse-mode differentiation keeps for the backward pass of one batch,
        before XLA fuses or recomputes anything; parameters, copies of them, and the input are
        not in it.
      batch_size: images in that batch.
    """

    rows: tuple[Row, ...]
    parameters: int
    statistics: int
    macs: int
    outputs: int
    output_bytes: int
    kept_bytes: int
    batch_size: int


def summarize(module: nn.Module, input_shape: tuple[int, int, int], batch_size: int = 1) -> Summary:
    """Counts a network without computing any of it.

    Args:
      module: the network; scanned blocks are listed one by one, ``remat`` is honoured in
        ``kept_bytes``.
      input_shape: (H, W, C).
      batch_size: images in the batch whose activation memory is counted.
    """
    rows, variables = count_layers(module, input_shape)
    batch = jax.ShapeDtypeStruct((batch_size, *input_shape), jnp.float32)
    dtype = getattr(module, "dtype", None) or "float32"
    return Summary(
        rows=rows,
        parameters=_size(variables["params"]),
        statistics=_size(variables.get("batch_stats", {})),
        macs=sum(row.macs for row in rows),
        outputs=sum(row.activation for row in rows),
        output_bytes=jnp.dtype(dtype).itemsize,
        kept_bytes=_kept_bytes(_unrolled(module), variables, batch),
        batch_size=batch_size,
    )


def count_layers(
    module: nn.Module, input_shape: tuple[int, int, int]
) -> tuple[tuple[Row, ...], Any]:
    """(a row for each convolution, norm and dense layer as they are called, variables' shapes)."""
    plain = _unrolled(module, remat=False)
    images = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    rows: list[Row] = []
    with nn.intercept_methods(_recorder(rows)):
        variables = jax.eval_shape(lambda x: plain.init(jax.random.key(0), x, train=False), images)
    return tuple(rows), variables


def _unrolled(module: nn.Module, **fields: Any) -> nn.Module:
    return module.clone(scan_blocks=False, **fields) if isinstance(module, ResNet) else module


def _recorder(rows: list[Row]) -> Callable[..., Any]:
    """An interceptor that appends a row for each call of a layer."""

    def record(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        out = call(*args, **kwargs)
        layer = context.module
        if isinstance(layer, COUNTED) and context.method_name == "__call__":
            params, shape, macs = layer.variables["params"], out.shape[1:], 0
            if "kernel" in params:
                macs = math.prod(params["kernel"].shape) * math.prod(shape[:-1])
            kind = _conv_kind(layer) if isinstance(layer, nn.Conv) else type(layer).__name__
            name = ".".join(layer.path)
            rows.append(Row(name, kind, shape, _size(params), macs, math.prod(shape)))
        return out

    return record


def _conv_kind(conv: Any) -> str:
    """Such as "Conv 3x3 /2 groups 32"."""
    fields = {
        " /": conv.strides[0],
        " groups ": conv.feature_group_count,
        " dilation ": conv.kernel_dilation[0],
    }
    others = "".join(f"{label}{value}" for label, value in fields.items() if value != 1)
    return "Conv {}x{}".format(*conv.kernel_size) + others


def _size(tree: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def _kept_bytes(module: nn.Module, variables: Any, batch: jax.ShapeDtypeStruct) -> int:
    """Bytes of the arrays that a vjp of the training forward pass closes over."""
    rest = {name: tree for name, tree in variables.items() if name != "params"}

    def kept(params: Any, rest: Any, x: jax.Array) -> Any:
        def forward(params: Any) -> Any:
            return module.apply(
                {"params": params, **rest},
                x,
                train=True,
                mutable=list(rest),
                rngs={"dropout": jax.random.key(0)},
            )

        _, backward, _ = jax.vjp(forward, params, has_aux=True)
        return jax.tree.leaves(backward)

    program = jax.make_jaxpr(kept)(variables["params"], rest, batch).jaxpr
    # What does not come from the images is parameters, or copies of them in another dtype.
    batched = {program.invars[-1]}
    for equation in program.eqns:
        if any(isinstance(v, Var) and v in batched for v in equation.invars):
            batched.update(equation.outvars)
    kept_arrays = {v for v in program.outvars if isinstance(v, Var) and v in batched}
    arrays: list[Any] = [v.aval for v in kept_arrays - set(program.invars)]
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays)


def by_part(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """One row for each part of the network (a block, the head, ...) in place of its layers."""
    parts: dict[str, list[Row]] = {}
    for row in rows:
        parts.setdefault(row.name.partition(".")[0], []).append(row)
    return tuple(
        Row(
            name,
            group[0].kind if len(group) == 1 else f"{len(group)} layers",
            group[-1].shape,
            sum(row.parameters for row in group),
            sum(row.macs for row in group),
            sum(row.activation for row in group),
        )
        for name, group in parts.items()
    )


def show(
    title: str, summary: Summary, *, parts: bool = False, console: Console | None = None
) -> None:
    """Prints the table and the totals.

    Args:
      title: heads the table.
      summary: what ``summarize`` counted.
      parts: a line for each block rather than for each layer.
      console: where to; by default the standard output.
    """
    console = console or Console(width=None if Console().is_terminal else 120)
    megabyte = summary.output_bytes * summary.batch_size / 1e6
    table = Table(title=title, title_justify="left")
    for name in ("layer", "kind", "output"):
        table.add_column(name, no_wrap=True)
    for name in ("parameters", "multiply-adds", f"MB, batch of {summary.batch_size}"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in by_part(summary.rows) if parts else summary.rows:
        shape = "x".join(map(str, row.shape))
        values = (f"{row.parameters:,}", f"{row.macs:,}", f"{row.activation * megabyte:.3f}")
        table.add_row(row.name, row.kind, shape, *values)
    console.print(table)
    console.print(
        f"parameters {summary.parameters:,}; running statistics {summary.statistics:,}\n"
        f"multiply-adds {summary.macs:,} for one image ({summary.macs / 1e9:.3f} G; convolutions "
        "and dense layers)\n"
        f"activation memory of a batch of {summary.batch_size}: these layers' outputs "
        f"{summary.outputs * megabyte:,.1f} MB; kept for the backward pass "
        f"{summary.kept_bytes / 1e6:,.1f} MB (before XLA's fusion)",
        soft_wrap=True,
        highlight=False,
    )
