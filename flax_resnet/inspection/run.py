"""A run's working directory, opened to look into: its record, a checkpoint, its data."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import linen as nn

from flax_resnet import models
from flax_resnet.data.batches import Data
from flax_resnet.data.normalization import normalize
from flax_resnet.distributed import sharding
from flax_resnet.models import ResNet
from flax_resnet.records.run_dir import data_config, read_config
from flax_resnet.weights.imagenet import class_name
from flax_resnet.weights.loading import read_checkpoint, saved_variables

Which = Literal["best", "latest"]


@dataclasses.dataclass(frozen=True)
class Inspected:
    """A run with the variables of one checkpoint."""

    workdir: Path
    """Its working directory."""
    config: Any
    """Its TrainConfig."""
    step: int
    """The checkpoint's."""
    module: nn.Module
    """The network; blocks are not scanned."""
    variables: Any
    """{"params", "batch_stats"} on the device, the averaged ones where the run kept an average."""
    stats: Any
    """What ``normalization.normalize`` takes."""
    key: jax.Array
    """The key data of the run's steps."""
    image_shape: tuple[int, int, int]
    """(H, W, C) of a training image."""
    class_names: tuple[str, ...]
    """Name of each class."""
    data_record: dict[str, Any]
    """What the checkpoint says of the data."""

    @property
    def title(self) -> str:
        """The network and the data, in a few words."""
        return f"{models.network_name(self.config.model)} on {self.config.data.title}"

    @functools.cached_property
    def data(self) -> Data:
        """The run's data, on one device.

        Raises:
          UserError: they are not there any more, or not those that the run was trained on.
        """
        data_config(self.workdir, self.config)  # is its folder there?
        mesh = sharding.data_mesh(jax.local_devices()[:1])
        with_rows = self.config.augment.alternating_flip
        data = Data(self.config.data, mesh, self.config.model.num_classes, with_rows=with_rows)
        data.check_same(self.data_record, self.workdir)
        return data

    def normalized(self, images: np.ndarray) -> jax.Array:
        """uint8 images (N, H, W, C) as the network takes them."""
        return normalize(jax.numpy.asarray(images), self.stats)

    def class_name(self, index: int) -> str:
        """What to call a class; the network may have more outputs than the data have classes."""
        return class_name(self.class_names, index)


def open_run(
    workdir: str | Path,
    checkpoint: Which = "best",
    *,
    folder: str | None = None,
    data_dir: str | None = None,
) -> Inspected:
    """Opens a run; its data are opened when they are asked for.

    Args:
      workdir: of a run that has saved a checkpoint.
      checkpoint: "best" by evaluation top-1 (the latest where none was kept by it), or "latest".
      folder: where the run's folder of images is now; None where it was.
      data_dir: where the run's tfds set is now; None where it was.

    Raises:
      UserError: there is no run or no checkpoint, or it cannot be read.
    """
    workdir = Path(workdir).expanduser()
    config = read_config(workdir)
    moved = {"folder": folder or config.data.folder, "data_dir": data_dir or config.data.data_dir}
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **moved))
    state, meta = read_checkpoint(workdir, checkpoint)
    module = config.model
    variables = saved_variables(module, state)
    if isinstance(module, ResNet):
        module = module.clone(scan_blocks=False, remat=False)
    here = jax.local_devices()[0]
    return Inspected(
        workdir=workdir,
        config=config,
        step=meta["step"],
        module=module,
        variables=jax.device_put(variables, here),
        stats=jax.device_put(state["normalization"], here),
        key=jax.device_put(state["key"], here),
        image_shape=models.check_shape(meta["image_shape"]),
        class_names=tuple(meta["class_names"]),
        data_record=meta,
    )
