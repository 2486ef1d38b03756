"""Checkpoints of a run through orbax: the newest few and the best, saved while training goes on.

Orbax's AsyncCheckpointer writes and reads the arrays. Its CheckpointManager is not used: it
restores a flipped bit silently, and cannot add an evaluation to a step that is saved already.
A step counts once it is sealed (``seals``); one that does not match its seal is passed over.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from etils import epath

from flax_resnet.checkpoints import seals
from flax_resnet.checkpoints.orbax_paths import orbax, plain_path, signatures
from flax_resnet.distributed import sharding
from flax_resnet.distributed.watchdog import print_report
from flax_resnet.errors import TryAgain, UserError, check_range, check_types
from flax_resnet.records.files import error_as_one_line, reason

Which = int | Literal["latest", "best"]

# What process 0 tells the others where it chose no step.
NO_STEP, ALL_DAMAGED = -1, -2
# Times that a step is chosen anew because another process removed the one before meanwhile.
MOST_CHOICES = 20
# Orbax identifies its threads by the number of the process's newest save. Two saves at once, as of
# runs on several devices, could take each other's signals for their own.
_ONE_SAVE = threading.Lock()


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save, where, and what to keep."""

    every_steps: int | None = None
    """Save after so many steps too; None saves after evaluations only."""
    every_evals: int = 1
    """Save after one evaluation in so many, and after the last one."""
    keep_last: int = 2
    """Newest checkpoints to keep."""
    keep_best: int = 1
    """Checkpoints to keep by evaluation top-1, of those that were saved after one."""
    directory: str | None = None
    """Keep them here instead of in WORKDIR/checkpoints: a path, or gs://BUCKET/PATH (needs gcsfs).
    A sweep's runs each get a directory of their name in it."""

    def __post_init__(self) -> None:
        check_types(self, "checkpoint.")
        bounds = {"every_steps": 1, "every_evals": 1, "keep_last": 1, "keep_best": 0}
        for name, least in bounds.items():
            check_range(f"checkpoint.{name}", getattr(self, name), least)

    def place(self, workdir: Path) -> epath.Path:
        """The directory of a run's checkpoints."""
        return epath.Path(self.directory or workdir / "checkpoints").expanduser()


