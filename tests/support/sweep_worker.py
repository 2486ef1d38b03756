"""An ablation as one of several processes: of two learning rates, of which one diverges."""

import fault_worker

from flax_resnet.cli import experiment
from flax_resnet.studies.grids import grid


def get_grid(base, seeds):
    """Two variants of the small run."""
    return grid(base, {"optimizer.learning_rate": (1e20, 0.01)}, seeds)


if __name__ == "__main__":
    experiment.ablate(fault_worker.get_config, get_grid, "runs/faults")
