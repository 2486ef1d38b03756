"""Checkpoints through orbax: the newest few and the best, saved while training goes on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from flax_resnet.errors import UserError, check_range


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep."""

    every_steps: int | None = None
    """Save after so many steps too; None saves after evaluations only."""
    every_evals: int = 1
    """Save after one evaluation in so many, and after the last one."""
    keep_last: int = 2
    """Newest checkpoints to keep."""
    keep_best: int = 1
    """Checkpoints to keep by evaluation top-1, of those that were saved after one."""

    def __post_init__(self) -> None:
        bounds = {"every_steps": 1, "every_evals": 1, "keep_last": 1, "keep_best": 0}
        for name, least in bounds.items():
            check_range(f"checkpoint.{name}", getattr(self, name), least)


class Checkpoints:
    """The checkpoints of one workdir, in ``directory/STEP``.

    Each holds ``state`` (a tree of arrays) and ``meta`` (JSON: the data position, the config
    record, the evaluation). Orbax writes into a temporary directory and renames it when whole,
    so a save that was cut off leaves no step behind.
    """

    def __init__(self, directory: Path, config: CheckpointConfig | None = None):
        """Opens the directory. Without a config it is only read, and nothing is created."""
        policies: list[Any] = []
        if config is not None:
            policies.append(preservation_policy.LatestN(config.keep_last))
            if config.keep_best:
                best = preservation_policy.BestN(
                    get_metric_fn=_top1,
                    n=config.keep_best,
                    keep_checkpoints_without_metrics=False,
                )
                policies.append(best)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies)
            if policies
            else None,
            best_fn=_top1,
            create=config is not None,
            read_only=config is None,
        )
        self._manager = ocp.CheckpointManager(
            directory.resolve(),
            options=options,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
        )

    def save(self, step: int, state: Any, meta: dict[str, Any], metrics: dict | None) -> None:
        """Copies ``state`` (a tree of arrays) and writes it in the background.

        Args:
          step: names the checkpoint.
          state: tree of jax or numpy arrays; it may be donated as soon as this returns.
          meta: JSON values.
          metrics: the evaluation at this step, with "top1", or None.
        """
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        self._manager.save(step, args=items, metrics=metrics)

    def latest_step(self) -> int | None:
        """The newest whole checkpoint's step."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step with the highest evaluation top-1."""
        return self._manager.best_step()

    def evaluated_step(self) -> int:
        """The best step, or where none was kept by its evaluation the newest.

        Raises:
          UserError: there is no checkpoint.
        """
        return self.step("latest" if self.best_step() is None else "best")

    def step(self, which: int | Literal["latest", "best"]) -> int:
        """The step number that ``which`` names.

        Raises:
          UserError: there is no such checkpoint.
        """
        step = self.latest_step() if which == "latest" else which
        step = self.best_step() if step == "best" else step
        if not isinstance(step, int) or step not in self._manager.all_steps():
            raise UserError(
                f"no checkpoint {which!r} in {self._manager.directory}: it holds steps "
                f"{sorted(self._manager.all_steps())}"
            )
        return step

    def restore(
        self, template: Any, which: int | Literal["latest", "best"] = "latest"
    ) -> tuple[Any, dict[str, Any]]:
        """Reads a checkpoint onto the shapes, dtypes and shardings of ``template``.

        Args:
          template: tree of jax.ShapeDtypeStruct (or arrays), with shardings.
          which: a step, "latest" or "best".

        Returns:
          (state, meta).

        Raises:
          UserError: there is no such checkpoint, it cannot be read, or its arrays differ from
            the template.
        """
        step = self.step(which)
        try:
            self._check_shapes(step, template)
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(template), meta=ocp.args.JsonRestore()
                ),
            )
            return restored["state"], restored["meta"]
        except UserError:
            raise
        except Exception as error:  # whatever orbax and tensorstore raise on damaged files
            raise UserError(
                f"checkpoint {self._manager.directory}/{step} cannot be read ({error!r}): remove "
                "that directory to go on from the one before"
            ) from error

    def read(
        self, which: int | Literal["latest", "best"] = "latest"
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads a checkpoint as it was stored: (state as nested dicts of numpy arrays, meta).

        Raises:
          UserError: there is no such checkpoint, or it cannot be read.
        """
        step = self.step(which)
        stored = self._manager.item_metadata(step)["state"]
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        template = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), stored and stored.tree
        )
        state, meta = self.restore(template, step)
        return jax.device_get(state), meta

    def _check_shapes(self, step: int, template: Any) -> None:
        """Orbax casts silently where dtypes differ; here that is an error."""
        stored = self._manager.item_metadata(step)["state"]
        if stored is None:
            raise FileNotFoundError("it holds no state")
        stored = stored.tree
        have = {_name(p): (x.shape, str(x.dtype)) for p, x in _leaves(stored)}
        want = {_name(p): (x.shape, str(x.dtype)) for p, x in _leaves(template)}
        for name in sorted(have.keys() | want.keys()):
            if have.get(name) != want.get(name):
                raise UserError(
                    f"checkpoint {step} in {self._manager.directory} does not fit: {name} is "
                    f"{have.get(name, 'missing')} there and {want.get(name, 'absent')} in this run"
                )

    def wait(self) -> None:
        """Blocks until every save is on disk, and raises what went wrong in one."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for saves under way and lets go of the directory."""
        self._manager.close()


def _top1(metrics: Any) -> float:
    return metrics["top1"]


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree)


def _name(path: Any) -> str:
    """A path such as params/head/kernel; orbax's metadata has names where a tree has indices."""
    parts = (getattr(p, "key", getattr(p, "name", getattr(p, "idx", p))) for p in path)
    return "/".join(str(part) for part in parts)
