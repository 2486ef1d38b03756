"""The model card of weights: what they are, how good they are, how to use them and measure again.

huggingface_hub writes the YAML that the hub's page shows. Of a run every figure is read from its
record; the whole record is in config.json beside the card.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

import jax

from flax_resnet.errors import UserError
from flax_resnet.pretrained import Pretrained
from flax_resnet.pretrained.hub import client, is_address, parse

MOST_NAMES = 20
"""Number of classes that the card names."""


class License(NamedTuple):
    """What others may do with the weights."""

    id: str
    """The hub's word for it, such as "apache-2.0", or "other"."""
    name: str | None = None
    """Of "other": what the licence is called."""
    link: str | None = None
    """Of "other": the address of its text."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """The run that weights are of."""

    config: Any
    """Its TrainConfig."""
    starts: Sequence[Mapping[str, Any]]
    """For each start its command, commit, packages and devices."""
    checkpoint: Mapping[str, Any]
    """Fields of the checkpoint: "step", "num_train", "num_eval", "image_shape"."""
    evaluations: Sequence[Mapping[str, Any]]
    """The evaluations of the run, with "step", "top1", "top5" and "loss"."""
    result: Mapping[str, Any] | None = None
    """Content of result.json; None where the run is not finished."""

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
    name = repository.partition("/")[2]
    parameters = sum(x.size for x in jax.tree.leaves(opened.variables["params"]))
    on = f", trained on {escaped(trained.data_name)}" if trained is not None else ""
    parts = [
        f"---\n{_metadata(name, license, trained)}\n---",
        f"# {escaped(name)}",
        f"{escaped(opened.name)}, a residual network of {parameters:,} parameters for image "
        f"classification in JAX and Flax, by flax_resnet{on}.",
        "## Accuracy",
        *_accuracy(repository, trained),
        "## Use",
        *_use(opened, repository),
        "## Licence",
        *_license(license, trained),
    ]
    return "\n\n".join(parts) + "\n"


def line(value: Any) -> str:
    """A text on one line."""
    return " ".join(str(value).split())


def escaped(value: Any) -> str:
    """A text on one line that is no Markdown and no HTML."""
    return re.sub(r"([\\`*_{}\[\]<>|#&@~$!])", r"\\\1", line(value))


def fenced(code: str, language: str) -> str:
    """A block of code."""
    return f"```{language}\n{code}\n```"


def command_of(argv: Sequence[str]) -> str | None:
    """The command line of a process's ``sys.argv``; None of Python code that was no command."""
    if not argv or argv[0] in ("", "-c", "-"):
        return None
    path = PurePath(argv[0])
    words = ["python", path.name] if path.suffix == ".py" else [path.name]
    if module := re.search(r"(?:^|.*/)((?:experiments|flax_resnet)/.*)\.py$", path.as_posix()):
        words = ["python", "-m", module[1].removesuffix("/__main__").replace("/", ".")]
    return shlex.join([*words, *argv[1:]]).replace("'~/", "~/'")


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


def _accuracy(repository: str, trained: Trained | None) -> Iterable[str]:
    if trained is None:
        yield "Not known: these weights were published without the record of a run."
        return
    config, step, scores = trained.config, trained.checkpoint["step"], trained.scores
    data = config.data
    if scores is None:
        yield f"Not known: the checkpoint of step {step} was not evaluated."
    else:
        images = f"{trained.checkpoint['num_eval']:,} of {escaped(trained.data_name)}, split "
        yield (
            "| images | top-1 | top-5 | loss, nats |\n| --- | --- | --- | --- |\n"
            f"| {images}{escaped(data.eval_split)} | {100 * scores['top1']:.2f} % | "
            f"{100 * scores['top5']:.2f} % | {scores['loss']:.4f} |"
        )
    top1 = [row["top1"] for row in trained.evaluations]
    chosen = scores is not None and len(top1) > 1 and scores["top1"] == max(top1)
    best = f", the best of {len(top1)} evaluations on these images" if chosen else ""
    views = "" if config.tta == "none" else f", the mean of the views of tta={config.tta}"
    yield f"One run of seed {config.seed}, at step {step}{best}{views}."
    commands = dict.fromkeys(command_of(start.get("argv") or ()) for start in trained.starts)
    if shown := [command for command in commands if command]:
        yield "Trained with:"
        yield fenced("\n".join(shown), "bash")
    yield "`config.json` has the whole recipe, the packages, the devices and the commit."
    words = ["flax-resnet", "evaluate", "--weights", f"hf://{repository}"]
    words += ["--data.folder", "DIR"] if data.folder else ["--data.name", data.name]
    words += ["--data.train-split", data.train_split] if data.folder else []
    words += ["--data.eval-split", data.eval_split]
    words += ["--data.holdout-every", str(data.holdout_every)] if data.folder else []
    words += [] if config.tta == "none" else ["--tta", config.tta]
    yield "To measure it again" + (", DIR being the same folder:" if data.folder else ":")
    yield fenced(shlex.join(words), "bash")


def _use(opened: Pretrained, repository: str) -> Iterable[str]:
    address, prepared, names = f"hf://{repository}", opened.preprocessing, opened.class_names
    python = (
        f'from flax_resnet.pretrained import open_weights\n\nopened = open_weights("{address}")'
    )
    shell = f"flax-resnet pull {repository} {repository.partition('/')[2]}"
    if prepared is None:
        yield "How images are prepared is not known."
    else:
        yield f"Images are brought to {'x'.join(map(str, prepared.shape))}, as `config.json` says."
    if names is not None:
        more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        yield f"{len(names)} classes: {', '.join(map(escaped, names[:MOST_NAMES]))}{more}."
    if prepared is not None and getattr(opened.module, "include_top", True):
        shell = f"flax-resnet predict photo.png --weights {address}\n{shell}"
        python = f"""from pathlib import Path

from flax_resnet.predict import predict
{python}
for answer in predict(opened, [Path("photo.png")], top=3):
    print(answer.names, answer.probabilities)"""
    yield fenced(python, "python")
    yield fenced(shell, "bash")
    yield f"`{address}@COMMIT` stays the same when this repository changes."


def _license(license: License, trained: Trained | None) -> Iterable[str]:
    link = f": {escaped(license.link)}" if license.link else ""
    yield f"{escaped(license.name or license.id)}{link}."
    if trained is not None and trained.config.weights is not None:
        origin = escaped(trained.config.weights)
        yield f"It was trained from {origin}, whose licence counts as well."
