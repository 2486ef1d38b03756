"""The model card of weights: how good they are, how to use them and how to measure them again.

huggingface_hub writes the YAML that the hub's page shows. The card does not repeat what config.json
beside it says.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

import jax

from flax_resnet.errors import UserError
from flax_resnet.pretrained import Pretrained
from flax_resnet.pretrained.hub import client, is_address, parse

CARD = """---
{metadata}
---

# {name}

{architecture}, a residual network of {parameters:,} parameters for image classification in JAX and
Flax, by flax_resnet. `config.json` has what is known of its images, its classes and its training.

## Accuracy

{accuracy}

## Use

```python
from flax_resnet.pretrained import open_weights

opened = open_weights("{address}")
```

```bash
{commands}
```

`{address}@COMMIT` stays the same when this repository changes.

## Licence

{license}
"""


class License(NamedTuple):
    """What others may do with the weights."""

    id: str
    """The hub's word for it, such as "apache-2.0", or "other"."""
    name: str | None = None
    """Of "other": what the licence is called."""
    link: str | None = None
    """Of "other": the address of its text."""


class Trained(NamedTuple):
    """The run that weights are of."""

    config: Any
    """Its TrainConfig."""
    checkpoint: Mapping[str, Any]
    """What the checkpoint says of itself, with "step" and "num_eval"."""
    evaluations: Sequence[Mapping[str, Any]]
    """The evaluations of the run, with "step", "top1", "top5" and "loss"."""

    @property
    def scores(self) -> Mapping[str, Any] | None:
        """The evaluation of these weights; None where there was none."""
        step = self.checkpoint["step"]
        return next((row for row in self.evaluations[::-1] if row["step"] == step), None)

    @property
    def data_name(self) -> str:
        """Name of the data set, or of the folder without its parents."""
        data = self.config.data
        return PurePath(data.folder).name or "images" if data.folder else data.name


def model_card(
    opened: Pretrained, repository: str, license: License, trained: Trained | None = None
) -> str:
    """The README.md of a repository: YAML that the hub reads, and Markdown for people.

    Args:
      opened: the weights.
      repository: OWNER/NAME.
      license: of the weights.
      trained: the run they are of, where it is known.

    Raises:
      UserError: huggingface_hub is not installed, or "other" has no name or link.
    """
    if license.id == "other" and not (license.name and license.link):
        raise UserError("license 'other': expected the licence's name and a link to its text")
    folder, address = repository.partition("/")[2], f"hf://{repository}"
    commands = [f"flax-resnet pull {repository} {folder}"]
    if opened.preprocessing is not None and getattr(opened.module, "include_top", True):
        commands.insert(0, f"flax-resnet predict photo.png --weights {address}")
    return CARD.format(
        metadata=_metadata(folder, license, trained),
        name=escaped(folder),
        architecture=escaped(opened.name),
        parameters=sum(x.size for x in jax.tree.leaves(opened.variables["params"])),
        accuracy=_accuracy(repository, trained),
        address=address,
        commands="\n".join(commands),
        license=_license(license, trained),
    )


def line(value: Any) -> str:
    """A text on one line."""
    return " ".join(str(value).split())


def escaped(value: Any) -> str:
    """A text on one line that is no Markdown and no HTML."""
    return re.sub(r"([\\`*_{}\[\]<>|#&@~$!])", r"\\\1", line(value))


def _metadata(name: str, license: License, trained: Trained | None) -> str:
    """YAML: what the hub files a model under, and the accuracy that its page shows."""
    client()  # raises where huggingface_hub is not installed
    from huggingface_hub import EvalResult, ModelCardData

    fields: dict[str, Any] = {}
    if trained is not None and is_address(trained.config.weights):
        fields["base_model"] = parse(trained.config.weights).name
    if trained is not None and (scores := trained.scores) is not None:
        data = trained.config.data
        fields |= {"metrics": ["accuracy"], "model_name": name}
        fields["eval_results"] = [
            EvalResult(
                task_type="image-classification",
                dataset_type="imagefolder" if data.folder else data.name,
                dataset_name=line(trained.data_name),
                dataset_split=line(data.eval_split),
                dataset_args={"images": trained.checkpoint["num_eval"]},
                metric_type=kind,
                metric_name=label,
                metric_value=scores[key],
            )
            for kind, label, key in (
                ("accuracy", "top-1 accuracy", "top1"),
                ("accuracy", "top-5 accuracy", "top5"),
                ("loss", "loss, nats", "loss"),
            )
        ]
    return ModelCardData(
        license=license.id,
        license_name=license.name and line(license.name),
        license_link=license.link and line(license.link),
        library_name="flax_resnet",
        pipeline_tag="image-classification",
        tags=["jax", "flax", "resnet", "image-classification"],
        **fields,
    ).to_yaml()


def _accuracy(repository: str, trained: Trained | None) -> str:
    """The figures of the run, and the command that measures them again."""
    if trained is None:
        return "Not known: these weights were published without the record of a run."
    config, step, scores = trained.config, trained.checkpoint["step"], trained.scores
    data = config.data
    if scores is None:
        figures = f"Not known: the checkpoint of step {step} was not evaluated."
    else:
        images = f"{trained.checkpoint['num_eval']:,} of {escaped(trained.data_name)}, split "
        figures = (
            "| images | top-1 | top-5 | loss, nats |\n| --- | --- | --- | --- |\n"
            f"| {images}{escaped(data.eval_split)} | {100 * scores['top1']:.2f} % | "
            f"{100 * scores['top5']:.2f} % | {scores['loss']:.4f} |"
        )
    top1 = [row["top1"] for row in trained.evaluations]
    chosen = scores is not None and len(top1) > 1 and scores["top1"] == max(top1)
    best = f", the best of {len(top1)} evaluations on these images" if chosen else ""
    views = "" if config.tta == "none" else f", the mean of the views of tta={config.tta}"
    words = ["flax-resnet", "evaluate", "--weights", f"hf://{repository}"]
    words += ["--data.folder", "DIR"] if data.folder else ["--data.name", data.name]
    words += ["--data.train-split", data.train_split] if data.folder else []
    words += ["--data.eval-split", data.eval_split]
    words += ["--data.holdout-every", str(data.holdout_every)] if data.folder else []
    words += ["--tta", config.tta] if config.tta != "none" else []
    return (
        f"{figures}\n\nOne run of seed {config.seed}, at step {step}{best}{views}. "
        f"To measure it again{', DIR being the same folder' if data.folder else ''}:\n\n"
        f"```bash\n{shlex.join(words)}\n```"
    )


def _license(license: License, trained: Trained | None) -> str:
    link = f": {escaped(license.link)}" if license.link else ""
    origin = trained.config.weights if trained is not None else None
    more = f" It was trained from {escaped(origin)}, whose licence counts as well."
    return f"{escaped(license.name or license.id)}{link}.{more if origin is not None else ''}"
