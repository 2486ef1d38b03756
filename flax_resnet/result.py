"""The end of a run: its figures, its closing table and result.json."""

from __future__ import annotations

from typing import Any

from flax_resnet import figures, models, text_tables
from flax_resnet.run import Run
from flax_resnet.run_dir import read_metrics, write_json


def conclude(run: Run, *, quiet: bool = False) -> dict[str, Any]:
    """Draws the figures, prints the closing table, and writes result.json last."""
    workdir, records = run.workdir, read_metrics(run.workdir)
    best = max((r for r in records if r["split"] == "eval"), key=lambda r: (r["top1"], r["step"]))
    last = [r for r in records if r["split"] == "train"][-1]
    name = f"{models.network_name(run.config.model)} on {run.config.data.title}"
    figures.curves(records, workdir / "curves.png", f"{name}, seed {run.config.seed}")
    title = f"{name}: top-1 {100 * run.evaluation['top1']:.2f} % of {run.data.num_eval}"
    assert run.confusion is not None
    progress, shared_by = run.progress, run.shared_by
    figures.confusion(run.confusion, run.data.class_names, workdir / "confusion.png", title)
    result = {
        "step": progress.step,
        "epochs": run.epoch,
        **run.evaluation,
        "best_top1": best["top1"],
        "best_step": best["step"],
        "train_top1": last["top1"],
        "train_loss": last["loss"],
        "parameters": run.parameters,
        "seconds": progress.seconds / shared_by,
        "start_seconds": progress.start_seconds / shared_by,
        "train_seconds": progress.train_seconds / shared_by,
        "compile_seconds": progress.spent["compile"] / shared_by,
        "eval_seconds": progress.spent["evaluate"] / shared_by,
        "num_train": run.data.num_train,
        "num_eval": run.data.num_eval,
        **({"together": shared_by} if shared_by > 1 else {}),
    }
    if not quiet:
        text_tables.show(name, [*text_tables.result_rows(result).items(), ("record", workdir)])
    write_json(workdir / "result.json", result)
    return result
