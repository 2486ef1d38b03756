"""A trace of a few training steps, for TensorBoard and Perfetto."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

FIRST_STEPS = 5
"""Steps of a start that are not traced: buffers are allocated, input and queues fill."""
ANNOTATION = "train"
"""Marks each step for the tools, with its number among those traced."""

Step = Callable[..., Any]


@contextlib.contextmanager
def traced(
    step: Step,
    steps: int,
    directory: Path,
    say: Callable[[str], None],
    steps_of: Callable[..., int] = lambda *arguments: 1,
) -> Iterator[Step]:
    """The step to take instead of ``step``: it computes the same, and some calls are traced.

    The trace is of the calls after the first FIRST_STEPS steps that take the next ``steps``, from
    the moment that the computation before them is done until theirs is, and of whatever the loop
    does between them. A call of several steps is traced whole. It ends with the context, if not
    before. One that cannot be made is said, and no more.

    Of several processes each traces into ``directory/processI``: the slow one, for which the
    others wait in a collective, is seldom the lead, and only traces side by side tell which it is.

    Args:
      step: takes and returns anything.
      steps: how many; with 0 ``step`` itself is yielded.
      directory: of the traces.
      say: told where the trace is, or why there is none.
      steps_of: of a call's arguments: how many steps it takes.
    """
    if not steps:
        yield step
        return
    if jax.process_count() > 1:
        directory = directory / f"process{jax.process_index()}"
    trace = _Trace(step, steps, directory, say, steps_of)
    try:
        yield trace
    finally:
        trace.end()


class _Trace:
    """A step that counts steps and traces some of its calls."""

    def __init__(
        self,
        step: Step,
        steps: int,
        directory: Path,
        say: Callable[[str], None],
        steps_of: Callable[..., int],
    ):
        self._step, self._steps, self._directory, self._say = step, steps, directory, say
        self._steps_of = steps_of
        self._done = 0
        self._first: int | None = None
        """Steps before the trace."""
        self._tracing = self._over = False

    def __call__(self, *arguments: Any) -> Any:
        if self._first is None and self._done >= FIRST_STEPS:
            self._first = self._done
            self._begin(arguments)
        number = self._done - (self._first or FIRST_STEPS) + 1
        self._done += self._steps_of(*arguments)
        with jax.profiler.StepTraceAnnotation(ANNOTATION, step_num=number):
            result = self._step(*arguments)
        if self._tracing and self._traced >= self._steps:
            jax.block_until_ready(result)
            self.end()
        return result

    @property
    def _traced(self) -> int:
        return 0 if self._first is None else self._done - self._first

    def _begin(self, arguments: Any) -> None:
        jax.block_until_ready(arguments)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # each Python call is an event, and a slow one
        try:
            jax.profiler.start_trace(self._directory, profiler_options=options)
        except (RuntimeError, OSError) as error:  # another trace of this process is under way
            self._over = True
            self._say(f"no profile: {error}")
        else:
            self._tracing = True

    def end(self) -> None:
        """Ends the trace and says where it is; after the first time nothing."""
        if self._over:
            return
        self._over = True
        if not self._tracing:
            self._say(
                f"no profile: this start ended at its step {self._done}, and the first "
                f"{FIRST_STEPS} are not traced"
            )
            return
        self._tracing = False
        try:
            jax.profiler.stop_trace()
        except (RuntimeError, OSError) as error:
            self._say(f"no profile: {error}")
            return
        self._say(
            f"profile of {self._traced} steps in {self._directory}: tensorboard "
            f"--logdir {self._directory} (pip install tensorboard xprof), or open its "
            "plugins/profile/*/*.trace.json.gz in ui.perfetto.dev"
        )
