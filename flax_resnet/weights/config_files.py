"""What timm and Hugging Face write beside weights: config.json and preprocessor_config.json."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flax_resnet.data.preprocess import Preprocessing
from flax_resnet.errors import UserError
from flax_resnet.weights.imagenet import as_imagenet

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
_TRACELESS = {"in_chans", "num_classes", "drop_rate", "drop_path_rate", "global_pool", "img_size",
              "checkpoint_path", "pretrained", "scriptable", "exportable"}  # fmt: skip
"""Arguments of timm's networks that decide no architecture, or one that shapes tell."""
_RESAMPLE = {0: "nearest", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers, which Hugging Face writes."""


class Description(NamedTuple):
    """What the files beside weights say of them.

    Attributes:
      architecture: timm's name of the network.
      fields: fields of the network that its tensors' names and shapes do not tell.
      preprocessing: how images are prepared.
      class_names: name of each class.
    """

    architecture: str = ""
    fields: Mapping[str, Any] = {}
    preprocessing: Preprocessing | None = None
    class_names: tuple[str, ...] | None = None


def read(folder: Path) -> Description:
    """What timm's or Hugging Face's files in a folder say; nothing where there are none.

    UserError where a file cannot be read, or says what this library's networks cannot do.
    """
    described = _read(folder / CONFIG, _of_config)
    if described is None or described.preprocessing is not None:
        return described or Description()
    return described._replace(preprocessing=_read(folder / PROCESSOR, _hugging_face))


def _read(path: Path, what: Callable[[Mapping[str, Any]], Any]) -> Any:
    """``what`` of the object in a file; None where there is no such file."""
    if not path.is_file():
        return None
    try:
        return what(json.loads(path.read_text(encoding="utf-8")))
    except Exception as error:  # a file of anyone's may fail in any way
        text = str(error) if isinstance(error, ValueError) else repr(error)
        raise UserError(f"{path} cannot be used: {text:.300}") from error


def _of_config(content: Mapping[str, Any]) -> Description | None:
    """What a config.json says; None of another program's."""
    prepared, fields = None, {}
    if "architecture" in content or "pretrained_cfg" in content:
        prepared = _timm(content)
    elif "model_type" not in content:
        return None
    elif content["model_type"] == "resnet":
        _expect(content, hidden_act="relu", downsample_in_first_stage=False)
        if content.get("downsample_in_bottleneck"):
            fields = {"stride_conv": "1x1"}
    names = content.get("label_names") or content.get("labels") or content.get("id2label") or ()
    if isinstance(names, dict):
        names = [names[key] for key in sorted(names, key=int)]
    if all(name == f"LABEL_{i}" for i, name in enumerate(names)):
        names = ()
    classes = as_imagenet([*map(printable, names)]) or None
    return Description(content.get("architecture", ""), fields, prepared, classes)


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
    _expect(content, do_resize=True, do_rescale=True, do_normalize=True)
    _expect(content, do_flip_channel_order=False)
    kind = content.get("image_processor_type") or content.get("feature_extractor_type") or ""
    size, resize = content["size"], None
    side, shortest = _side(size), not isinstance(size, dict) or "shortest_edge" in size
    if "crop_pct" in content or kind.startswith("ConvNext"):
        if side < 384:
            resize = int(side / (content.get("crop_pct") or 224 / 256))
    elif content.get("do_center_crop"):
        if not shortest:
            raise ValueError(f"size {size} and a crop: expected a shortest_edge")
        resize, side = side, _side(content["crop_size"])
    elif isinstance(size, dict) and shortest:
        raise ValueError(f"size {size} without a crop: expected a square")
    return Preprocessing(
        size=side,
        resize=resize,
        interpolation=_RESAMPLE[content.get("resample", 2)],  # type: ignore[arg-type]
        mean=tuple(content["image_mean"]),
        std=tuple(content["image_std"]),
    )


def _side(size: Any) -> int:
    """Side of a square: of a number, {"shortest_edge": n} or {"height": n, "width": n}."""
    sides = {*size.values()} if isinstance(size, dict) else {size}
    if len(sides) != 1:
        raise ValueError(f"size {size}: expected a square")
    return sides.pop()


def _expect(content: Mapping[str, Any], **values: Any) -> None:
    for name, value in values.items():
        if content.get(name, value) != value:
            raise ValueError(f"{name} is {content[name]!r}: expected {value!r}")
