"""Checkpoints through orbax: the newest few and the best, saved while training goes on.

Orbax writes a step into a temporary directory and renames it when whole, and checks nothing when
it reads. So a step counts only once it is sealed: a list of its files with their hashes, written
last and hashed itself. What does not match its seal is reported and passed over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
from etils import epath

from flax_resnet import distributed, seals, storage
from flax_resnet.errors import UserError, check_range
from flax_resnet.shelf import CHOICES, Shelf, Which
from flax_resnet.watch import print_report

T = TypeVar("T")

# Seconds before each removal of what a save that failed has left.
DISCARDING = (0, 0.1, 0.4)

# Orbax tells its threads apart by the number of the process's newest save: of two saves at once,
# as of runs on several devices, each could take the other's signals for its own.
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
    """Keep them here instead of in WORKDIR/checkpoints: a path, gs://BUCKET/PATH (needs gcsfs) or
    s3://BUCKET/PATH (needs s3fs). A sweep's runs each get a directory of their name in it."""

    def __post_init__(self) -> None:
        bounds = {"every_steps": 1, "every_evals": 1, "keep_last": 1, "keep_best": 0}
        for name, least in bounds.items():
            check_range(f"checkpoint.{name}", getattr(self, name), least)

    def place(self, workdir: Path) -> epath.Path:
        """The directory of a run's checkpoints."""
        return epath.Path(self.directory or workdir / "checkpoints").expanduser()


