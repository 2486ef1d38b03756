"""A run's working directory, opened to look into: its record, a checkpoint, its data."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import linen as nn

from flax_resnet import distributed, models
from flax_resnet.augment import normalize
from flax_resnet.data import Data
from flax_resnet.errors import UserError
from flax_resnet.models import ResNet
from flax_resnet.records.configs import from_record, untracked
from flax_resnet.weights.imagenet_classes import class_name
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
    """What ``augment.normalize`` takes."""
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

    @property
    def eval_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of an evaluation image."""
        channels = self.image_shape[2]
        side = self.config.data.decoder(channels).side
        return self.image_shape if side is None else (side, side, channels)

    @functools.cached_property
    def data(self) -> Data:
        """The run's data, on one device.

        Raises:
          UserError: they are not there any more, or not those that the run was trained on.
        """
        mesh = distributed.data_mesh(jax.local_devices()[:1])
        with_rows = self.config.augment.alternating_flip
        found = Data(self.config.data, mesh, self.config.model.num_classes, with_rows=with_rows)
        for name, here in found.describe().items():
            if self.data_record[name] != here:
                raise UserError(
                    f"{self.workdir} was trained on data with {name} {self.data_record[name]!s:.80}"
                    f" and it is {here!s:.80} now: put the same data back"
                )
        return found

    def normalized(self, images: np.ndarray) -> jax.Array:
        """uint8 images (N, H, W, C) as the network takes them."""
        return normalize(jax.numpy.asarray(images), self.stats)

    def class_name(self, index: int) -> str:
        """What to call a class; the network may have more outputs than the data have classes."""
        return class_name(self.class_names, index)


def open_run(workdir: str | Path, checkpoint: Which = "best") -> Inspected:
    """Opens a run; its data are opened when they are asked for.

    Args:
      workdir: of a run that has saved a checkpoint.
      checkpoint: "best" by evaluation top-1 (the latest where none was kept by it), or "latest".

    Raises:
      UserError: there is no run or no checkpoint, or it cannot be read.
    """
    workdir = Path(workdir).expanduser()
    config = read_record(workdir)[0]
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


def read_record(workdir: str | Path) -> tuple[Any, dict[str, Any]]:
    """(TrainConfig, all that config.json holds: "config" as JSON values, and "starts").

    Raises:
      UserError: there is no run, or its record cannot be read.
    """
    path = Path(workdir).expanduser() / "config.json"
    try:
        record = json.loads(path.read_text())
        return from_record(untracked(record["config"])), record
    except FileNotFoundError:
        raise UserError(f"{workdir} holds no run: expected a config.json there") from None
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a run's record ({error!r}): give another run") from error


def variants(path: str | Path) -> list[tuple[str, list[Path]]]:
    """[(name, working directories of its seeds)] of a run, a variant or a sweep.

    Raises:
      UserError: the directory holds none of these.
    """
    path = Path(path).expanduser()
    if (path / "config.json").is_file():
        return [(path.name, [path])]
    below = [*path.glob("seed*/config.json")] or [*path.glob("*/seed*/config.json")]
    groups: dict[Path, list[Path]] = {}
    seeds = [file.parent for file in below]
    for seed in sorted(seeds, key=lambda path: (path.parent, len(path.name), path.name)):
        groups.setdefault(seed.parent, []).append(seed)
    if not groups:
        raise UserError(
            f"{path} holds no run: expected a working directory (config.json), a variant "
            "(seedN/config.json) or a sweep (VARIANT/seedN/config.json)"
        )
    return [(variant.name, seeds) for variant, seeds in groups.items()]
