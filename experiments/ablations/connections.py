"""Plain, residual and highway networks by depth: do shortcuts pay, and do gates on them?

Claim: plain networks lose by depth, in training as on test; residual ones gain; highway networks of
the same layout train too, and are not better for their gates. All have two-layer blocks, the recipe
of experiments.cifar10_resnet and the default gate bias, -2; with a bias and a rate of their own
(experiments.ablations.gate_bias) highway networks may do better.

Command: python -m experiments.ablations.connections --data.data-dir DIR --seeds 3
Hardware: not run here; meant for one GPU.
Published: test error of residual networks of 20 and 56 layers 8.75 and 6.97 % (He et al. 2016,
table 6), of plain ones about 9 and 13 % (read off its figure 6); of such highway networks: none.
"""

from experiments.ablations import depth
from flax_resnet import TrainConfig, grid
from flax_resnet.cli.experiment import ablate
from flax_resnet.models.blocks import Connection

CONNECTIONS: tuple[Connection, ...] = ("plain", "residual", "highway")
BASELINE = {
    f"{connection}-{layers}": f"residual-{layers}"
    for layers in depth.DEPTHS
    for connection in ("plain", "highway")
}


def get_base() -> TrainConfig:
    """ResNet-20 by the paper's recipe."""
    return depth.get_base()


def get_grid(base: TrainConfig, seeds: int) -> dict[str, TrainConfig]:
    """The base's network with each connection at each depth."""
    return grid(base, {"": depth.networks(CONNECTIONS)}, seeds)


if __name__ == "__main__":
    ablate(get_base, get_grid, "runs/ablations/connections", baseline=BASELINE)
