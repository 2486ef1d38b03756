"""The one loop: a config and a workdir in, a trained network and its record out."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh

from flax_resnet import distributed, figures, metrics, transfer
from flax_resnet.augment import Augment, statistics, statistics_shape
from flax_resnet.checkpoint import Checkpoints
from flax_resnet.config import TrainConfig, check_workdir, claimed, write_json
from flax_resnet.data import Data
from flax_resnet.errors import UserError
from flax_resnet.layers import needs_x64
from flax_resnet.models import WeightsError
from flax_resnet.optim import LAMB, LARS, learning_rate_at
from flax_resnet.pretrained import Pretrained
from flax_resnet.record import to_record
from flax_resnet.step import LOSSES, Batch, TrainState, create_state, eval_step, train_step

# Dispatch is asynchronous: without a bound the host would queue every batch of the run.
MOST_STEPS_IN_FLIGHT = 2


@dataclasses.dataclass
class Run:
    """A run that is set up, and how far it has come."""

    config: TrainConfig
    workdir: Path
    mesh: Mesh
    data: Data
    num_steps: int
    steps_per_epoch: int
    schedule: optax.Schedule
    state: TrainState
    whole: TrainState | None = None  # where ``state`` is only the top of a frozen network
    step: int = 0
    seconds: float = 0.0
    compile_seconds: float = 0.0
    evaluation: dict[str, float] = dataclasses.field(default_factory=dict)
    confusion: np.ndarray | None = None

    @property
    def epoch(self) -> float:
        """Epochs done."""
        return self.step / self.steps_per_epoch

    def arrays(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        state = self.state
        return (state if self.whole is None else transfer.with_trunk(state, self.whole)).arrays()

    def compile(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """(train step compiled for the mesh, its state donated; eval step, jitted)."""
        config, loss = self.config, LOSSES[self.config.loss]
        step = functools.partial(
            train_step,
            augment=config.augment,
            loss=loss,
            label_smoothing=config.label_smoothing,
            accum_steps=config.accum_steps,
            ema_decay=config.ema_decay,
        )
        whole, split = distributed.replicated(self.mesh), distributed.batch_sharding(self.mesh)
        image = (config.batch_size, *self.data.batch_shape)
        kind = jnp.float32 if config.cache_features else jnp.uint8
        batch = {
            "image": jax.ShapeDtypeStruct(image, kind, sharding=split),
            "label": jax.ShapeDtypeStruct(image[:1], jnp.int32, sharding=split),
        }
        began = time.perf_counter()
        jitted = jax.jit(step, donate_argnums=0, out_shardings=whole)
        compiled = jitted.lower(self.state, batch).compile()
        self.compile_seconds = time.perf_counter() - began
        evaluate = jax.jit(functools.partial(eval_step, loss=loss), out_shardings=whole)
        return compiled, evaluate

    def evaluate(self, step: Callable[..., metrics.Sums]) -> None:
        """Evaluates the state on the whole evaluation split, every example once."""
        batches = self.data.eval_batches(self.config.eval_batch_size)
        self.evaluation, self.confusion = evaluate(step, self.state, batches)


def evaluate(
    step: Callable[..., metrics.Sums], state: TrainState, batches: Iterable[Batch]
) -> tuple[dict[str, float], np.ndarray]:
    """Runs an eval step over batches.

    Returns:
      (means of the metrics over all examples, int (K, K) confusion counts).
    """
    sums: list[metrics.Sums] = []
    confusion: Any = 0
    for batch in batches:
        one = step(state, batch)
        confusion = confusion + one.pop("confusion")
        jax.block_until_ready(sums[-1:])
        sums.append(one)
    return metrics.means(sums), np.asarray(confusion)


def set_up(config: TrainConfig, workdir: Path, mesh: Mesh) -> Run:
    """Checks and opens everything that a run needs, and writes nothing to the workdir.

    Raises:
      UserError: the first thing that is wrong.
    """
    distributed.check_divisible("batch_size", config.batch_size, mesh)
    distributed.check_divisible("eval_batch_size", config.eval_batch_size, mesh)
    if config.batch_size // mesh.size % config.accum_steps:
        raise UserError(
            f"batch_size={config.batch_size} over {mesh.size} devices does not divide into "
            f"accum_steps={config.accum_steps} equal parts: change one"
        )
    _check_model(config.model)
    transfer.check(
        config.model,
        cache_features=config.cache_features,
        images_change=config.augment != Augment() or config.data.random_resized_crop,
        measure_norms=config.measure_norms,
        unfreezes=bool(config.optimizer.unfreeze),
    )
    if isinstance(config.optimizer, (LARS, LAMB)) and getattr(config.model, "scan_blocks", False):
        raise UserError(
            f"{type(config.optimizer).__name__} with model.scan_blocks: its trust ratios are by "
            "layer, and scanned blocks share one array; use SGD, Adam or AdamW, or unrolled blocks"
        )
    data = Data(config.data, mesh, config.model.num_classes)
    steps_per_epoch = math.ceil(data.num_train / config.batch_size)
    num_steps = config.num_steps or max(1, round(config.num_epochs * steps_per_epoch))
    tx, schedule = config.optimizer.build(num_steps, steps_per_epoch)
    opened = None if config.weights is None else transfer.open_for(config.model, config.weights)
    state = distributed.put_replicated(mesh, _first_state(config, tx, data.image_shape, opened))
    run = Run(config, workdir, mesh, data, num_steps, steps_per_epoch, schedule, state)
    if not _restore(run):
        _measure_statistics(run)
    if config.cache_features:
        run.data = transfer.with_cached_features(
            run.state, config.model, data, config.eval_batch_size, _say
        )
        classify = functools.partial(config.model.apply, method="classify")
        run.whole, run.state = run.state, transfer.top_of(run.state).replace(apply_fn=classify)
    return run


def _say(line: str) -> None:
    if distributed.is_lead():
        print(line, flush=True)


def _first_state(
    config: TrainConfig,
    tx: optax.GradientTransformation,
    image_shape: tuple[int, int, int],
    opened: Pretrained | None,
) -> TrainState:
    """The state at step 0, but for statistics that are measured on the data."""
    model = config.model
    init = transfer.initializer(model, opened, config.weights, _say)
    if config.normalization == "weights":
        stats = transfer.normalization_of(opened, config.weights, image_shape)
    else:
        shapes = statistics_shape(config.normalization, image_shape)
        stats = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
    ema = config.ema_decay is not None
    try:
        state = create_state(model, tx, config.seed, image_shape, stats, ema=ema, init=init)
    except WeightsError:
        raise
    except (ValueError, TypeError, ZeroDivisionError) as error:
        name = type(model).__name__
        raise UserError(
            f"{name} with the fields given does not take images of {image_shape}: {error}"
        ) from error
    _check_output(model, state, image_shape)
    return state


def _check_model(model: nn.Module) -> None:
    """Raises UserError for fields that this loop cannot honour."""
    for name in ("dtype", "param_dtype"):
        if needs_x64(getattr(model, name, None)):
            raise UserError(
                f"model.{name}=float64 needs 64-bit JAX: set JAX_ENABLE_X64=1 in the environment"
            )
    if getattr(model, "axis_name", None) is not None:
        raise UserError(
            f"model.axis_name={model.axis_name}: it is for your own jax.pmap; leave it None here, "
            "where the statistics are those of the global batch already"
        )


def _check_output(model: nn.Module, state: TrainState, image_shape: tuple[int, ...]) -> None:
    """Raises UserError unless the model gives one logit for each class."""
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    out = jax.eval_shape(state.apply_fn, state.variables(), images)
    if getattr(out, "shape", None) != (2, model.num_classes):
        raise UserError(
            f"{type(model).__name__} gives {getattr(out, 'shape', type(out))} for two images, "
            f"expected (2, {model.num_classes}) logits: train it with include_top=True"
        )


def train_and_evaluate(
    config: TrainConfig, workdir: str | Path, *, mesh: Mesh | None = None
) -> dict[str, Any]:
    """Trains, evaluates, and leaves the record in ``workdir``; resumes a run that is there.

    Args:
      config: the run.
      workdir: gets config.json, metrics.jsonl, tensorboard/, checkpoints/, curves.png,
        confusion.png and, when the run is finished, result.json.
      mesh: devices to run on; by default all.

    Returns:
      What result.json holds; in a process that does not lead, nothing.

    Raises:
      UserError: bad input; the workdir has not been touched then.
    """
    workdir = Path(workdir).expanduser()
    check_workdir(workdir, config)
    result_path = workdir / "result.json"
    if result_path.exists():
        result = json.loads(result_path.read_text())
        print(
            f"{workdir} is finished: {result['step']} steps, top-1 {100 * result['top1']:.2f} %. "
            "Nothing to do; another --workdir trains again."
        )
        return result
    run = set_up(config, workdir, distributed.data_mesh() if mesh is None else mesh)
    steps = run.compile()  # what can be wrong has been by now; only then is anything written
    with claimed(workdir, config):
        checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint)
        try:
            log = metrics.RunLog(workdir, run.step, run.num_steps, lead=distributed.is_lead())
            try:
                log.message(_opening_line(run))
                _loop(run, *steps, checkpoints, log)
            finally:
                log.close()
            checkpoints.wait()
        finally:
            checkpoints.close()
        return _finish(run) if distributed.is_lead() else {}


def _measure_statistics(run: Run) -> None:
    """Puts what is measured on the training split into the state."""
    config, data, like = run.config, run.data, run.state.normalization
    if config.normalization != "weights":
        stats = statistics(config.normalization, data.image_shape, data.train_images())
        stats = jax.tree.map(lambda new, old: np.asarray(new, old.dtype), stats, like)
        run.state = run.state.replace(normalization=distributed.put_replicated(run.mesh, stats))
    if config.measure_norms:
        norms = transfer.measure_norms(run.state, config.model, data, config.eval_batch_size)
        run.state = run.state.replace(batch_stats=distributed.put_replicated(run.mesh, norms))
        if run.state.ema is not None:
            ema = {**run.state.ema, "batch_stats": jax.tree.map(jnp.copy, run.state.batch_stats)}
            run.state = run.state.replace(ema=ema)


def _restore(run: Run) -> bool:
    """Puts the workdir's newest checkpoint into the run; False where there is none."""
    directory = run.workdir / "checkpoints"
    if not directory.is_dir():
        return False
    reader = Checkpoints(directory)
    try:
        if reader.latest_step() is None:
            return False
        arrays, meta = reader.restore(run.state.arrays())
    finally:
        reader.close()
    for name, here in run.data.describe().items():
        if meta[name] != here:
            raise UserError(
                f"{run.workdir} was trained on data with {name} {meta[name]} and it is {here} now: "
                "give the same data, or another --workdir"
            )
    run.state = run.state.replace(**arrays)
    run.step, run.seconds = meta["step"], meta["seconds"]
    return True


