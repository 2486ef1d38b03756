"""Wide residual networks on CIFAR-10 (Zagoruyko and Komodakis 2016): WRN-28-10.

Claim: 28 layers, ten times as wide, beat a thin network of 1,001 layers, and train faster. The
recipe is the paper's: SGD 0.1 with Nesterov momentum 0.9, weight decay 5e-4, batch 128, 200 epochs,
the rate a fifth after 60, 120 and 160; crops of images padded by 4 mirrored pixels, and flips;
channels normalised. Kernels alone decay; the paper's code decays every parameter
(--optimizer.decay-norm-and-bias).

Command: python -m experiments.wide_resnet --data.data-dir DIR
With dropout: --model.dropout-rate 0.3
Hardware: not run here; meant for one GPU, with --model.dtype bfloat16.
Published: test error 4.00 % (table 5), 3.89 % with dropout (table 6).
"""

from flax_resnet import SGD, Augment, DataConfig, Piecewise, TrainConfig, models
from flax_resnet.cli.experiment import main


def get_config(depth: int = 28, width: int = 10) -> TrainConfig:
    """The paper's recipe for WRN-depth-width, without dropout."""
    return TrainConfig(
        model=models.wide_resnet(depth, width),
        data=DataConfig(name="cifar10"),
        augment=Augment(pad_crop=4, pad_mode="reflect", flip=True),
        optimizer=SGD(
            learning_rate=0.1,
            schedule=Piecewise(boundaries=(0.3, 0.6, 0.8), factor=0.2),
            momentum=0.9,
            nesterov=True,
            weight_decay=5e-4,
        ),
        batch_size=128,
        num_epochs=200,
        eval_every_epochs=2,
        log_every_steps=100,
    )


if __name__ == "__main__":
    main(get_config, workdir="runs/wide_resnet")
