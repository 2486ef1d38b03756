"""A command that will train for minutes on a Linux CPU starts itself again, once, with huge pages.

Where glibc asks the system for pages of 2 MiB, the memory of a step's activations is there with a
five-hundredth of the page faults (``cpu.memory_advice``). It has to be told before a process
starts, and a start takes seconds: so long runs do it, and short ones do not.
"""

from __future__ import annotations

import math
import os
import sys

from flax_resnet import cpu
from flax_resnet.config import TrainConfig
from flax_resnet.data import training_set
from flax_resnet.errors import UserError
from flax_resnet.summary import FLOPS_A_MAC, count_layers

WORTH_SECONDS = 120.0
FLOPS_A_SECOND = 2e11
"""Roughly, of a processor of few cores: an estimate of how long a run takes."""


def with_huge_pages(config: TrainConfig, runs: int = 1) -> None:
    """Starts this process's command again where that is worth it; else returns.

    Args:
      config: what it trains.
      runs: how often.
    """
    if not cpu.lacks_huge_pages():
        return
    try:
        seconds = runs * estimated_seconds(config)
    except UserError:
        return  # whatever is wrong is said when the run is set up
    if seconds < WORTH_SECONDS:
        return
    print(f"starts again with huge pages, {cpu.TUNABLES}={cpu.HUGE_PAGES_ON}", flush=True)
    given = os.environ.get(cpu.TUNABLES)
    tunables = ":".join(filter(None, [given, cpu.HUGE_PAGES_ON]))
    command = [sys.executable, *sys.orig_argv[1:]]
    os.execve(sys.executable, command, {**os.environ, cpu.TUNABLES: tunables})


def estimated_seconds(config: TrainConfig) -> float:
    """About how long a run trains, from its multiply-adds.

    Raises:
      UserError: there is no such data.
    """
    examples, (height, width, channels) = training_set(config.data)
    rows, _ = count_layers(config.model, (height, width, channels))
    steps_per_epoch = math.ceil(examples / config.batch_size)
    steps = config.num_steps or config.num_epochs * steps_per_epoch
    operations = FLOPS_A_MAC["train"] * sum(row.macs for row in rows) * config.batch_size * steps
    return operations / FLOPS_A_SECOND
