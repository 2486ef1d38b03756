"""Checkpoints through orbax: the newest few and the best, saved while training goes on.

Orbax writes a step into a temporary directory and renames it when whole, and checks nothing when
it reads. So a step counts only once it is sealed: a list of its files with their hashes, written
last and hashed itself. What does not match its seal is reported and passed over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from etils import epath

from flax_resnet import distributed, seals
from flax_resnet.errors import UserError, check_range

Which = int | Literal["latest", "best"]
NONE, ALL_DAMAGED = -1, -2


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


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


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
        say: Callable[[str], None] = _tell,
    ):
        """Opens the directory. Without a config it is only read, and nothing is created.

        Args:
          directory: a local path, gs:// or s3://.
          config: what to keep, in order to save.
          resumed_from: with a config, the step that the run goes on from: newer checkpoints were
            passed over for it, and are set aside as ``STEP.damaged``.
          say: told of every checkpoint that is passed over.
        """
        self.directory = directory = epath.Path(directory)
        if "://" not in str(directory):
            self.directory = directory.resolve()
        self._config, self._say = config, say
        self._good: set[int] = set()
        self._told: set[int] = set()
        self._thread: threading.Thread | None = None
        self._failed: tuple[int, BaseException] | None = None
        self._orbax = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                state=ocp.StandardCheckpointHandler(), meta=ocp.JsonCheckpointHandler()
            )
        )
        if config is not None and distributed.is_lead():
            with self._writing(resumed_from or 0):
                self.directory.mkdir(parents=True, exist_ok=True)
                self._tidy(resumed_from)

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
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        with self._writing(step):
            self._orbax.save(self._path(step), args=items, force=True)
        commit = threading.Thread(
            target=self._commit, args=(step, scores), name=f"checkpoint {step}", daemon=True
        )
        self._thread = commit
        commit.start()

    def rate(self, step: int, scores: dict) -> None:
        """Adds the evaluation to a step that was saved before it was evaluated."""
        self.wait()
        if distributed.is_lead() and (seal := self._sealed().get(step)):
            with self._writing(step):
                seals.write(self._path(step), dataclasses.replace(seal, scores=scores))

    def latest_step(self) -> int | None:
        """The newest good checkpoint's step."""
        return self._first("latest")

    def best_step(self) -> int | None:
        """The good step with the highest evaluation top-1; of equal ones the newest."""
        return self._first("best")

    def evaluated_step(self) -> int:
        """The best step, or where none was kept by its evaluation the newest.

        Raises:
          UserError: there is no checkpoint.
        """
        best = self.best_step()
        return self.step("latest") if best is None else best

    def step(self, which: Which) -> int:
        """The step number that ``which`` names.

        Raises:
          UserError: there is no such checkpoint, or it is damaged.
        """
        step = self._first(which)
        if step is None:
            raise UserError(
                f"no checkpoint {which!r} in {self.directory}: it holds steps "
                f"{sorted(self._sealed())}"
            )
        return step

    def meta(self, which: Which = "latest") -> dict[str, Any]:
        """What a checkpoint says beside its arrays."""
        step = self.step(which)
        with self._reading(step):
            items = ocp.args.Composite(meta=ocp.args.JsonRestore())
            return self._orbax.restore(self._path(step), args=items)["meta"]

    def restore(self, template: Any, which: Which = "latest") -> tuple[Any, dict[str, Any]]:
        """Reads a checkpoint onto the shapes, dtypes and shardings of ``template``.

        Args:
          template: tree of jax.ShapeDtypeStruct (or arrays), with shardings.
          which: a step, "latest" or "best": the first of them that is whole.

        Returns:
          (state, meta).

        Raises:
          UserError: there is no such checkpoint, it cannot be read, or its arrays differ from
            the template.
        """
        step = self.step(which)
        with self._reading(step):
            self._check_shapes(step, template)
            items = ocp.args.Composite(
                state=ocp.args.StandardRestore(template), meta=ocp.args.JsonRestore()
            )
            restored = self._orbax.restore(self._path(step), args=items)
            return restored["state"], restored["meta"]

    def read(self, which: Which = "latest") -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads a checkpoint as it was stored: (state as nested dicts of numpy arrays, meta).

        Raises:
          UserError: there is no such checkpoint, or it cannot be read.
        """
        step = self.step(which)
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        with self._reading(step):
            template = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), self._stored(step)
            )
        state, meta = self.restore(template, step)
        return jax.device_get(state), meta

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
            self._orbax.close()

    def _path(self, step: int) -> epath.Path:
        return self.directory / str(step)

    def _seals(self) -> dict[int, seals.Seal | None]:
        """Every step that there is, with its seal; None where it has none, or a damaged one."""
        if not self.directory.exists():
            return {}
        names = [path.name for path in self.directory.iterdir() if path.name.isdecimal()]
        return {int(name): seals.read(self.directory / name) for name in names}

    def _sealed(self) -> dict[int, seals.Seal]:
        return {step: seal for step, seal in self._seals().items() if seal is not None}

    def _first(self, which: Which) -> int | None:
        """The first whole step of those that ``which`` names, the same in every process."""
        chosen = self._choose(which) if distributed.is_lead() else NONE
        chosen = distributed.same_everywhere(chosen)
        if chosen == ALL_DAMAGED:
            kind = f"checkpoint {which}" if isinstance(which, int) else "every checkpoint"
            raise UserError(
                f"{kind} in {self.directory} is damaged: put back a copy, or remove that directory "
                "to begin again"
            )
        return None if chosen == NONE else chosen

    def _choose(self, which: Which) -> int:
        steps, outcome = self._seals(), NONE
        order = sorted(steps, reverse=True)
        if which == "best":
            order = [step for _, step in sorted(_rated(steps), reverse=True)]
        elif which != "latest":
            order = [step for step in order if step == which]
        for step in order:
            problem = self._problem(step, steps[step])
            if problem is None:
                return step
            finished = seals.exists(self._path(step))
            outcome = ALL_DAMAGED if finished else outcome
            if step not in self._told:
                self._told.add(step)
                self._say(
                    f"checkpoint {step} in {self.directory} is "
                    f"{'damaged' if finished else 'unfinished'} ({problem}): it is passed over"
                )
        return NONE if which == "best" else outcome

    def _problem(self, step: int, seal: seals.Seal | None) -> str | None:
        if step in self._good:
            return None
        if seal is None:
            there = seals.exists(self._path(step))
            return f"{seals.SEAL} is " + ("not as it was written" if there else "not there")
        problem = seals.problem(self._path(step), seal)
        if problem is None:
            self._good.add(step)
        return problem

    def _stored(self, step: int) -> Any:
        stored = self._orbax.metadata(self._path(step)).item_metadata["state"]
        if stored is None:
            raise FileNotFoundError("it holds no state")
        return stored.tree

    def _check_shapes(self, step: int, template: Any) -> None:
        """Orbax casts silently where dtypes differ; here that is an error."""
        have = {_name(p): (x.shape, str(x.dtype)) for p, x in _leaves(self._stored(step))}
        want = {_name(p): (x.shape, str(x.dtype)) for p, x in _leaves(template)}
        for name in sorted(have.keys() | want.keys()):
            if have.get(name) != want.get(name):
                raise UserError(
                    f"checkpoint {step} in {self.directory} does not fit: {name} is "
                    f"{have.get(name, 'missing')} there and {want.get(name, 'absent')} in this run"
                )

    def _commit(self, step: int, scores: dict | None) -> None:
        """Waits until a save is on disk, seals it, and only then removes what is not kept."""
        try:
            self._orbax.wait_until_finished()
            if distributed.is_lead():
                seals.write(self._path(step), seals.take(self._path(step), scores))
                self._good.add(step)
                self._prune()
        except BaseException as error:
            self._failed = (step, error)  # raised by wait()

    def _prune(self) -> None:
        assert self._config is not None
        sealed = self._sealed()
        best = [step for _, step in sorted(_rated(sealed), reverse=True)][: self._config.keep_best]
        kept = {*sorted(sealed)[-self._config.keep_last :], *best}
        for step in sealed.keys() - kept:
            seals.remove(self._path(step))  # what is cut off here is no checkpoint any more

    def _tidy(self, resumed_from: int | None) -> None:
        sealed = self._sealed()
        newest = math.inf if resumed_from is None else resumed_from
        for path in list(self.directory.iterdir()):
            if ".orbax-checkpoint-tmp" in path.name:
                path.rmtree()
            elif path.name.isdecimal() and int(path.name) not in sealed:
                self._aside(path) if seals.exists(path) else path.rmtree()
            elif path.name.isdecimal() and int(path.name) > newest:
                self._aside(path)

    def _aside(self, path: epath.Path) -> None:
        """Keeps a damaged step out of the way, for whoever wants to look at it."""
        place = path.with_name(f"{path.name}.damaged")
        if place.exists():
            place.rmtree()
        path.rename(place)

    @contextlib.contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        """Turns whatever orbax, tensorstore and the file system raise into one line."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            sealed = sorted(set(self._sealed()) - {step})
            rest = (
                f"the newest whole one is of step {sealed[-1]}" if sealed else "there is no other"
            )
            raise UserError(
                f"checkpoint {step} could not be written to {self.directory} ({_reason(error)}); "
                f"{rest}: make room or mend the place, and the same command goes on from there"
            ) from error

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"checkpoint {self.directory}/{step} cannot be read ({_reason(error)}): remove "
                "that directory to go on from the one before"
            ) from error


def _rated(steps: Mapping[int, seals.Seal | None]) -> list[tuple[float, int]]:
    """(top-1, step) of those that were evaluated."""
    return [(seal.scores["top1"], step) for step, seal in steps.items() if seal and seal.scores]


def _reason(error: BaseException) -> str:
    """An error's first line, short; what a full disk is called comes first."""
    text = " ".join(f"{error or type(error).__name__}".split())
    for known in ("No space left on device", "Disk quota exceeded", "File too large"):
        if known in text:
            return known
    return text[:200]


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree)


def _name(path: Any) -> str:
    """A path such as params/head/kernel; orbax's metadata has names where a tree has indices."""
    parts = (getattr(p, "key", getattr(p, "name", getattr(p, "idx", p))) for p in path)
    return "/".join(str(part) for part in parts)
