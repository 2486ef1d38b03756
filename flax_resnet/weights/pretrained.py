"""A network with its weights, and what they were trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from flax_resnet import models
from flax_resnet.data.preprocess import Preprocessing

Variables = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A network with its weights, and what they were trained on."""

    module: nn.Module
    """The network."""
    variables: Variables
    """{"params", "batch_stats"}: numpy arrays, blocks not stacked."""
    preprocessing: Preprocessing | None
    """How images are prepared for the weights; None where it is not known."""
    class_names: tuple[str, ...] | None = None
    """Name of each class, where they are known."""
    network: str | None = None
    """Name of the network, of published weights."""
    certain: bool = False
    """The file says what network it is of by more than its shapes."""
    assumed: str = ""
    """Whose preprocessing was taken, where neither the file nor one beside it says any."""

    @property
    def name(self) -> str:
        """What to call the network."""
        return self.network or models.network_name(self.module)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the images that the network takes."""
        if self.preprocessing is not None:
            return self.preprocessing.shape
        return image_shape(self.module, self.variables)


def image_shape(module: nn.Module, variables: Variables | None = None) -> tuple[int, int, int]:
    """(H, W, C): the size that a network was made for, the channels that its variables take."""
    height, width, channels = models.default_shape(module)
    params = {} if variables is None else variables["params"]
    for stem in ("stem_conv1", "stem_conv"):
        if stem in params:
            return height, width, params[stem]["kernel"].shape[2]
    return height, width, channels
