"""Seconds of our evaluation step, the share of the machine's peak that it reaches, and its memory.

What is timed is the step that a run compiles, in the loop that a run evaluates with, on a batch of
uint8 noise that lies on the device: normalisation, forward pass, the sums of metrics and the
confusion counts; no data pipeline. Operations, peak and memory are counted as in train_step, one
forward pass a step.

Standard output has one line of JSON a network, standard error the table.

Claim: none; it measures.

Command: python -m experiments.benchmarks.eval_step
  (on a GPU: --dtype bfloat16 --models resnet50 --batch-size 512)

Hardware: any.

Published: none.
"""

from __future__ import annotations

from collections.abc import Sequence

from experiments.benchmarks import steps


def main(argv: Sequence[str] | None = None) -> None:
    """Measures every network; prints lines of JSON, then the table."""
    steps.main("eval", __doc__ or "", argv)


if __name__ == "__main__":
    main()