def _loop(
    run: Run,
    step_fn: Callable[..., Any],
    eval_fn: Callable[..., Any],
    checkpoints: Checkpoints,
    log: metrics.RunLog,
) -> None:
    """Trains from ``run.step`` to the end; evaluates, logs and saves on the way."""
    config = run.config
    began = time.perf_counter() - run.seconds - run.compile_seconds
    log.message(f"compiled in {run.compile_seconds:.1f} s")
    eval_every = max(1, round(config.eval_every_epochs * run.steps_per_epoch))
    save_every = (eval_every * config.checkpoint.every_evals,
                  config.checkpoint.every_steps or run.num_steps)  # fmt: skip
    batches = run.data.train_batches(config.seed, config.batch_size, run.step, run.num_steps)
    pending: list[metrics.Sums] = []
    timer = metrics.Timer()
    for batch in timer.waiting(batches, config.batch_size):
        run.state, sums = step_fn(run.state, batch)
        run.step += 1
        pending.append(sums)
        if len(pending) > MOST_STEPS_IN_FLIGHT:
            jax.block_until_ready(pending[-1 - MOST_STEPS_IN_FLIGHT])
        evaluates = run.step == run.num_steps or run.step % eval_every == 0
        saves = run.step == run.num_steps or any(run.step % every == 0 for every in save_every)
        if saves or run.step % config.log_every_steps == 0:
            # Saves end an interval too, so that a resumed run logs what an unbroken one does.
            rate = learning_rate_at(run.schedule, run.state.opt_state, run.step - 1)
            values = {**metrics.means(pending), "learning_rate": float(rate), **timer.summary()}
            log.write("train", run.step, run.epoch, values)
            pending.clear()
            timer.reset()
        if evaluates:
            run.evaluate(eval_fn)
            log.write("eval", run.step, run.epoch, run.evaluation)
        if saves:
            run.seconds = time.perf_counter() - began
            meta = {
                "step": run.step,
                "seconds": run.seconds,
                **run.data.describe(),
                "config": to_record(config),
            }
            checkpoints.save(run.step, run.arrays(), meta, run.evaluation if evaluates else None)
            timer.reset()
    if run.confusion is None:  # the last checkpoint was the end, and the record was not written
        run.evaluate(eval_fn)


