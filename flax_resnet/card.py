"""The model card of weights: what they are, and of a run how they came to be and how good they are.

Every figure in it is read from the weights or from the record of the run; what neither says is
said to be not known. Names from elsewhere are escaped: a card is a web page.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import jax

from flax_resnet import markdown
from flax_resnet.datasets import sources
from flax_resnet.licenses import License
from flax_resnet.pretrained import Pretrained
from flax_resnet.pretrained.hub import is_address, parse
from flax_resnet.pretrained.load import SUFFIXES
from flax_resnet.pretrained.published import is_tag
from flax_resnet.provenance import command_of, without_home
from flax_resnet.record import to_record

MOST_NAMES = 100
MOST_NUMBERS = 4
FAR = 10_000  # YAML lines are not broken
Rows = Iterable[tuple[str, Any]]


@dataclasses.dataclass(frozen=True)
class Trained:
    """The run that weights are of."""

    config: Any
    """Its TrainConfig."""
    starts: Sequence[Mapping[str, Any]]
    """For each start its command, commit, packages and devices."""
    checkpoint: Mapping[str, Any]
    """What the checkpoint says: "step", "num_train", "num_eval", "image_shape"."""
    evaluations: Sequence[Mapping[str, Any]]
    """The evaluations of the run, with "step", "top1", "top5", "loss" and "epoch"."""
    result: Mapping[str, Any] | None = None
    """What result.json holds; None of a run that is not finished."""

    @property
    def step(self) -> int:
        """Of the checkpoint."""
        return self.checkpoint["step"]

    @property
    def scores(self) -> Mapping[str, Any] | None:
        """The evaluation of these very weights; None where there was none."""
        found = [line for line in self.evaluations if line["step"] == self.step]
        return found[-1] if found else None

    @property
    def data_name(self) -> str:
        """The set's name, or the folder's without where it lies."""
        data = self.config.data
        return PurePath(data.folder).name or "images" if data.folder else data.name

    @property
    def may_hold_out(self) -> bool:
        """False of a folder that surely had sub-folders for its splits, by the numbers of images.

        One in N of each class leaves less than a whole image of each over.
        """
        images = self.checkpoint["num_eval"], self.checkpoint["num_train"]
        classes, every = len(self.checkpoint["class_names"]), self.config.data.holdout_every
        most = sum(images) / every
        return bool(self.config.data.folder) and most - classes < images[0] <= most

    @property
    def length(self) -> tuple[int, float]:
        """(steps, epochs) of the whole run; of one that is not finished those asked for."""
        if self.result is not None:
            return self.result["step"], self.result["epochs"]
        an_epoch = math.ceil(self.checkpoint["num_train"] / self.config.batch_size)
        steps = self.config.num_steps or max(1, round(self.config.num_epochs * an_epoch))
        return steps, steps / an_epoch


def model_card(
    opened: Pretrained, repository: str, license: License, trained: Trained | None = None
) -> str:
    """The README.md of a repository: YAML that the hub reads, and Markdown for people.

    Args:
      opened: the weights.
      repository: OWNER/NAME.
      license: of the weights.
      trained: the run they are of, where it is known.
    """
    import yaml  # flax needs it, so it is there

    about = yaml.safe_dump(
        _metadata(repository, license, trained), sort_keys=False, allow_unicode=True, width=FAR
    )
    parts = [
        f"---\n{about}---",
        f"# {markdown.text(repository.partition('/')[2])}",
        _what(opened, trained),
    ]
    parts += ["## Network", markdown.table(_network(opened))]
    if trained is None:
        parts += [
            "## Data, recipe, accuracy",
            "Not known: these weights were published without the record of a run.",
        ]
    else:
        parts += ["## Accuracy", _accuracy(repository, trained)]
        parts += ["## Data", markdown.table(_data(trained))]
        parts += ["## Recipe", markdown.table(_recipe(trained)), "`config.json` has every field."]
        parts += ["## Made with", markdown.table(_environment(trained))]
    parts += ["## Use", _use(opened, repository), "## Limits", _limits(opened, trained)]
    parts += ["## Licence", _license(license, trained)]
    return "\n\n".join(parts) + "\n"


def _metadata(repository: str, license: License, trained: Trained | None) -> dict[str, Any]:
    """What the hub files a model under, and what its page shows of the accuracy."""
    found: dict[str, Any] = {"license": license.id}
    if license.id == "other":
        found |= {
            "license_name": markdown.plain(license.name),
            "license_link": markdown.plain(license.link),
        }
    found |= {"library_name": "flax_resnet", "pipeline_tag": "image-classification"}
    found["tags"] = ["jax", "flax", "resnet", "image-classification"]
    if trained is None:
        return found
    if is_address(trained.config.weights):
        found["base_model"] = parse(trained.config.weights).name
    if (scores := trained.scores) is not None:
        found["metrics"] = ["accuracy"]
        name, data = markdown.plain(trained.data_name), trained.config.data
        results = {
            "task": {"type": "image-classification"},
            "dataset": {
                "name": name,
                "type": "imagefolder" if data.folder else name,
                "split": markdown.plain(data.eval_split),
                "args": {"images": trained.checkpoint["num_eval"]},
            },
            "metrics": [
                {"type": "accuracy", "value": scores["top1"], "name": "top-1 accuracy"},
                {"type": "accuracy", "value": scores["top5"], "name": "top-5 accuracy"},
                {"type": "loss", "value": scores["loss"], "name": "loss, nats"},
            ],
        }
        found["model-index"] = [{"name": repository.partition("/")[2], "results": [results]}]
    return found


def _what(opened: Pretrained, trained: Trained | None) -> str:
    name = opened.name
    of = f", trained on {markdown.text(trained.data_name)}" if trained is not None else ""
    return (
        f"A residual network for image classification, {markdown.text(name)}{of}, in JAX and "
        "Flax, by flax_resnet."
    )


def _network(opened: Pretrained) -> Rows:
    module, prepared, names = opened.module, opened.preprocessing, opened.class_names
    yield "network", opened.name
    said = ("parent", "name", "block_cls", "num_classes", "scan_blocks", "remat", "axis_name")
    if changed := _changed(module, leave=said):
        yield "fields", changed
    yield "parameters", f"{sum(x.size for x in jax.tree.leaves(opened.variables['params'])):,}"
    if prepared is None:
        yield "input", "not known: nobody recorded how images are prepared"
    else:
        yield "input", f"images of {'x'.join(map(str, prepared.shape))}, float32"
        order = ", blue first" if prepared.bgr else ""
        mean, std = _numbers(prepared.mean), _numbers(prepared.std)
        yield "normalised", f"(pixel / 255 - {mean}) / {std}{order}"
        if prepared.decoder is None:
            squeezed = "squeezed" if prepared.resize is None else f"to {prepared.resize}, cropped"
            yield "resized", f"{squeezed} to {prepared.size}, {prepared.interpolation}"
    if not getattr(module, "include_top", True):
        yield "output", "features: it has no head"
        return
    yield "output", f"logits of {getattr(module, 'num_classes', 'an unknown number of')} classes"
    if names is None:
        yield "classes", "their names are not known"
    else:
        rest = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        yield "classes", ", ".join(names[:MOST_NAMES]) + rest


def _accuracy(repository: str, trained: Trained) -> str:
    scores, images = trained.scores, trained.checkpoint["num_eval"]
    config = trained.config
    split = config.data.eval_split
    if scores is None:
        return f"Not known: the checkpoint of step {trained.step} was not evaluated."
    rows = [
        ("data", f"{trained.data_name}, split {split}"),
        ("images", f"{images:,}, each once"),
        ("top-1", f"{100 * scores['top1']:.2f} %"),
        ("top-5", f"{100 * scores['top5']:.2f} %"),
        ("loss", f"{scores['loss']:.4f} nats"),
        ("runs", f"1, of seed {config.seed}"),
    ]
    if config.tta != "none":
        rows.append(("views", f"the mean of those of tta={config.tta}"))
    best = max(trained.evaluations, key=lambda line: (line["top1"], line["step"]))
    chosen = f"The checkpoint is of step {trained.step}"
    if len(trained.evaluations) > 1 and best["step"] == trained.step:
        chosen += (
            f", the best by top-1 of {len(trained.evaluations)} evaluations on this split: the "
            "figure is the best of so many, not one of images that nothing was chosen by"
        )
    commands = [command_of(start.get("argv") or ()) for start in trained.starts]
    told = [line for line in dict.fromkeys(commands) if line]
    made = "The command that made it" if len(told) == 1 else "The commands that made it, in turn"
    if any(line.startswith("python -m experiments.") for line in told):
        made += " (in a checkout of flax_resnet)"
    parts = [
        markdown.table(rows),
        f"{chosen}.",
        *([f"{made}:", markdown.fenced("\n".join(told), "bash")] if told else []),
    ]
    if len(told) < len(set(commands)) or not commands:
        parts.append("It was trained from Python, not by a command; `config.json` has the config.")
    return "\n\n".join([*parts, *_again(repository, trained)])


def _again(repository: str, trained: Trained) -> Iterable[str]:
    """The command that gives the figures once more, to who has the data."""
    data, tta = trained.config.data, trained.config.tta
    words = ["flax-resnet", "evaluate", "--weights", f"hf://{repository}"]
    words += ["--data.folder", "DIR"] if data.folder else ["--data.name", data.name]
    if data.folder and data.train_split != type(data).train_split:
        words += ["--data.train-split", data.train_split]
    words += ["--data.eval-split", data.eval_split]
    if trained.may_hold_out:
        words += ["--data.holdout-every", str(data.holdout_every)]
    words += [] if tta == "none" else ["--tta", tta]
    yield "To measure it again" + (", DIR being the same folder:" if data.folder else ":")
    yield markdown.fenced(shlex.join(words), "bash")


def _data(trained: Trained) -> Rows:
    data, checkpoint = trained.config.data, trained.checkpoint
    bundled = "scikit-learn's digits, which flax_resnet brings"
    kind = bundled if data.name == sources.DIGITS else "a tfds set"
    kind = "a folder of images" if data.folder else kind
    yield "data", f"{trained.data_name} ({kind})"
    yield "training images", f"{checkpoint['num_train']:,}, split {data.train_split}"
    yield "evaluation images", f"{checkpoint['num_eval']:,}, split {data.eval_split}"
    yield "a training image", "x".join(map(str, checkpoint["image_shape"]))
    said = ("name", "folder", "train_split", "eval_split")
    if changed := _changed(data, leave=said):
        yield "how it is read", changed


def _recipe(trained: Trained) -> Rows:
    config = trained.config
    optimizer, schedule = config.optimizer, config.optimizer.schedule
    yield "started from", _origin(config.weights)
    always = ("learning_rate", "momentum", "weight_decay")
    yield "optimizer", _settings(optimizer, always, leave=("schedule",))
    yield "schedule", _settings(schedule)
    steps, epochs = trained.length
    part = "" if trained.step == steps else f"; these weights are of step {trained.step:,}"
    open_end = "" if trained.result is not None else ", not known to be finished"
    yield "length", f"{steps:,} steps, {round(epochs, 4):g} epochs{open_end}{part}"
    yield "batch", f"{config.batch_size} images"
    yield "augmentation", _changed(config.augment) or "none"
    yield "normalisation", config.normalization
    yield "loss", config.loss
    said = ("model", "data", "augment", "normalization", "weights", "optimizer", "num_epochs",
            "num_steps", "batch_size", "eval_batch_size", "loss", "seed")  # fmt: skip
    if changed := _changed(config, leave=said):
        yield "besides", changed
    yield "seed", config.seed


def _origin(weights: str | None) -> str:
    """What a run started from, for who does not have its files."""
    if weights is None:
        return "random weights"
    path = without_home(weights)
    if is_address(weights) or is_tag(weights) or path.lower().endswith(SUFFIXES):
        return path
    return f"weights of another run ({path})"


def _settings(value: Any, always: Sequence[str] = (), leave: Sequence[str] = ()) -> str:
    """A dataclass by its name, with what was changed of it."""
    fixed = [f"{name} {getattr(value, name)}" for name in always if hasattr(value, name)]
    parts = [*fixed, *filter(None, [_changed(value, (*always, *leave))])]
    return type(value).__name__ + (f": {', '.join(parts)}" if parts else "")


def _changed(value: Any, leave: Sequence[str] = ()) -> str:
    """The fields that decide numbers and differ from their defaults."""
    shown = []
    for field in dataclasses.fields(value):
        there = getattr(value, field.name)
        if field.name in leave or field.metadata.get("free") or there == field.default:
            continue
        shown.append(f"{field.name} {to_record(there)}")
    return ", ".join(shown)


def _environment(trained: Trained) -> Rows:
    for start in trained.starts[-1:]:
        devices = start.get("devices") or ["not recorded"]
        kinds = {kind: devices.count(kind) for kind in dict.fromkeys(devices)}
        shown = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
        cores = f"; {start['cpu_cores']} cores" if start.get("cpu_cores") else ""
        processes = start.get("processes", 1)
        several = f"; {processes} processes" if processes > 1 else ""
        yield "devices", f"{shown}{cores}{several}"
        yield "Python", start.get("python", "not recorded")
        packages = start.get("packages") or {}
        yield "packages", ", ".join(f"{k} {v}" for k, v in packages.items()) or "not recorded"
        git = start.get("git")
        changed = ", with changes that are not committed" if git and git.get("changed") else ""
        yield "commit of flax_resnet", f"{git['commit']}{changed}" if git else "not recorded"
    yield "starts of the run", len(trained.starts)
    if trained.result is None:
        yield "time", "not known: the run is not finished"
    else:
        seconds = trained.result["seconds"]
        yield "time", f"{seconds:,.1f} s for the whole run, compilation and evaluation included"


def _use(opened: Pretrained, repository: str) -> str:
    address = f"hf://{repository}"
    python = f"""from flax_resnet.pretrained import open_weights

