"""Flags that name weights and change how images are prepared for them."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from flax_resnet.cli.flags import flag
from flax_resnet.data.preprocess import Preprocessing
from flax_resnet.errors import UserError, check_range
from flax_resnet.inference.classifier import FLAGS, open_network, unprepared
from flax_resnet.weights.pretrained import Pretrained

OWN = "the weights' own"


@dataclasses.dataclass(frozen=True)
class PreparedFlags:
    """Which network, and how its images are prepared.

    Of a run, size, resize and interpolation take the place of how its data were decoded.
    """

    model: Annotated[str | None, flag("NAME")] = None
    """Network, one that the command "names" lists; a tag needs it, else it is inferred."""
    size: Annotated[int | None, flag("PIXELS", OWN)] = None
    """Height and width of what the network sees."""
    resize: Annotated[int | None, flag("PIXELS", OWN)] = None
    """Shorter side before the centre crop; 0 squeezes the whole image to --size."""
    interpolation: Annotated[
        Literal["nearest", "bilinear", "bicubic"] | None, flag("{nearest,bilinear,bicubic}", OWN)
    ] = None
    """Interpolation used when resizing."""
    mean: Annotated[tuple[float, ...] | None, flag("X [X ...]", OWN)] = None
    """Subtracted from pixels scaled to 0..1: one number, or one for each channel of the network."""
    std: Annotated[tuple[float, ...] | None, flag("X [X ...]", OWN)] = None
    """Divisor after that: one number, or one for each channel of the network."""

    def __post_init__(self) -> None:
        check_range("--size", self.size, 1)
        check_range("--resize", self.resize, 0)

    def open(self, weights: str) -> Pretrained:
        """A network with weights, and their preprocessing changed as the flags say."""
        opened = open_network(weights, self.model)
        return dataclasses.replace(opened, preprocessing=self._prepared(opened, weights))

    def _prepared(self, opened: Pretrained, weights: str) -> Preprocessing | None:
        names = ("size", "resize", "interpolation", "mean", "std")
        given: dict[str, Any] = {n: v for n in names if (v := getattr(self, n)) is not None}
        channels, old = opened.input_shape[2], opened.preprocessing
        if not given:
            return old
        if given.get("resize") == 0:
            given["resize"] = None
        if len(given.get("std", ())) == 1:
            given["std"] *= channels
        if old is None:
            if not {"size", "mean", "std"} <= given.keys():
                raise unprepared(weights)
            unit: dict[str, Any] = {"mean": (0.0,), "std": (1.0,) * channels}
            old = Preprocessing(1, None, channels=channels, as_displayed=True, **unit)
        elif given.keys() & {"size", "resize", "interpolation"}:
            given["decoder"] = None
        try:
            return dataclasses.replace(old, **given)
        except UserError as error:
            raise UserError(f"{error}; the flags are {FLAGS} (--resize 0: None)") from None


@dataclasses.dataclass(frozen=True)
class WeightFlags(PreparedFlags):
    """Which weights classify."""

    weights: Annotated[str, flag("TAG|PATH", "imagenet")] = "imagenet"
    """A tag such as "imagenet" or "tv_v2", a weight file (FILE#NAME for one of several networks in
    it), a run's working directory, or hf://OWNER/NAME[@REVISION] of the Hugging Face hub."""
