"""The model card of weights: how good they are, how to use them and how to measure them again.

huggingface_hub writes the YAML that the hub's page shows. The card does not repeat what config.json
beside it says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

import jax

from flax_resnet.data.folders import TEST_NAMES
from flax_resnet.records.files import quoted
from flax_resnet.weights import Pretrained
from flax_resnet.weights.hub import client, is_address, parse

CARD = """---
{metadata}
---

# {name}

{architecture}, a residual network of {parameters:,} parameters for image classification in JAX and
Flax, by flax_resnet. `config.json` has what is known of its images, its classes and its training.

## Accuracy

{accuracy}

## Use

```bash
flax-resnet pull {address} {name}
flax-resnet predict photo.png --weights {address}
```

```python
import flax_resnet

opened = flax_resnet.open_weights("{address}")
```
"""
ACCURACY = """\
| images | top-1 | top-5 | loss, nats |
| --- | --- | --- | --- |
| {images:,} of {data}, split {split} | {top1:.2%} | {top5:.2%} | {loss:.4f} |

One run of seed {seed}, at step {step}{best}. To measure it again{folder}:

```bash
flax-resnet evaluate {flags}
```"""


class Trained(NamedTuple):
    """The run that weights are of."""

    config: Any
    """Its TrainConfig."""
    checkpoint: Mapping[str, Any]
    """What the checkpoint says of itself, with "step" and "num_eval"."""
    evaluations: Sequence[Mapping[str, Any]]
    """The evaluations of the run, with "step", "top1", "top5" and "loss"."""


def model_card(
    opened: Pretrained, repository: str, license: str, trained: Trained | None = None
) -> str:
    """The README.md of OWNER/NAME: YAML that the hub reads, and Markdown for people."""
    client()  # raises UserError where huggingface_hub is not installed
    from huggingface_hub import ModelCardData

    name, address = repository.partition("/")[2], f"hf://{repository}"
    accuracy = "Not known: these weights were published without the record of a run."
    fields: dict[str, Any] = {}
    if trained is not None:
        results, accuracy = _measured(address, trained)
        if results:
            fields = {"metrics": ["accuracy"], "model_name": name, "eval_results": results}
        origin = trained.config.weights
        if origin is not None:
            accuracy += f"\n\nTrained from {escaped(origin)}, whose licence counts as well."
        if is_address(origin):
            fields["base_model"] = parse(origin)[0]
    metadata = ModelCardData(
        license=license,
        library_name="flax_resnet",
        pipeline_tag="image-classification",
        tags=["jax", "flax", "resnet", "image-classification"],
        **fields,
    )
    return CARD.format(
        metadata=metadata.to_yaml(),
        name=name,
        architecture=escaped(opened.name),
        parameters=sum(x.size for x in jax.tree.leaves(opened.variables["params"])),
        accuracy=accuracy,
        address=address,
    )


def escaped(value: Any) -> str:
    """A text on one line that is no Markdown and no HTML."""
    return re.sub(r"([\\`*_{}\[\]<>|#&@~$!])", r"\\\1", " ".join(str(value).split()))


def _measured(address: str, trained: Trained) -> tuple[list[Any], str]:
    """(the figures of the run for the YAML, these and the command that measures them again)."""
    from huggingface_hub import EvalResult

    config, step, data = trained.config, trained.checkpoint["step"], trained.config.data
    scores = next((row for row in trained.evaluations[::-1] if row["step"] == step), None)
    if scores is None:
        return [], f"Not known: the checkpoint of step {step} was not evaluated."
    split = trained.checkpoint.get("evaluated_on") or data.eval_split or TEST_NAMES[0]
    data_name = PurePath(data.folder).name or "images" if data.folder else data.name
    result = EvalResult(
        task_type="image-classification",
        dataset_type="imagefolder" if data.folder else data.name,
        dataset_name=data_name,
        dataset_split=split,
        dataset_args={"images": trained.checkpoint["num_eval"]},
        metric_type="accuracy",
        metric_name="top-1 accuracy",
        metric_value=scores["top1"],
    )
    folder = ["--data.folder", "DIR", "--data.train-split", data.train_split,
              "--data.holdout-every", str(data.holdout_every)]  # fmt: skip
    words = ["--weights", address, *(folder if data.folder else ["--data.name", data.name])]
    words += ["--data.eval-split", split, *(["--tta", config.tta] * (config.tta != "none"))]
    top1 = [row["top1"] for row in trained.evaluations]
    chosen = len(top1) > 1 and scores["top1"] == max(top1)
    return [result], ACCURACY.format(
        images=trained.checkpoint["num_eval"],
        data=escaped(data_name),
        split=escaped(split),
        top1=scores["top1"],
        top5=scores["top5"],
        loss=scores["loss"],
        seed=config.seed,
        step=step,
        best=f", the best of {len(top1)} evaluations on these images" if chosen else "",
        folder=", DIR being the same folder" if data.folder else "",
        flags=" ".join(map(quoted, words)),
    )
