"""The steps in a directory of checkpoints: which are whole, which to read, which to keep.

A step is a sealed directory of that name; in a bucket it is a copy of one that was sealed here.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Mapping
from typing import Literal

import jax
from etils import epath

from flax_resnet import distributed, seals, storage
from flax_resnet.errors import UserError

Which = int | Literal["latest", "best", "evaluated"]
NONE, ALL_DAMAGED = -1, -2
# Times to choose again where what was chosen is removed meanwhile, by the run that goes on.
CHOICES = 10


class Shelf:
    """The steps of one run, in ``directory/STEP``; every process has one, and the lead writes.

    Attributes:
      directory: local or in a bucket.
      made: where a step is written before it is sealed: there, or for a bucket on this machine.
    """

    def __init__(
        self, directory: epath.PathLike, say: Callable[[str], None], staging: epath.PathLike | None
    ):
        """Finds the directory and writes nothing; the arguments are those of Checkpoints."""
        self.directory = self.made = storage.opened(directory)
        self.remote = storage.is_remote(directory)
        self._say, self._staging = say, staging
        self._good: set[int] = set()
        self._told: set[int] = set()
        self._here = contextlib.ExitStack()  # holds what is on this machine of a bucket's
        self._copy: tuple[int, epath.Path] | None = None

    def open(self, resumed_from: int | None) -> None:
        """Makes ready for writing: a trial, and what is unfinished or not gone on from cleared."""
        if self.remote:
            self.made = self._stage()
        if distributed.is_lead():
            storage.prepare(self.directory)
            self._tidy(resumed_from)

    def close(self) -> None:
        """Removes what was copied here."""
        self._here.close()

    def path(self, step: int) -> epath.Path:
        """The directory of a step."""
        return self.directory / str(step)

    def sealed(self) -> dict[int, seals.Seal]:
        """The steps that were finished."""
        return {step: seal for step, seal in self._seals().items() if seal is not None}

    def first(self, which: Which) -> int | None:
        """The first whole step of those that ``which`` names, the same in every process.

        Raises:
          UserError: all of them are damaged.
        """
        chosen = distributed.same_everywhere(self._choose(which) if distributed.is_lead() else NONE)
        if chosen == ALL_DAMAGED:
            kind = f"checkpoint {which}" if isinstance(which, int) else "every checkpoint"
            raise UserError(
                f"{kind} in {self.directory} is damaged: put back a copy, or remove that directory "
                "to begin again"
            )
        return None if chosen == NONE else chosen

    def here(self, step: int) -> epath.Path:
        """A step's directory on this machine.

        Raises:
          FileNotFoundError: the step has no seal any more.
          OSError: its copy differs from it.
        """
        seal = seals.read(self.path(step))
        if seal is None:
            raise FileNotFoundError(f"{seals.SEAL} is not there")
        path = self._fetched(step, seal)
        if self.remote and (problem := seals.problem(path, seal)):
            raise OSError(problem)
        return path

    def still_whole(self, step: int) -> bool:
        """Whether all was there while a step was read: its seal is what is removed first."""
        if self.remote or seals.exists(self.path(step)):
            return True
        self._good.discard(step)
        return False

    def seal(self, step: int, scores: dict[str, float] | None) -> None:
        """Seals what was written in ``made``, and copies it to the bucket where there is one."""
        made, path = self.made / str(step), self.path(step)
        seal = seals.take(made, scores)
        if self.remote:
            seals.remove(path)
            storage.copy(made, path, seal.files)
        seals.write(path, seal)
        if self.remote:
            made.rmtree()
        self._good.add(step)

    def discard(self, step: int) -> None:
        """Removes what a save that failed has left, as far as that can be done."""
        names = (str(step), f"{step}.orbax-checkpoint-tmp")
        for path in {place / name for place in (self.made, self.directory) for name in names}:
            with contextlib.suppress(Exception):
                if not seals.exists(path):
                    path.rmtree()

    def prune(self, keep_last: int, keep_best: int) -> None:
        """Removes all steps but the newest and the best."""
        sealed = self.sealed()
        best = [step for _, step in sorted(_rated(sealed), reverse=True)][:keep_best]
        for step in sealed.keys() - {*sorted(sealed)[-keep_last:], *best}:
            seals.remove(self.path(step))  # what is cut off here is no checkpoint any more

    def _seals(self) -> dict[int, seals.Seal | None]:
        """Every step that there is, with its seal; None where it has none, or a damaged one."""
        with storage.reached(self.directory):
            names = [path.name for path in self._entries() if path.name.isdecimal()]
            return {int(name): seals.read(self.directory / name) for name in names}

    def _entries(self) -> list[epath.Path]:
        with contextlib.suppress(FileNotFoundError):
            return list(self.directory.iterdir())
        return []

    def _choose(self, which: Which) -> int:
        steps = self._seals()
        for _ in range(CHOICES):
            problems: dict[int, str] = {}
            chosen = self._whole(steps, which, problems)
            before, steps = steps, self._seals()
            if chosen is not None or steps == before:
                break
        outcome = NONE
        for step in problems:
            if step not in steps or steps[step] != before[step]:
                continue  # removed or sealed meanwhile
            finished = problems[step] != f"{seals.SEAL} is not there"
            outcome = ALL_DAMAGED if finished and which != "best" else outcome
            if step not in self._told:
                self._told.add(step)
                self._say(
                    f"checkpoint {step} in {self.directory} is "
                    f"{'damaged' if finished else 'unfinished'} ({problems[step]}): it is passed "
                    "over"
                )
        return outcome if chosen is None else chosen

    def _whole(
        self, steps: Mapping[int, seals.Seal | None], which: Which, problems: dict[int, str]
    ) -> int | None:
        """The first that is; what is wrong with those before it is added to ``problems``."""
        latest = sorted(steps, reverse=True)
        best = [step for _, step in sorted(_rated(steps), reverse=True)]
        orders = {"latest": latest, "best": best, "evaluated": best + latest}
        named = [s for s in latest if s == which] if isinstance(which, int) else orders[which]
        for step in named:
            problem = self._problem(step, steps[step])
            if problem is None:
                return step
            problems[step] = problem
        return None

    def _problem(self, step: int, seal: seals.Seal | None) -> str | None:
        if step in self._good:
            return None
        if seal is None:
            there = seals.exists(self.path(step))
            return f"{seals.SEAL} is " + ("not as it was written" if there else "not there")
        problem = seals.problem(self._fetched(step, seal), seal)
        if problem is None:
            self._good.add(step)
        return problem

    def _fetched(self, step: int, seal: seals.Seal) -> epath.Path:
        """The directory of a step, or for a bucket a copy of it, the last one that was asked."""
        if not self.remote:
            return self.path(step)
        if self._copy is None or self._copy[0] != step:
            if self._copy is not None:
                self._copy[1].rmtree(missing_ok=True)
            self._copy = (step, self._temporary() / str(step))
            with storage.reached(self.directory):
                storage.copy(self.path(step), self._copy[1], seal.files)
        return self._copy[1]

    def _tidy(self, resumed_from: int | None) -> None:
        sealed = self.sealed()
        newest = math.inf if resumed_from is None else resumed_from
        for path in self._entries():
            if ".orbax-checkpoint-tmp" in path.name:
                path.rmtree()
            elif path.name.isdecimal() and int(path.name) not in sealed:
                self._aside(path) if seals.exists(path) else path.rmtree()
            elif path.name.isdecimal() and int(path.name) > newest:
                self._aside(path)

    def _aside(self, path: epath.Path) -> None:
        """Keeps a damaged step out of the way, for whoever wants to look at it."""
        place = path.with_name(f"{path.name}.damaged")
        place.rmtree(missing_ok=True)
        if self.remote:  # a bucket has no directories to rename
            storage.copy(path, place, [*seals.files(path), seals.SEAL])
            path.rmtree()
        else:
            path.rename(place)

    def _stage(self) -> epath.Path:
        if self._staging is None:
            if jax.process_count() > 1:
                raise UserError(
                    f"{self.directory}: several processes need a staging directory that they share"
                )
            return self._temporary()
        stage = storage.opened(self._staging)
        if distributed.is_lead():
            stage.rmtree(missing_ok=True)
            stage.mkdir(parents=True)
            self._here.callback(stage.rmtree, missing_ok=True)
        return stage

    def _temporary(self) -> epath.Path:
        made = tempfile.TemporaryDirectory(prefix="flax_resnet_", ignore_cleanup_errors=True)
        return epath.Path(self._here.enter_context(made))


def _rated(steps: Mapping[int, seals.Seal | None]) -> list[tuple[float, int]]:
    """(top-1, step) of those that were evaluated."""
    return [(seal.scores["top1"], step) for step, seal in steps.items() if seal and seal.scores]
