"""The depth problem: plain and residual networks of 20 and 56 layers (He et al. 2016, figure 6).

Claim: the plain network of 56 layers has a higher training error than that of 20, and a higher
test error: degradation, not overfitting. With shortcuts the deeper one is no worse in training.

Command: python -m experiments.ablations.depth --data.data-dir DIR
Reduced, for a CPU: --data.image-size 16 --model.num-filters 8 --augment.pad-crop 2
    --data.train-split 'train[:20%]' --batch-size 64 --num-steps 3925
    --optimizer.schedule.warmup 0.05 --log-every-steps 157
The tutorials' figure of it: python -m experiments.plots paper runs/ablations/depth
Hardware: reduced on a 2-core CPU (experiments/README.md); at full size not run here, meant for one
GPU.
Published: plain 20 and 56 layers about 9 and 13 % test error (figure 6, left); residual 8.75 and
6.97 % (table 6).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments import cifar10_resnet
from flax_resnet import TrainConfig, cifar_resnet, grid
from flax_resnet.cli.experiment import ablate
from flax_resnet.models.blocks import Connection

CONNECTIONS: tuple[Connection, ...] = ("plain", "residual")
DEPTHS = (20, 56)
BASELINE = {f"{connection}-56": f"{connection}-20" for connection in CONNECTIONS}


def networks(connections: Sequence[Connection]) -> dict[str, dict[str, Any]]:
    """{"plain-20": fields of the model} of each connection at each depth."""
    return {
        f"{connection}-{depth}": {
            "model.connection": connection,
            "model.stage_sizes": cifar_resnet(depth).stage_sizes,
        }
        for connection in connections
        for depth in DEPTHS
    }


def get_base() -> TrainConfig:
    """experiments.cifar10_resnet."""
    return cifar10_resnet.get_config()


def get_grid(base: TrainConfig, seeds: int) -> Mapping[str, TrainConfig]:
    """Both connections at both depths; the base's other fields of the model stay."""
    return grid(base, {"": networks(CONNECTIONS)}, seeds)


if __name__ == "__main__":
    ablate(get_base, get_grid, workdir="runs/ablations/depth", baseline=BASELINE)
