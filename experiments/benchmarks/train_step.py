"""Seconds of our training step, the share of the machine's peak that it reaches, and its memory.

What is timed is the step that a run compiles, its state donated, on a batch of uint8 noise that
lies on the device: normalisation, forward and backward pass, update and the sums of metrics; no
augmentation and no data pipeline. With --steps-per-dispatch N it is the program of N steps, each of
which takes its rows from the noise on the device. Operations are those of the multiply-adds of
convolutions and dense layers, three forward passes a step. The machine's peak, a large matrix
product, is measured in the same run (the steps module).

Program bytes are what XLA says that the compiled program holds at once (arguments, outputs that
take no argument's place, temporaries). The process's peak is that of its main memory so far,
compilation and the networks before included: for one network's own, name it alone.

Standard output has one line of JSON a network, standard error the table.

Claim: none; it measures.

Command: python -m experiments.benchmarks.train_step
  (on a GPU: --dtype bfloat16 --models resnet50 --batch-size 256; for what dispatching costs a small
  network: --models resnet20 --steps 64, then with --steps-per-dispatch 8 too)

Hardware: any.

Published: none.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from experiments.benchmarks import driver, steps


def main(argv: Sequence[str] | None = None) -> None:
    """Measures every network; prints lines of JSON, then the table."""
    rows = functools.partial(steps.rows, "train")
    driver.run("train_step", steps.Settings, __doc__ or "", argv, rows, steps.report)


if __name__ == "__main__":
    main()
