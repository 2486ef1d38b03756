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

from flax_resnet import DataConfig, TrainConfig
from flax_resnet.cli.experiment import main
from flax_resnet.training import recipes


def get_config() -> TrainConfig:
    """ResNet-50 from ImageNet's weights, ten epochs of SGD."""
    return recipes.finetuning(DataConfig(folder="photos"), num_classes=1000)


if __name__ == "__main__":
    main(get_config, workdir="runs/finetune")