class Checkpoints:
    """The checkpoints of one run, in ``directory/STEP``.

    Each holds ``state`` (a tree of arrays) and ``meta`` (JSON: the data position, the config
    record), and is sealed. With several processes every process calls every method: all write
    their part of the arrays, and process 0 seals, removes and chooses. Methods that read raise
    UserError where there is no such checkpoint, or it cannot be read.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        config: CheckpointConfig | None = None,
        resumed_from: int | None = None,
        say: Callable[[str], None] = print_report,
    ):
        """Opens the directory. Without a config it is only read, and nothing is created.

        Args:
          directory: a local path, or gs://BUCKET/PATH.
          config: what to keep, in order to save.
          resumed_from: the step that the run goes on from; newer ones are set aside (``tidy``).
          say: called with a line about every checkpoint that is passed over or removed unfinished.

        Raises:
          UserError: the directory cannot be written, or the bucket not reached.
        """
        self.directory = seals.open_directory(directory)
        self._stack = contextlib.ExitStack()
        self._plain = plain_path(self.directory, self._stack)
        self._config, self._say = config, say
        self._problems: dict[int, str | None] = {}  # of the steps whose files were hashed
        self._saver = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._saving: concurrent.futures.Future[None] | None = None
        self._is_first_save = True
        if config is not None and sharding.is_lead():
            with self._writing(resumed_from or 0):
                newest = math.inf if resumed_from is None else resumed_from
                for name in seals.tidy(self.directory, newest):
                    say(f"checkpoint {name} in {self.directory} was not finished: removed")

    def save(self, step: int, state: Any, meta: dict[str, Any], scores: dict | None) -> None:
        """Copies ``state`` and writes it in the background.

        Args:
          step: names the checkpoint.
          state: tree of jax or numpy arrays; it may be donated as soon as this returns.
          meta: JSON values.
          scores: the evaluation at this step, with "top1", or None.

        Raises:
          UserError: this checkpoint, or the one before it, could not be written.
        """
        self.wait()
        args = orbax().args
        items = args.Composite(state=args.StandardSave(state), meta=args.JsonSave(meta))
        _ONE_SAVE.acquire()
        try:
            with self._writing(step):
                self._checkpointer.save(self._path(step), args=items, force=True)
                self._saving = self._saver.submit(self._commit, step, scores, signatures(state))
        except BaseException:
            _ONE_SAVE.release()
            raise

    def _commit(self, step: int, scores: dict | None, saved: dict[str, Any]) -> None:
        """Waits until a save is on disk, reads back the first one, seals it, removes old ones."""
        with self._writing(step):
            try:
                self._checkpointer.wait_until_finished()
            finally:
                _ONE_SAVE.release()
            if self._is_first_save and jax.process_count() == 1:  # orbax reads in all or none
                arrays, _ = self._restored(self._path(step), None)
                if signatures(arrays) != saved:
                    raise ValueError("what was written is not what is read back")
            self._is_first_save = False
            if sharding.is_lead():
                assert self._config is not None
                seals.write(self._path(step), seals.take(self._path(step), scores))
                self._problems[step] = None
                seals.prune(self.directory, self._config.keep_last, self._config.keep_best)

    def rate(self, step: int, scores: dict) -> None:
        """Adds the evaluation to a step that was saved before it was evaluated."""
        self.wait()
        with self._writing(step):
            if sharding.is_lead() and (seal := seals.read(self._path(step))):
                seals.write(self._path(step), dataclasses.replace(seal, scores=scores))

    def wait(self) -> None:
        """Blocks until every save is on disk and sealed.

        Raises:
          UserError: one could not be written.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def close(self) -> None:
        """Waits for saves under way and ends the threads."""
        try:
            self.wait()
        finally:
            self._saver.shutdown()
            if "_checkpointer" in vars(self):  # it was needed
                self._checkpointer.close()
            self._stack.close()

    def latest_step(self) -> int | None:
        """The newest whole checkpoint's step, None where there is no checkpoint."""
        return self._read("latest", lambda path: int(path.name), or_none=True)

    def meta(self, which: Which = "latest") -> dict[str, Any]:
        """What a checkpoint says beside its arrays."""
        args = orbax().args
        items = args.Composite(meta=args.JsonRestore())
        return self._read(which, lambda path: self._checkpointer.restore(path, args=items)["meta"])

    def restore(self, template: Any, which: Which = "latest") -> tuple[Any, dict[str, Any]]:
        """(state, meta) of a checkpoint, on the shapes, dtypes and shardings of ``template``.

        Args:
          template: tree of jax.ShapeDtypeStruct (or arrays), with shardings.
          which: a step, "latest", or "best": of the highest top-1, of equal ones the newest, and
            where none was kept by its evaluation the latest. What is damaged is passed over.

        Raises:
          UserError: the arrays differ from the template.
        """
        return self._read(which, lambda path: self._restored(path, template))

    def read(self, which: Which = "latest") -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads a checkpoint as it was stored: (state as nested dicts of numpy arrays, meta)."""
        return self._read(which, lambda path: self._restored(path, None))

    @functools.cached_property
    def _checkpointer(self) -> Any:
        ocp = orbax()
        return ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                state=ocp.StandardCheckpointHandler(), meta=ocp.JsonCheckpointHandler()
            ),
            # Else threads wait at exit, for minutes, for a directory that could not be made.
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
        )

    def _path(self, step: int) -> epath.Path:
        return self._plain / str(step)

    def _read(
        self, which: Which, reading: Callable[[epath.Path], Any], or_none: bool = False
    ) -> Any:
        """What ``reading`` returns for the directory of the step that ``which`` names.

        A step that another process removes meanwhile, its seal first, is not used: another is
        chosen. Several processes read only before they write.
        """
        place, several, lead = self.directory, jax.process_count() > 1, sharding.is_lead()
        line = lambda error: (  # noqa: E731
            f"checkpoint {which!r} in {place} cannot be read ({reason(error)}): keep it, and read "
            "it with the packages whose versions are in the config.json of its run"
        )
        with error_as_one_line(line, jax.process_count()):
            for _ in range(MOST_CHOICES):
                steps = seals.steps(place) if lead else {}
                try:
                    step = self._choose(which, steps) if lead else NO_STEP
                    step = sharding.same_everywhere(step)
                    if step == NO_STEP and or_none:
                        return None
                    if step < 0:
                        held = f"in {place}: it holds steps {sorted(seals.steps(place))}"
                        if step == NO_STEP:
                            raise UserError(f"no checkpoint {which!r} {held}")
                        advice = "put back a copy, or begin again in another directory"
                        raise UserError(f"no whole checkpoint {which!r} {held}: {advice}")
                    result = reading(self._path(step))
                    if several or step in seals.steps(place):
                        return result
                except Exception:
                    if several or seals.steps(place) == steps:
                        raise
            raise TryAgain(f"checkpoints in {place} are removed faster than they can be read")

    def _choose(self, which: Which, steps: dict[int, seals.Seal]) -> int:
        """The first step that ``which`` names whose files match its seal, or why there is none."""
        latest = sorted(steps, reverse=True)
        orders: dict[Any, list[int]] = {
            "latest": latest,
            "best": [*seals.by_top1(steps), *latest],
        }
        named = orders.get(which, [step for step in steps if step == which])
        for step in named:
            if step not in self._problems:
                problem = seals.problem(self._path(step), steps[step])
                if problem is not None and seals.read(self._path(step)) != steps[step]:
                    raise FileNotFoundError(f"step {step} was removed")
                self._problems[step] = problem
                if problem is not None:
                    self._say(
                        f"checkpoint {step} in {self.directory} is damaged ({problem}): it is "
                        "passed over"
                    )
            if self._problems[step] is None:
                return step
        return ALL_DAMAGED if named else NO_STEP

    def _restored(self, path: epath.Path, template: Any) -> tuple[Any, dict[str, Any]]:
        """(state, meta); without a template the state as it was stored, in numpy arrays."""
        stored = self._checkpointer.metadata(path).item_metadata["state"].tree
        if template is None:
            empty = lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape)  # noqa: E731
            template = jax.tree.map(empty, stored)
        # Orbax casts silently where dtypes differ; here that is an error.
        have, want = signatures(stored), signatures(template)
        for name in sorted(have.keys() | want.keys()):
            if have.get(name) != want.get(name):
                raise UserError(
                    f"checkpoint {path.name} in {self.directory} does not fit: {name} is "
                    f"{have.get(name, 'missing')} there and {want.get(name, 'absent')} in this run"
                )
        args = orbax().args
        items = args.Composite(state=args.StandardRestore(template), meta=args.JsonRestore())
        restored = self._checkpointer.restore(path, args=items)
        return restored["state"], restored["meta"]

    def _writing(self, step: int) -> contextlib.AbstractContextManager[None]:
        """Turns whatever orbax, tensorstore and the file system raise into one line."""
        return error_as_one_line(
            lambda error: (
                f"checkpoint {step} could not be written to {self.directory} ({reason(error)}); "
                f"whole are steps {sorted(set(seals.steps(self.directory)) - {step})}: make room "
                "or mend the place, and the same command goes on from there"
            ),
            jax.process_count(),
        )
