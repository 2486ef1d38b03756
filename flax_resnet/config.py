"""The configuration of a run, and its record in the workdir."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
from flax import linen as nn

from flax_resnet import distributed
from flax_resnet.augment import Augment, NormalizationKind
from flax_resnet.checkpoints.checkpoints import CheckpointConfig
from flax_resnet.data import FREE, DataConfig
from flax_resnet.datasets.decode import PACKAGES
from flax_resnet.distributed import StateSharding
from flax_resnet.errors import POSITIVE, TryAgain, UserError, check_choices, check_range
from flax_resnet.guards import Guard
from flax_resnet.models import cifar_resnet
from flax_resnet.optim import SGD, Optimizer
from flax_resnet.records.configs import flatten, to_record, varying_fields
from flax_resnet.records.files import FULL, replacing
from flax_resnet.records.provenance import git_state, versions
from flax_resnet.tracking import AnyTracking, TensorBoard, Tracking
from flax_resnet.views import Views

# Fields of a network that say how it is computed and not what: a resumed run may change them.
FREE_MODEL_FIELDS = ("model.remat",)
RECORDED_PACKAGES = ("flax_resnet", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain",
                     "tensorflow-datasets", "numpy", *PACKAGES)  # fmt: skip
SHARED_SECONDS = 90.0
"""NFS remembers for up to 60 s that a directory held no such file."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run's numbers. Frozen: ``dataclasses.replace`` makes variants."""

    model: nn.Module = cifar_resnet(20)
    """The network; any field of the module can be set."""
    data: DataConfig = DataConfig()
    """Which images, and how they reach the devices."""
    augment: Augment = Augment()
    """Random changes to the training images, made on the device."""
    normalization: NormalizationKind = "channel"
    """Normalise by channel; by one mean and each pixel's deviation; by ImageNet's constants; as
    the pretrained weights want it."""
    weights: str | None = None
    """Start from these: a tag such as "imagenet", a weight file, a run's directory, or
    hf://OWNER/NAME@REVISION of the Hugging Face hub, where a commit as the revision stays the same.
    A head of another width starts afresh."""
    measure_norms: bool = False
    """Measure BatchNorm's statistics anew on the training split before the first step."""
    cache_features: bool = dataclasses.field(default=False, metadata=FREE)
    """Of a network frozen up to its head, compute the features once and train the head on them."""
    optimizer: Optimizer = SGD()
    """The optimizer and its learning-rate schedule."""
    num_epochs: float = 10.0
    """Length of the run in epochs, of ceil(training images / batch_size) steps each."""
    num_steps: int | None = None
    """Length of the run in optimizer steps, instead of num_epochs."""
    batch_size: int = 128
    """Images in one optimizer step, over all devices."""
    eval_batch_size: int = 512
    """Images in one evaluation step, over all devices."""
    accum_steps: int = 1
    """Cut each batch in so many parts and add up their gradients, to save memory."""
    loss: Literal["cross_entropy", "binary_cross_entropy"] = "cross_entropy"
    """Softmax cross-entropy, or the mean of a sigmoid cross-entropy for each class."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over the classes (Szegedy et al. 2016)."""
    target_threshold: float | None = None
    """With mixed labels and binary_cross_entropy: a class with a larger share is wholly there
    (Wightman et al. 2021, section 3.2; in timm's runs 0.2); None: targets are the shares."""
    dropblock_rise: float = 0.0
    """Share of the run over which the DropBlock rate rises evenly from 0 to the model's (Ghiasi et
    al. 2018, section 3: the whole run, 1); 0: the model's throughout."""
    ema_decay: float | None = None
    """Evaluate an exponential moving average of the parameters and statistics; None: off."""
    lookahead_steps: int = 0
    """Every so many steps the network goes on from that average (Zhang et al. 2019), of which
    ema_decay is kept at the end, and before as the cube of the share of the run; 0: never."""
    tta: Views = "none"
    """Evaluate the mean of an image and its mirror image ("flip"), and of both shifted by a pixel
    to two corners ("flip_shift", 6 views; K. Jordan 2024)."""
    seed: int = 0
    """Initialisation, order of the data, augmentation and dropout all follow from it."""
    eval_every_epochs: float = dataclasses.field(default=1.0, metadata=FREE)
    """Epochs between evaluations; the last step is always evaluated."""
    log_every_steps: int = dataclasses.field(default=50, metadata=FREE)
    """Steps between lines of training metrics."""
    checkpoint: CheckpointConfig = dataclasses.field(default=CheckpointConfig(), metadata=FREE)
    """When to save, where, and what to keep."""
    sharding: StateSharding = dataclasses.field(default="replicated", metadata=FREE)
    """What several devices split of the state: nothing; "zero", the optimizer's state and the
    average; "fsdp", the parameters too (Rajbhandari et al. 2020, section 5)."""
    steps_per_dispatch: int = dataclasses.field(default=1, metadata=FREE)
    """Steps that one call of the compiled program takes where nothing is logged, evaluated or saved
    between them; signals wait for all of them. It pays for small networks on an accelerator."""
    guard: Guard = dataclasses.field(default=Guard(), metadata=FREE)
    """What to do when the run goes wrong."""
    tracking: AnyTracking = dataclasses.field(default=TensorBoard(), metadata=FREE)
    """What shows the run's numbers, besides metrics.jsonl; it slows no step, nor fails the run."""
    profile_steps: int = dataclasses.field(default=0, metadata=FREE)
    """Trace so many steps, in whole dispatches, after the first few, into WORKDIR/profile."""

    def __post_init__(self) -> None:
        check_choices(self)
        if not isinstance(self.tracking, Tracking):
            raise UserError(
                f"tracking={self.tracking!r}: expected TensorBoard(), MLflow(), Wandb(), Off(), or "
                "a dataclass of yours that is a flax_resnet.Tracking"
            )
        for name in ("batch_size", "eval_batch_size", "accum_steps", "log_every_steps",
                     "num_steps", "steps_per_dispatch"):  # fmt: skip
            check_range(name, getattr(self, name), 1)
        for name in ("profile_steps", "dropblock_rise", "lookahead_steps"):
            check_range(name, getattr(self, name), 0)
        check_range("num_epochs", self.num_epochs, POSITIVE)
        check_range("eval_every_epochs", self.eval_every_epochs, POSITIVE)
        check_range("label_smoothing", self.label_smoothing, 0, 1)
        check_range("target_threshold", self.target_threshold, 0, 1)
        check_range("ema_decay", self.ema_decay, POSITIVE, 1)
        check_range("seed", self.seed, 0, 2**32)
        if self.dropblock_rise and not getattr(self.model, "dropblock_rate", 0):
            raise UserError(
                f"dropblock_rise={self.dropblock_rise} and the model has no DropBlock: set "
                "model.dropblock_rate, or leave dropblock_rise at 0"
            )
        if self.target_threshold is not None and self.loss != "binary_cross_entropy":
            raise UserError(
                f"target_threshold={self.target_threshold} with loss={self.loss!r}: its targets "
                "have to sum to one; set --loss binary_cross_entropy, or leave it out"
            )
        if self.lookahead_steps and self.ema_decay is None:
            raise UserError(
                f"lookahead_steps={self.lookahead_steps} without an average to go on from: set "
                "--ema-decay, 0.77 in airbench"
            )
        if self.tta != "none" and self.cache_features:
            raise UserError(
                f"tta={self.tta!r} with cache_features: features have no mirror image; leave one "
                "out"
            )


