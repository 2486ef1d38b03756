"""Several seeds trained together, one program under vmap, against one after another.

Both train the same networks for the same steps, on the bundled digits, from the same seeds; the
steps alone are timed, without compilation, evaluation and saving. One line of JSON for each number
of seeds: seconds a step of all networks, and the ratio.

On a CPU together is slower (the design measured 4 times), so there seeds run in turn by default.

Command: python -m experiments.benchmarks.seeds --num-seeds 1 4
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments import digits
from experiments.benchmarks import common, driver
from flax_resnet import TrainConfig, UserError, cifar_resnet, replaced
from flax_resnet.distributed import sharding
from flax_resnet.errors import check_range
from flax_resnet.studies import vmapped
from flax_resnet.training import setup
from flax_resnet.training.run import Run


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is timed."""

    num_seeds: tuple[int, ...] = (1, 2, 4, 8)
    """Networks that train together."""
    depth: int = 20
    """Of the CIFAR ResNet."""
    image_size: int = 32
    """The digits, 8x8, are enlarged to this."""
    batch_size: int = 128
    """Images in a step of one network."""
    steps: int = 20
    """Steps timed of each, after one that is not."""
    data_dir: str | None = None
    """Where the digits are prepared, or will be."""

    def __post_init__(self) -> None:
        if not self.num_seeds:
            raise UserError("--num-seeds: expected one or more")
        check_range("--num-seeds", min(self.num_seeds), 1)
        driver.check_least(self, 1, "steps", "batch_size")


def configs(settings: Settings, num_seeds: int) -> list[TrainConfig]:
    """The runs."""
    base = digits.get_config()
    data = dataclasses.replace(
        base.data, data_dir=settings.data_dir, image_size=settings.image_size
    )
    base = dataclasses.replace(
        base,
        model=cifar_resnet(settings.depth),
        data=data,
        batch_size=settings.batch_size,
        num_steps=settings.steps + 1,
    )
    return [replaced(base, "seed", seed) for seed in range(num_seeds)]


def step_seconds(ready: Run) -> list[float]:
    """Seconds of each step but the first, which also loads the program."""
    step = ready.programs.compile_step()
    seconds = []
    for batch in ready.dispatches():
        (ready.state, _), took = common.timed(step, ready.state, batch)
        seconds.append(took)
    return seconds[1:]


def measure(settings: Settings, num_seeds: int) -> driver.Row:
    """Times both ways: together on as many devices as divide the seeds, in turn on all."""
    runs = configs(settings, num_seeds)
    with tempfile.TemporaryDirectory() as nowhere:
        one = setup.set_up(runs[0], Path(nowhere), sharding.data_mesh())
        alone = common.Timing.of(step_seconds(one))
        all_at_once = vmapped.set_up(runs, Path(nowhere))
        several = common.Timing.of(step_seconds(all_at_once))
    return {
        "num_seeds": num_seeds,
        "depth": settings.depth,
        "image_size": settings.image_size,
        "batch_size": settings.batch_size,
        "together_step_seconds": dataclasses.asdict(several),
        "one_step_seconds": dataclasses.asdict(alone),
        "together_over_in_turn": several.median / (num_seeds * alone.median),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measures every number of seeds; prints lines of JSON."""

    def measured(settings: Settings) -> Iterator[driver.Row]:
        return (measure(settings, num_seeds) for num_seeds in settings.num_seeds)

    driver.run("seeds", Settings, __doc__ or "", argv, measured)


if __name__ == "__main__":
    main()
