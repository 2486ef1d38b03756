"""The CIFAR-10 tutorial's "MiniModel": pre-activation residual units, augmentation, Adam.

Claim: with y = f(x) + x, depth pays where a plain stack of layers would stop learning. The
tutorial prints no accuracy. Its recipe: Adam 1e-3, batch 128, 50 epochs of 391 steps, rotation by
10 degrees, shifts by 5/32, flips; images less the mean of the set, over each pixel's deviation.

Command: python -m experiments.cifar10_mini --data.data-dir DIR
Plain units instead of residual ones: --model.no-residual
Hardware: a 2-core CPU for single epochs; the 50 are meant for one GPU.
Published: none.
"""

from flax_resnet import Adam, Augment, DataConfig, MiniModel, TrainConfig
from flax_resnet.cli.experiment import main


def get_config() -> TrainConfig:
    """The tutorial's recipe, to the layer and the number."""
    return TrainConfig(
        model=MiniModel(num_classes=10),
        data=DataConfig(name="cifar10"),
        augment=Augment(rotation=10.0, width_shift=5 / 32, height_shift=5 / 32, flip=True),
        normalization="pixel",
        optimizer=Adam(learning_rate=1e-3, eps=1e-7),
        batch_size=128,
        num_epochs=50,
    )


if __name__ == "__main__":
    main(get_config, workdir="runs/cifar10_mini")
