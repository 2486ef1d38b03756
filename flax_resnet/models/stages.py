"""Stages of a residual network: names of their blocks, and feature maps."""

from __future__ import annotations

import jax
from flax import struct


@struct.dataclass
class Feature:
    """What one stage gives.

    Attributes:
      map: (N, ceil(H / stride), ceil(W / stride), width).
      name: "stage1", "stage2", ...
      stride: pixels of the input from one pixel of the map to the next.
      width: channels.
    """

    map: jax.Array
    name: str = struct.field(pytree_node=False)
    stride: int = struct.field(pytree_node=False)
    width: int = struct.field(pytree_node=False)


def block_name(stage: int, index: int) -> str:
    """Name of a block, of stage and index from 0: "stage1_block1"."""
    return f"stage{stage + 1}_block{index + 1}"


def blocks_name(stage: int) -> str:
    """Name of a stage's scanned blocks, with a leading axis: "stage1_blocks"."""
    return f"stage{stage + 1}_blocks"
