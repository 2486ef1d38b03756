"""Fine-tuning published weights on images of your own: a folder, or any tfds set.

Claim: none; it is the general form of transfer learning here. The default trains every layer from
ImageNet's weights, the head at the full learning rate and each stage below at half that of the
next, BatchNorm as the weights left it, on random crops and mirrored images.

Command: python -m experiments.finetune --model resnet50 --data.folder DIR --model.num-classes K
A linear probe: --model.frozen-stages 4 --cache-features --data.no-random-resized-crop
    --augment.no-flip
Gradual unfreezing: --optimizer.unfreeze 0.2 0.4 0.6 0.8 0.9
BatchNorm, trained: --model.norm-kind batch; measured anew on the images first: --measure-norms
Hardware: not run here; meant for one GPU.
Published: none.
"""

from flax_resnet.augment import Augment
from flax_resnet.config import TrainConfig
from flax_resnet.data import DataConfig
from flax_resnet.main import main
from flax_resnet.models import imagenet_resnet
from flax_resnet.optim import SGD, Cosine


def get_config() -> TrainConfig:
    """ResNet-50 from ImageNet's weights, ten epochs of SGD."""
    return TrainConfig(
        model=imagenet_resnet(50, norm_kind="frozen"),
        weights="imagenet",
        data=DataConfig(folder="photos", image_size=224, random_resized_crop=True),
        augment=Augment(flip=True),
        normalization="weights",
        optimizer=SGD(learning_rate=0.01, schedule=Cosine(warmup=0.1), stage_decay=0.5),
        batch_size=64,
        eval_batch_size=64,
        num_epochs=10,
    )


if __name__ == "__main__":
    main(get_config, workdir="runs/finetune")
