"""ResNet-50 on ImageNet, by the recipes that others' figures were reached with.

Claim: the network stays, v1.5 of 25.6 million parameters, and the recipe alone is worth two points
and more: --recipe 90 is that of Goyal et al. 2017 (90 epochs, SGD 0.1 for each 256 images, the rate
a tenth after 30, 60 and 80), nvidia that of DeepLearningExamples (90 epochs, one cosine, label
smoothing), a1, a2 and a3 those of Wightman et al. 2021, "ResNet strikes back", table 2 (600, 300
and 100 epochs of LAMB, binary cross-entropy, mixup and CutMix, RandAugment; a3 trains at 160 pixels
and is evaluated at 224). Computed in bfloat16, parameters in float32.

Command: python -m experiments.imagenet_resnet --recipe a3 --data.data-dir DIR
What of a batch does not fit: --accum-steps 4. Then, as in the published runs, where each GPU did so
for itself, BatchNorm sees a part of the batch: 32 images (90), 256 (nvidia), 512 (a1 to a3).
With another --batch-size scale the rate too: --optimizer.learning-rate.
Hardware: not run.
Published: top-1 at 224 pixels, centre crop. 90: 76.3 % (Goyal et al., error 23.7 +- 0.1),
76.13 % (torchvision's tv_v1, which has no warm-up, drops at 30 and 60, and decays every parameter:
--optimizer.decay-norm-and-bias). nvidia: 77.1 % +- 0.1. a1 80.4 %, a2 79.8 %, a3 78.1 % (timm's
weights of the same: 80.38, 79.77, 78.05).

Where these differ from what was published: images are resized bilinearly (a1 to a3: bicubic), in
RandAugment too; nvidia initialises by fan-in; LAMB's trust ratio holds for biases and BatchNorm's
parameters too (timm: for kernels alone); a1 smooths the two labels of a mixed image after they have
been set to 1; the rate moves with each step (timm: each epoch) and ends at 0 (1e-6); with repeated
augmentation three epochs go through all images once (timm: a third of a fresh order each epoch).
"""

from typing import Any, Literal

from flax_resnet import (
    LAMB,
    SGD,
    Augment,
    Cosine,
    DataConfig,
    Piecewise,
    ResNet,
    TrainConfig,
    UserError,
    imagenet_resnet,
    linear_scaled_lr,
)
from flax_resnet.cli.experiment import main

Recipe = Literal["90", "nvidia", "a1", "a2", "a3"]


def get_config(recipe: Recipe = "90", depth: int = 50) -> TrainConfig:
    """A published recipe, for a ResNet of 18, 34, 50, 101, 152 or 200 layers."""
    if recipe == "90":
        return goyal(depth)
    if recipe == "nvidia":
        return nvidia(depth)
    if recipe in ("a1", "a2", "a3"):
        return strikes_back(recipe, depth)
    raise UserError(f"recipe {recipe!r}: expected 90, nvidia, a1, a2 or a3")


def goyal(depth: int) -> TrainConfig:
    """Goyal et al. 2017, section 5.1: "90".

    They warm up from 0.1, which at a batch of 256 is no warm-up; here the rate rises from 0.
    """
    batch_size, epochs, warmup = 256, 90, 5
    return TrainConfig(
        model=_network(depth, zero_init_last=True),
        data=_images(224, crop_ratio=0.875),
        augment=Augment(flip=True),
        normalization="imagenet",
        optimizer=SGD(
            learning_rate=linear_scaled_lr(0.1, batch_size),
            schedule=Piecewise(
                warmup=warmup / epochs,
                boundaries=tuple((e - warmup) / (epochs - warmup) for e in (30, 60, 80)),
            ),
            momentum=0.9,
            weight_decay=1e-4,
        ),
        batch_size=batch_size,
        num_epochs=epochs,
        log_every_steps=200,
    )


def nvidia(depth: int) -> TrainConfig:
    """NVIDIA's DeepLearningExamples, ResNet-50 v1.5 for PyTorch, 90 epochs, 8 GPUs of 256."""
    batch_size, epochs = 2048, 90
    return TrainConfig(
        model=_network(depth),
        data=_images(224, crop_ratio=0.875),
        augment=Augment(flip=True),
        normalization="imagenet",
        optimizer=SGD(
            learning_rate=linear_scaled_lr(0.256, batch_size),
            schedule=Cosine(warmup=8 / epochs),
            momentum=0.875,
            weight_decay=1 / 32768,
        ),
        batch_size=batch_size,
        num_epochs=epochs,
        label_smoothing=0.1,
    )


def strikes_back(recipe: Literal["a1", "a2", "a3"], depth: int) -> TrainConfig:
    """Wightman et al. 2021, table 2; what it leaves to timm (0.2, clipping, 0.5) is timm's."""
    long = recipe != "a3"
    epochs = {"a1": 600, "a2": 300, "a3": 100}[recipe]
    return TrainConfig(
        model=_network(depth, zero_init_last=True, drop_path_rate=0.05 if long else 0.0),
        data=_images(224 if long else 160, 224, crop_ratio=0.95, repeats=3 if long else 1),
        augment=Augment(
            flip=True,
            randaugment_ops=2,
            randaugment_magnitude=7.0 if long else 6.0,
            randaugment_std=0.5,
            randaugment_probability=0.5,
            mixup=0.2 if recipe == "a1" else 0.1,
            cutmix=1.0,
        ),
        normalization="imagenet",
        optimizer=LAMB(
            learning_rate=5e-3 if long else 8e-3,
            schedule=Cosine(warmup=5 / epochs),
            weight_decay=0.01 if recipe == "a1" else 0.02,
            max_grad_norm=1.0,
        ),
        batch_size=2048,
        num_epochs=epochs,
        loss="binary_cross_entropy",
        target_threshold=0.2,
        label_smoothing=0.1 if recipe == "a1" else 0.0,
    )


def _network(depth: int, **fields: Any) -> ResNet:
    return imagenet_resnet(depth, num_classes=1000, dtype="bfloat16", **fields)


def _images(size: int, eval_size: int | None = None, **fields: Any) -> DataConfig:
    return DataConfig(
        name="imagenet2012",
        eval_split="validation",
        image_size=size,
        eval_image_size=None if eval_size == size else eval_size,
        random_resized_crop=True,
        num_workers=8,
        **fields,
    )


if __name__ == "__main__":
    main(get_config, workdir="runs/imagenet_resnet")