opened = open_weights("{address}")
module, variables = opened.module, opened.variables"""
    shell = f"flax-resnet pull {repository} {repository.partition('/')[2]}"
    if opened.preprocessing is not None and getattr(opened.module, "include_top", True):
        python = f"""from pathlib import Path

from flax_resnet.predict import predict
{python}

for found in predict(opened, [Path("photo.png")], top=3):
    print(found.names, found.probabilities)"""
        shell = f"flax-resnet predict photo.png --weights {address}\n{shell}"
    return "\n\n".join(
        [
            "flax_resnet comes from its repository, there is no release on PyPI yet; in a checkout "
            "`pip install '.[hub]'` installs it. Then:",
            markdown.fenced(python, "python"),
            markdown.fenced(shell, "bash"),
            f"`{address}@COMMIT` stays the same when this repository changes. `model.safetensors` "
            "has torchvision's names and layout where the network is a ResNet; nothing in this "
            "repository is executed by loading it.",
        ]
    )


def _limits(opened: Pretrained, trained: Trained | None) -> str:
    found = []
    if getattr(opened.module, "include_top", True):
        found.append("Every image gets one of the classes, also one that shows none of them.")
    if trained is None:
        found.append("What it was trained on, and how good it is, has to be asked of who gave it.")
    else:
        found.append(
            f"It was trained and measured on {markdown.text(trained.data_name)}; on other images, "
            "and on kinds of images apart, it was not measured."
        )
        found.append("One run was measured: how far another seed would differ is not said here.")
    return "\n".join(f"- {line}" for line in found)


def _license(license: License, trained: Trained | None) -> str:
    what = markdown.text(license.name or license.id)
    said = f"{what}: {markdown.text(license.link)}" if license.link else what
    start = trained.config.weights if trained is not None else None
    if start is None:
        return f"{said}."
    origin = markdown.text(_origin(start))
    return f"{said}. It was trained from {origin}, whose licence counts as well."


def _numbers(values: Sequence[float]) -> str:
    if len(values) > MOST_NUMBERS:
        return f"{len(values)} numbers, which the file has"
    shown = ", ".join(f"{value:.6g}" for value in values)
    return shown if len(values) == 1 else f"({shown})"