class Checkpoints:
    """The checkpoints of one run, in ``directory/STEP``.

    Each holds ``state`` (a tree of arrays) and ``meta`` (JSON: the data position, the config
    record), and is sealed. With several processes each calls every method: all write their part
    of the arrays, and the lead seals, removes and chooses.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        config: CheckpointConfig | None = None,
        resumed_from: int | None = None,
        say: Callable[[str], None] = print_report,
        staging: epath.PathLike | None = None,
    ):
        """Opens the directory. Without a config it is only read, and nothing is created.

        Args:
          directory: a local path, gs:// or s3://.
          config: what to keep, in order to save.
          resumed_from: with a config, the step that the run goes on from: newer checkpoints were
            passed over for it, and are set aside as ``STEP.damaged``.
          say: told of every checkpoint that is passed over.
          staging: where a checkpoint is put together that goes to a bucket; by default among the
            system's temporary files. Several processes have to share it.

        Raises:
          UserError: the directory cannot be written, or the bucket not reached.
        """
        self._config, self._shelf = config, Shelf(directory, say, staging)
        self.directory = self._shelf.directory
        self._thread: threading.Thread | None = None
        self._failed: tuple[int, BaseException] | None = None
        if config is not None:
            with self._writing(resumed_from or 0):
                self._shelf.open(resumed_from)

    def save(self, step: int, state: Any, meta: dict[str, Any], scores: dict | None) -> None:
        """Copies ``state`` (a tree of arrays) and writes it in the background.

        Args:
          step: names the checkpoint.
          state: tree of jax or numpy arrays; it may be donated as soon as this returns.
          meta: JSON values.
          scores: the evaluation at this step, with "top1", or None.

        Raises:
          UserError: this one, or the one before it, could not be written.
        """
        self.wait()
        args = _orbax().args
        items = args.Composite(state=args.StandardSave(state), meta=args.JsonSave(meta))
        storage.hush.begin()
        _ONE_SAVE.acquire()
        try:
            with self._writing(step):
                self._checkpointer.save(self._shelf.made / str(step), args=items, force=True)
        except BaseException:
            _ONE_SAVE.release()
            self._discard(step)
            raise
        commit = threading.Thread(
            target=self._commit, args=(step, scores), name=f"checkpoint {step}", daemon=True
        )
        try:
            commit.start()
        except RuntimeError:  # the system has no thread to give: seal it here and now
            self._commit(step, scores)
        else:
            self._thread = commit

    def rate(self, step: int, scores: dict) -> None:
        """Adds the evaluation to a step that was saved before it was evaluated."""
        self.wait()
        if distributed.is_lead() and (seal := self._shelf.sealed().get(step)):
            with self._writing(step):
                seals.write(self._shelf.path(step), dataclasses.replace(seal, scores=scores))

    def latest_step(self) -> int | None:
        """The newest good checkpoint's step."""
        return self._shelf.first("latest")

    def best_step(self) -> int | None:
        """The good step with the highest evaluation top-1; of equal ones the newest."""
        return self._shelf.first("best")

    def evaluated_step(self) -> int:
        """The best step, or where none was kept by its evaluation the newest.

        Raises:
          UserError: there is no checkpoint.
        """
        return self.step("evaluated")

    def step(self, which: Which) -> int:
        """The step number that ``which`` names.

        Raises:
          UserError: there is no such checkpoint, or it is damaged.
        """
        step = self._shelf.first(which)
        if step is None:
            raise UserError(
                f"no checkpoint {which!r} in {self.directory}: it holds steps "
                f"{sorted(self._shelf.sealed())}"
            )
        return step

    def meta(self, which: Which = "latest") -> dict[str, Any]:
        """What a checkpoint says beside its arrays."""
        args = _orbax().args
        items = args.Composite(meta=args.JsonRestore())
        return self._read(which, lambda path: self._checkpointer.restore(path, args=items)["meta"])

    def restore(self, template: Any, which: Which = "latest") -> tuple[Any, dict[str, Any]]:
        """Reads a checkpoint onto the shapes, dtypes and shardings of ``template``.

        Args:
          template: tree of jax.ShapeDtypeStruct (or arrays), with shardings.
          which: a step, or "latest", "best" or "evaluated" (the best, else the latest): the first
            of them that is whole.

        Returns:
          (state, meta).

        Raises:
          UserError: there is no such checkpoint, it cannot be read, or its arrays differ from
            the template.
        """

        def restored(path: epath.Path) -> tuple[Any, dict[str, Any]]:
            self._check_shapes(path, template)
            return self._restored(path, template)

        return self._read(which, restored)

    def read(self, which: Which = "latest") -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads a checkpoint as it was stored: (state as nested dicts of numpy arrays, meta).

        Raises:
          UserError: there is no such checkpoint, or it cannot be read.
        """
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

        def on_host(path: epath.Path) -> tuple[Any, dict[str, Any]]:
            template = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), self._stored(path)
            )
            return jax.device_get(self._restored(path, template))

        return self._read(which, on_host)

    def wait(self) -> None:
        """Blocks until every save is on disk and sealed.

        Raises:
          UserError: one could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failed is not None:
            (step, error), self._failed = self._failed, None
            with self._writing(step):
                raise error

    def close(self) -> None:
        """Waits for saves under way and lets go of the directory."""
        try:
            self.wait()
        finally:
            if "_checkpointer" in vars(self):  # it was needed
                self._checkpointer.close()
            self._shelf.close()

    @functools.cached_property
    def _checkpointer(self) -> Any:
        ocp = _orbax()
        return ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                state=ocp.StandardCheckpointHandler(), meta=ocp.JsonCheckpointHandler()
            ),
            # Else threads wait at exit, for minutes, for a directory that could not be made.
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
        )

    def _read(self, which: Which, reading: Callable[[epath.Path], T]) -> T:
        """What ``reading`` makes of the directory of the step that ``which`` names."""
        alone = jax.process_count() == 1
        for _ in range(CHOICES if alone else 1):
            step = self.step(which)
            try:
                with self._reading(step):
                    found = reading(self._shelf.here(step))
            except UserError:
                if not alone or self._shelf.still_whole(step):
                    raise
            else:
                if not alone or self._shelf.still_whole(step):
                    return found
        raise UserError(f"checkpoints in {self.directory} are removed faster than they are read")

    def _restored(self, path: epath.Path, template: Any) -> tuple[Any, dict[str, Any]]:
        args = _orbax().args
        items = args.Composite(state=args.StandardRestore(template), meta=args.JsonRestore())
        restored = self._checkpointer.restore(path, args=items)
        return restored["state"], restored["meta"]

    def _stored(self, path: epath.Path) -> Any:
        stored = self._checkpointer.metadata(path).item_metadata["state"]
        if stored is None:
            raise FileNotFoundError("it holds no state")
        return stored.tree

    def _check_shapes(self, path: epath.Path, template: Any) -> None:
        """Orbax casts silently where dtypes differ; here that is an error."""
        have = {_name(p): (x.shape, str(x.dtype)) for p, x in _leaves(self._stored(path))}
        want = {_name(p): (x.shape, str(x.dtype)) for p, x in _leaves(template)}
        for name in sorted(have.keys() | want.keys()):
            if have.get(name) != want.get(name):
                raise UserError(
                    f"checkpoint {path.name} in {self.directory} does not fit: {name} is "
                    f"{have.get(name, 'missing')} there and {want.get(name, 'absent')} in this run"
                )

    def _commit(self, step: int, scores: dict | None) -> None:
        """Waits until a save is on disk, seals it, and only then removes what is not kept."""
        try:
            try:
                self._checkpointer.wait_until_finished()
            finally:
                _ONE_SAVE.release()
            if distributed.is_lead():
                assert self._config is not None
                self._shelf.seal(step, scores)
                self._shelf.prune(self._config.keep_last, self._config.keep_best)
        except BaseException as error:
            self._failed = (step, error)  # raised by wait()
            self._discard(step)
        else:
            storage.hush.end()

    def _discard(self, step: int) -> None:
        # Orbax does not wait for its other threads where one has failed, and they may still write.
        for pause in DISCARDING if distributed.is_lead() else ():
            time.sleep(pause)
            self._shelf.discard(step)

    def _writing(self, step: int) -> contextlib.AbstractContextManager[None]:
        """Turns whatever orbax, tensorstore and the file system raise into one line."""

        def line(error: Exception) -> str:
            sealed = sorted(set(self._shelf.sealed()) - {step})
            rest = (
                f"the newest whole one is of step {sealed[-1]}" if sealed else "there is no other"
            )
            return (
                f"checkpoint {step} could not be written to {self.directory} "
                f"({storage.reason(error)}); {rest}: make room or mend the place, and the same "
                "command goes on from there"
            )

        return storage.one_line(line)

    def _reading(self, step: int) -> contextlib.AbstractContextManager[None]:
        return storage.one_line(
            lambda error: (
                f"checkpoint {self.directory}/{step} cannot be read ({storage.reason(error)}): "
                "remove that directory to go on from the one before"
            )
        )


def _orbax() -> Any:
    # Importing it takes as long as much of the rest: at the first save, not before the first step.
    import orbax.checkpoint

    return orbax.checkpoint


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree)


def _name(path: Any) -> str:
    """A path such as params/head/kernel; orbax's metadata has names where a tree has indices."""
    parts = (getattr(p, "key", getattr(p, "name", getattr(p, "idx", p))) for p in path)
    return "/".join(str(part) for part in parts)
