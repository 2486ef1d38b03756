"""The commands names and summary: the networks, and the layers of one."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from flax_resnet import models
from flax_resnet.cli.flags import Positional, Switch, flag
from flax_resnet.errors import check_range
from flax_resnet.models import summary
from flax_resnet.weights.published import tags


@dataclasses.dataclass(frozen=True)
class Names:
    """Lists the networks that have a name.

    Examples:
      flax-resnet names --weights | grep resnet50
    """

    weights: Switch = False
    """With the tags of their weights."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """Prints a network's layers with output shapes, parameters and multiply-adds, and the
    totals. Nothing is computed.

    Examples:
      flax-resnet summary resnet50 --parts
      flax-resnet summary resnet20 --num-classes 5 --input-shape 64 64 1
    """

    name: Annotated[Positional[str], flag("NAME")]
    """A network that `flax-resnet names` lists."""
    num_classes: Annotated[int | None, flag("N", "the network's own")] = None
    """Width of the head."""
    input_shape: Annotated[
        tuple[int, int, int] | None, flag("H W C", "224 224 3, of CIFAR nets 32 32 3")
    ] = None
    """Of one image."""
    batch_size: int = 1
    """Images whose outputs are counted in MB."""
    dtype: str = "float32"
    """Of the computation."""
    no_top: Switch = False
    """Leave out the head."""
    parts: Switch = False
    """A line for each block, not each layer."""

    def __post_init__(self) -> None:
        check_range("--batch-size", self.batch_size, 1)


def list_names(settings: Names) -> None:
    """``flax-resnet names``."""
    for name in models.names():
        print(" ".join([name, *(tags(name) if settings.weights else ())]))


def show_summary(settings: Summary) -> None:
    """``flax-resnet summary``."""
    fields: dict[str, Any] = {"include_top": False} if settings.no_top else {}
    if settings.num_classes is not None:
        fields["num_classes"] = settings.num_classes
    module = models.create(settings.name, dtype=settings.dtype, **fields)
    shape = models.check_shape(settings.input_shape or models.default_shape(module))
    title = f"{settings.name}, input {'x'.join(map(str, shape))}"
    summary.show(title, summary.summarize(module, shape, settings.batch_size), parts=settings.parts)
