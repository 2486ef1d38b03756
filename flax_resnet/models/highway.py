"""Highway networks (Srivastava, Greff and Schmidhuber 2015, "Training Very Deep Networks").

A highway layer mixes what it computes with what it was given, y = T(x) H(x) + (1 - T(x)) x,
by a learned transform gate T. Here it is the family's block skeleton with one convolution and
``connection="highway"``; the other blocks take that connection as well, so plain, residual and
highway networks of one layout differ by one field.
"""

from __future__ import annotations

from typing import Any

from flax_resnet.errors import UserError
from flax_resnet.models.blocks import Block, ConvSpec
from flax_resnet.models.resnet import ResNet


class HighwayLayer(Block):
    """One 3x3 convolution, its norm and ReLU: H of the paper's section 2."""

    def convs(self) -> tuple[ConvSpec, ...]:
        """A single 3x3."""
        return (ConvSpec(self.filters, 3, self.strides, self.first_dilation),)


def highway_net(depth: int, **fields: Any) -> ResNet:
    """A highway network for small images: a convolution, depth - 2 highway layers, a dense head.

    The layers are spread evenly over three stages. Where a stage changes the shape, the input
    is carried by subsampling and zero-padding (shortcut A), the paper's first way (section 2.1).
    Widths are those of the CIFAR residual networks, since the paper's differ from net to net.

    Args:
      depth: weighted layers; 19 and 32 in the paper, 5 or more.
      **fields: any field of ResNet, over these.

    Raises:
      UserError: ``depth`` is too small.
    """
    if depth < 5:
        raise UserError(f"depth {depth}: expected 5 or more, three layers, a stem and a head")
    sizes = tuple((depth - stage) // 3 for stage in range(3))
    own = {
        "block_cls": HighwayLayer,
        "connection": "highway",
        "num_filters": 16,
        "num_classes": 10,
        "stem": "cifar",
        "shortcut": "A",
    }
    return ResNet(stage_sizes=sizes, **{**own, **fields})
