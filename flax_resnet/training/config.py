"""The configuration of a run."""

from __future__ import annotations

import dataclasses
from typing import Literal

from flax import linen as nn

from flax_resnet.checkpoints.checkpoints import CheckpointConfig
from flax_resnet.data.augment import Augment
from flax_resnet.data.config import FREE, DataConfig
from flax_resnet.data.normalization import NormalizationKind
from flax_resnet.data.tta import Views
from flax_resnet.distributed.sharding import StateSharding
from flax_resnet.errors import POSITIVE, UserError, check_range, check_types
from flax_resnet.models import cifar_resnet
from flax_resnet.optim.optimizers import SGD, Optimizer
from flax_resnet.tracking import AnyTracking, TensorBoard
from flax_resnet.training.guards import Guard


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
        check_types(self)
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
