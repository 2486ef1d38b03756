"""What a run's network says of its evaluation split, example by example."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_resnet.data.normalization import normalize
from flax_resnet.errors import UserError
from flax_resnet.inspection.layers import forward
from flax_resnet.inspection.run import Inspected
from flax_resnet.training import metrics
from flax_resnet.training.step import LOSSES

MOST_FEATURES = 2000


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Of n examples in the order of the split, each once."""

    labels: np.ndarray
    """True classes, int (n,)."""
    probabilities: np.ndarray
    """Softmax probabilities, float (n, num_classes)."""
    losses: np.ndarray
    """The run's loss of each, nats, float (n,)."""
    rows: np.ndarray
    """Those whose features were kept, evenly spread, int (m,)."""
    features: np.ndarray
    """Inputs of the head for them, float (m, F)."""

    @property
    def predicted(self) -> np.ndarray:
        """Most probable classes, int (n,); of equal ones the first."""
        return self.probabilities.argmax(axis=1)

    @property
    def top1(self) -> float:
        """Share of the examples that are classified right."""
        return float(np.mean(self.predicted == self.labels))

    @property
    def confusion(self) -> np.ndarray:
        """Examples by true class (row) and predicted class: int (num_classes, num_classes)."""
        counts = np.zeros((self.probabilities.shape[1],) * 2, np.int64)
        np.add.at(counts, (self.labels, self.predicted), 1)
        return counts

    def reliability(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        """What ``metrics.reliability`` gives."""
        right = self.predicted == self.labels
        return metrics.reliability(self.probabilities.max(axis=1), right)

    @property
    def calibration_error(self) -> float:
        """Expected calibration error (Guo et al. 2017), between 0 and 1."""
        return self.reliability()[-1]


def predictions(run: Inspected) -> Predictions:
    """Runs the network on the evaluation split, every example once.

    Raises:
      UserError: the data are not there, or outputs are not finite.
    """
    loss, count = LOSSES[run.config.loss], run.data.num_eval
    kept = np.zeros(count, bool)
    kept[np.linspace(0, count - 1, min(count, MOST_FEATURES)).round().astype(int)] = True

    @jax.jit
    def step(variables: Any, stats: Any, batch: Any) -> Any:
        logits, features = forward(run.module, variables, normalize(batch["image"], stats))
        label = batch["label"]
        return {
            "labels": label,
            "probabilities": jax.nn.softmax(logits),
            "losses": loss(logits, jax.nn.one_hot(label, logits.shape[-1])),
            "features": features.astype(jnp.float32),
        }

    arrays: dict[str, list[np.ndarray]] = {}
    start = 0
    batches = run.data.in_order("eval", min(run.config.eval_batch_size, count))
    for batch, each in metrics.outputs(functools.partial(step, run.variables, run.stats), batches):
        mask = np.asarray(batch["mask"])
        here = kept[start : start + mask.sum()]
        each["features"] = each["features"][mask][here]
        for name, value in each.items():
            arrays.setdefault(name, []).append(value if name == "features" else value[mask])
        start += len(here)
    joined = {name: np.concatenate(parts) for name, parts in arrays.items()}
    if not np.isfinite(joined["losses"]).all():
        raise UserError(
            f"the network's outputs in {run.workdir} at step {run.step} are not finite: the run "
            "has diverged; look at an earlier checkpoint"
        )
    return Predictions(**joined, rows=np.nonzero(kept)[0])


def worst(found: Predictions, count: int) -> np.ndarray:
    """Rows of the ``count`` largest losses, the largest first; of equal ones the lower row."""
    return np.argsort(-found.losses, kind="stable")[:count]
