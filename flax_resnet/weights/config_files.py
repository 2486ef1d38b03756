"""What timm and Hugging Face write beside weights: config.json and preprocessor_config.json."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flax_resnet.data.preprocess import Preprocessing
from flax_resnet.errors import UserError
from flax_resnet.weights.imagenet import as_imagenet

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
_TRACELESS = {"in_chans", "num_classes", "drop_rate", "drop_path_rate", "global_pool", "img_size",
              "checkpoint_path", "pretrained", "scriptable", "exportable"}  # fmt: skip
"""Arguments of timm's networks that decide no architecture, or one that shapes tell."""
_RESAMPLE = {0: "nearest", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers, which Hugging Face writes."""


@dataclasses.dataclass(frozen=True)
class Description:
    """What the files beside weights say of them."""

    architecture: str = ""
    """timm's name of the network."""
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of the network that its tensors' names and shapes do not tell."""
    preprocessing: Preprocessing | None = None
    """How images are prepared."""
    class_names: tuple[str, ...] | None = None
    """Name of each class."""


def read(folder: Path) -> Description:
    """What timm's or Hugging Face's files in a folder say; nothing where there are none.

    Raises:
      UserError: a file cannot be read, or says what this library's networks cannot do.
    """
    content, prepared = _json(folder / CONFIG), None
    fields: dict[str, Any] = {}
    if "architecture" in content or "pretrained_cfg" in content:
        with _one_line(folder / CONFIG, "timm's pretrained_cfg"):
            prepared = _timm(content)
    elif content.get("model_type") == "resnet":
        with _one_line(folder / CONFIG, "Hugging Face's ResNet"):
            _expect(content, hidden_act="relu", downsample_in_first_stage=False)
            early = content.get("downsample_in_bottleneck", False)
            fields = {"stride_conv": "1x1"} if early else {}
    elif "model_type" not in content:  # another program's
        return Description()
    processor = _json(folder / PROCESSOR)
    if prepared is None and processor:
        with _one_line(folder / PROCESSOR, "it"):
            prepared = _hugging_face(processor)
    names = content.get("label_names") or content.get("labels") or content.get("id2label") or ()
    with _one_line(folder / CONFIG, "the classes' names"):
        if isinstance(names, dict):
            names = [names[key] for key in sorted(names, key=int)]
        if all(name == f"LABEL_{i}" for i, name in enumerate(names)):
            names = ()
        classes = as_imagenet([*map(printable, names)]) or None
    return Description(str(content.get("architecture", "")), fields, prepared, classes)


def printable(name: str) -> str:
    """A name without what a terminal would act on."""
    return "".join(c if c.isprintable() else "?" for c in name)


def _timm(content: Mapping[str, Any]) -> Preprocessing | None:
    """How timm evaluates weights, as its config.json says."""
    changed = sorted((content.get("model_args") or {}).keys() - _TRACELESS)
    if changed:
        raise ValueError(f"model_args change {', '.join(changed)}: expected timm's own network")
    _expect(content, global_pool="avg")
    fields = content.get("pretrained_cfg") or content  # timm before 0.9 has no inner dict
    if "input_size" not in fields and "pretrained_cfg" not in content:
        return None
    channels, height, width = fields.get("test_input_size") or fields["input_size"]
    mode = fields.get("crop_mode") or "center"
    if height != width or mode not in ("center", "squash"):
        raise ValueError(f"{height}x{width} by crop_mode {mode!r}: expected a square, centred")
    crop = fields.get("test_crop_pct") or fields.get("crop_pct") or 0.875
    return Preprocessing(
        size=height,
        resize=None if mode == "squash" else math.floor(height / crop),
        interpolation=fields["interpolation"],
        channels=channels,
        mean=tuple(fields["mean"]),
        std=tuple(fields["std"]),
    )


def _hugging_face(content: Mapping[str, Any]) -> Preprocessing:
    """How an image processor of transformers prepares images."""
    _expect(content, do_resize=True, do_rescale=True, do_flip_channel_order=False)
    kind = content.get("image_processor_type") or content.get("feature_extractor_type") or ""
    size, crop = content["size"], content.get("crop_size")
    sides = _sides(size)
    resize: int | None = None
    if "crop_pct" in content or kind.startswith("ConvNext"):
        if sides[0] < 384:
            resize = int(sides[0] / (content.get("crop_pct") or 224 / 256))
    elif content.get("do_center_crop") and crop is not None:
        squashed = isinstance(size, dict) and "shortest_edge" not in size
        resize, sides = sides[0], _sides(crop)
        if squashed and sides[0] != resize:
            raise ValueError(f"size {size} and crop_size {crop}: expected a shortest_edge")
        resize = None if squashed else resize
    elif isinstance(size, dict) and "shortest_edge" in size:
        raise ValueError(f"size {size} without a crop: expected a square")
    if sides[0] != sides[1]:
        raise ValueError(f"{sides[0]}x{sides[1]}: expected a square")
    normalized = content.get("do_normalize", True)
    mean, std = (content[n] if normalized else [0.0, 0.0, 0.0] for n in ("image_mean", "image_std"))
    return Preprocessing(
        size=sides[0],
        resize=resize,
        interpolation=_RESAMPLE[content.get("resample", 2)],  # type: ignore[arg-type]
        mean=tuple(mean),
        std=tuple(std) if normalized else (1.0,) * 3,
    )


def _sides(size: Any) -> tuple[int, int]:
    """(height, width) of a number, {"shortest_edge": n} or {"height": h, "width": w}."""
    if not isinstance(size, dict):
        return size, size
    short = size.get("shortest_edge")
    return (size["height"], size["width"]) if short is None else (short, short)


def _expect(content: Mapping[str, Any], **values: Any) -> None:
    for name, value in values.items():
        if content.get(name, value) != value:
            raise ValueError(f"{name} is {content[name]!r}: expected {value!r}")


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is no such file."""
    if not path.is_file():
        return {}
    with _one_line(path, "it"):
        content = json.loads(path.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


@contextlib.contextmanager
def _one_line(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a file of anyone's may fail in any way
        text = f"{error}" if type(error) is ValueError else repr(error)
        raise UserError(f"{path}: {what} cannot be used ({text:.300})") from error
