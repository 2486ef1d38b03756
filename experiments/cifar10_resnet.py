"""The first residual paper's CIFAR-10 networks, 20 to 1202 layers (He et al. 2016, section 4.2).

Claim: residual networks gain from depth where plain ones lose; 1202 layers train too, and overfit.
The recipe is the paper's: SGD 0.1, momentum 0.9, weight decay 1e-4, batch 128, 64,000 steps, the
rate a tenth after 32,000 and again after 48,000; crops of images padded by 4, and flips. Depths
from 110 rise from 0.01 to 0.1 over the first 400 steps; the paper trains its 110 at 0.01 until the
training error is below 80 %, about 400 steps, then at 0.1. Other differences: the paper subtracts
each pixel's mean, here each channel is normalised; it does not say whether BatchNorm's scales and
offsets decay, here kernels alone do (--optimizer.decay-norm-and-bias: all).

Command: python -m experiments.cifar10_resnet --depth 20 --data.data-dir DIR
Hardware: not run here; meant for one GPU.
Published: test error of 20, 32, 44, 56, 110 and 1202 layers: 8.75, 7.51, 7.17, 6.97, 6.43 and
7.93 % (table 6; 110 is the best of 5 runs, their mean 6.61).
"""

from flax_resnet import SGD, Augment, DataConfig, Piecewise, TrainConfig, cifar_resnet
from flax_resnet.cli.experiment import main

NUM_STEPS = 64_000
DROPS = (32_000, 48_000)
WARMUP_STEPS = 400
LEAST_WARMED_UP = 110


def schedule(warmup_steps: int) -> Piecewise:
    """The papers' drops, counted from the start, after a rise from a tenth of the rate."""
    rest = NUM_STEPS - warmup_steps
    return Piecewise(
        warmup=warmup_steps / NUM_STEPS,
        warmup_start=0.1,
        boundaries=tuple((drop - warmup_steps) / rest for drop in DROPS),
    )


def get_config(depth: int = 20) -> TrainConfig:
    """The paper's recipe for 6n + 2 layers: 20, 32, 44, 56, 110 and 1202 in the paper."""
    return TrainConfig(
        model=cifar_resnet(depth),
        data=DataConfig(name="cifar10"),
        augment=Augment(pad_crop=4, flip=True),
        optimizer=SGD(
            learning_rate=0.1,
            schedule=schedule(WARMUP_STEPS if depth >= LEAST_WARMED_UP else 0),
            momentum=0.9,
            weight_decay=1e-4,
        ),
        batch_size=128,
        num_steps=NUM_STEPS,
        eval_every_epochs=2,
        log_every_steps=100,
    )


if __name__ == "__main__":
    main(get_config, workdir="runs/cifar10_resnet")