def free_fields(config: Any, prefix: str = "", free: bool = False) -> set[str]:
    """Dotted names of the fields that a resumed run may change."""
    names = {prefix} if free else set()
    if dataclasses.is_dataclass(config) and not isinstance(config, nn.Module):
        for field in dataclasses.fields(config):
            name = f"{prefix}.{field.name}" if prefix else field.name
            inner = free or field.metadata.get("free", False)
            names |= free_fields(getattr(config, field.name), name, inner)
    return names


def differences(there: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """What a recorded run and a config disagree on, as ``field: there X, here Y``."""
    old, new = flatten(there), flatten(to_record(config))
    free = {*free_fields(config), *FREE_MODEL_FIELDS}
    absent = "not a field"
    return [
        f"{name}: there {old.get(name, absent)}, here {new.get(name, absent)}"
        for name in sorted(varying_fields([old, new]))
        if not any(name == field or name.startswith(f"{field}.") for field in free)
        # A field that came after the run was begun stands for what was done before.
        if name in old or not _is_default(config, name)
    ]


def check_same_config(what: str, there: Mapping[str, Any], config: TrainConfig) -> None:
    """Raises UserError where a recorded run's config is not ``config``."""
    if fields := differences(there, config):
        more = f"; and {len(fields) - 3} more" if len(fields) > 3 else ""
        raise UserError(
            f"{what} of another config ({'; '.join(fields[:3])}{more}): choose another --workdir, "
            "or the same config to resume"
        )


def _is_default(config: Any, name: str) -> bool:
    """Whether the field of a dotted name has the value that it has by itself."""
    outer, _, last = name.rpartition(".")
    try:
        owner = functools.reduce(getattr, outer.split("."), config) if outer else config
        return bool(getattr(owner, last) == type(owner).__dataclass_fields__[last].default)
    except (AttributeError, KeyError):
        return False


def check_workdir(workdir: Path, config: TrainConfig) -> None:
    """Makes sure that a run of ``config`` can live in ``workdir``; writes nothing.

    Raises:
      UserError: another config's run is there, or it cannot be written.
    """
    existing = workdir
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"--workdir {workdir} cannot be written ({existing} is "
            f"{'not writable' if existing.is_dir() else 'not a directory'}): choose another"
        )
    path = workdir / "config.json"
    if not path.exists():
        if (workdir / "checkpoints").exists():
            raise UserError(
                f"--workdir {workdir} holds checkpoints and no config.json: choose another"
            )
        return
    try:
        record = json.loads(path.read_text())
        there, _ = record["config"], record["starts"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a run's record ({error!r}): choose another") from error
    check_same_config(f"--workdir {workdir} holds a run", there, config)


@contextlib.contextmanager
def claimed(workdir: Path, config: TrainConfig) -> Iterator[None]:
    """Makes the workdir, writes the record, and keeps other runs of this machine out of it.

    Raises:
      UserError: it cannot be written, or its disk is full when the block is left.
      TryAgain: another process is running in it, or not all processes see it.
    """
    is_claimed = False
    with contextlib.ExitStack() as stack:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                directory = os.open(workdir, os.O_RDONLY)
                stack.callback(os.close, directory)
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a dead process lets go
                write_record(workdir, config)
            _check_shared(workdir)
            is_claimed = True
            yield
        except OSError as error:
            if is_claimed and error.errno not in FULL:
                raise
            if isinstance(error, BlockingIOError):
                raise TryAgain(
                    f"--workdir {workdir} is in use by another process: wait for it, or choose "
                    "another"
                ) from error
            raise UserError(
                f"--workdir {workdir} cannot be written ({error}): make room, and the same command "
                "goes on from the last checkpoint, or choose another"
            ) from error


def _check_shared(workdir: Path) -> None:
    """Raises TryAgain in a process that does not see the record that the lead has written."""
    if jax.process_count() == 1:
        return

    def starts() -> int:
        try:
            return len(json.loads((workdir / "config.json").read_text())["starts"])
        except (OSError, ValueError, KeyError):
            return 0

    written = distributed.same_everywhere(starts())
    for _ in range(int(SHARED_SECONDS / 0.5)):
        if starts() == written:
            return
        time.sleep(0.5)
    raise TryAgain(
        f"--workdir {workdir} is not the same directory in process {jax.process_index()} as in "
        "process 0: put it on a file system that all hosts share"
    )


def write_record(workdir: Path, config: TrainConfig) -> None:
    """Writes config.json: the config, and for each start of the run what it ran on."""
    path = workdir / "config.json"
    starts = json.loads(path.read_text())["starts"] if path.exists() else []
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "argv": sys.argv,
        "git": git_state(),
        "python": sys.version.split()[0],
        "packages": versions(RECORDED_PACKAGES),
        "devices": [d.device_kind for d in jax.devices()],
        "platform": jax.default_backend(),
        "processes": jax.process_count(),
        "cpu_cores": os.cpu_count(),
    }
    write_json(path, {"config": to_record(config), "starts": [*starts, start]})


def write_json(path: Path, value: Any) -> None:
    """Writes JSON whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n")
