"""Handwritten digits in a minute on two CPU cores: the embedded default.

Claim: a ResNet-20 (He et al. 2016, section 4.2) reads scikit-learn's 8x8 digits, 1,442 of them
for training, with at least 98 % top-1 on the other 355.

Command: python -m experiments.digits
Hardware: a 2-core CPU, about 16 s.
Published: none.
"""

from flax_resnet.augment import Augment
from flax_resnet.config import TrainConfig
from flax_resnet.data import DataConfig
from flax_resnet.main import main
from flax_resnet.models import cifar_resnet
from flax_resnet.optim import SGD, Cosine


def get_config() -> TrainConfig:
    """ResNet-20, SGD with Nesterov momentum, one cosine, small rotations and shifts."""
    return TrainConfig(
        model=cifar_resnet(20),
        data=DataConfig(name="sklearn_digits"),
        augment=Augment(rotation=10.0, width_shift=1 / 8, height_shift=1 / 8),
        optimizer=SGD(
            learning_rate=0.1,
            schedule=Cosine(warmup=0.05),
            weight_decay=5e-4,
            nesterov=True,
        ),
        batch_size=64,
        num_epochs=30,
        eval_every_epochs=5,
    )


if __name__ == "__main__":
    main(get_config, workdir="runs/digits")