def _opening_line(run: Run) -> str:
    data, devices = run.data, run.mesh.devices.flat
    parameters = sum(x.size for x in jax.tree.leaves((run.whole or run.state).params))
    return (
        f"{type(run.config.model).__name__}, {parameters:,} parameters; {run.config.data.title}: "
        f"{data.num_train:,} training and {data.num_eval:,} evaluation images of "
        f"{'x'.join(map(str, data.image_shape))}, {'resident' if data.resident else 'streamed'}; "
        f"{run.num_steps} steps, {run.steps_per_epoch} an epoch, on {run.mesh.size} x "
        f"{devices[0].device_kind}" + (f"; resumes at step {run.step}" if run.step else "")
    )


def _finish(run: Run) -> dict[str, Any]:
    """Draws the figures, prints the closing table, and writes result.json last."""
    workdir, records = run.workdir, metrics.read_metrics(run.workdir)
    best = max((r for r in records if r["split"] == "eval"), key=lambda r: (r["top1"], r["step"]))
    last = [r for r in records if r["split"] == "train"][-1]
    name = f"{type(run.config.model).__name__} on {run.config.data.title}"
    figures.curves(records, workdir / "curves.png", f"{name}, seed {run.config.seed}")
    title = f"{name}: top-1 {100 * run.evaluation['top1']:.2f} % of {run.data.num_eval}"
    assert run.confusion is not None
    figures.confusion(run.confusion, run.data.class_names, workdir / "confusion.png", title)
    result = {
        "step": run.step,
        "epochs": run.epoch,
        **run.evaluation,
        "best_top1": best["top1"],
        "best_step": best["step"],
        "train_top1": last["top1"],
        "train_loss": last["loss"],
        "seconds": run.seconds,
        "num_train": run.data.num_train,
        "num_eval": run.data.num_eval,
    }
    metrics.closing_table(
        name,
        {
            "evaluation top-1": f"{100 * result['top1']:.2f} % of {result['num_eval']} images",
            "evaluation top-5": f"{100 * result['top5']:.2f} %",
            "evaluation loss": f"{result['loss']:.4f} nats",
            "best top-1": f"{100 * best['top1']:.2f} % at step {best['step']}",
            "training top-1": f"{100 * last['top1']:.2f} % (augmented, last interval)",
            "steps": f"{run.step} ({run.epoch:g} epochs)",
            "time": f"{run.seconds:.1f} s, compilation and evaluation included",
            "record": str(workdir),
        },
    )
    write_json(workdir / "result.json", result)
    return result
