"""BatchNorm's momentum: over how many steps the statistics of evaluation are averaged.

Claim: none published. In training a batch is normalised by its own statistics, so the momentum
changes no weight: the variants of a seed train the same network, and their training figures are
equal. It decides the running statistics, which evaluation uses: 0 keeps those of the last batch
alone, 0.9 averages over some 10 steps, 0.99 over 100, 0.999 over 1,000. While the rate is high,
long averages lag behind the weights and short ones are noisy, which the evaluations on the way show
(metrics.jsonl); after the last drop the weights hardly move, and the table's last figures should be
close.

Command: python -m experiments.ablations.bn_momentum --data.data-dir DIR --seeds 3
Hardware: not run here; meant for one GPU.
Published: none.
"""

from experiments import cifar10_resnet
from flax_resnet import TrainConfig, grid
from flax_resnet.cli.experiment import ablate

BASELINE = "bn_momentum=0.9"


def get_base() -> TrainConfig:
    """ResNet-20 by the paper's recipe."""
    return cifar10_resnet.get_config(20)


def get_grid(base: TrainConfig, seeds: int) -> dict[str, TrainConfig]:
    """No average, torch's default, flax's, and a longer one."""
    return grid(base, {"model.bn_momentum": (0.0, 0.9, 0.99, 0.999)}, seeds)


if __name__ == "__main__":
    ablate(get_base, get_grid, "runs/ablations/bn_momentum", baseline=BASELINE)
