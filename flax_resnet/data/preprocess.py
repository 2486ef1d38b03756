"""What published weights want done to a photograph: resize, crop, channel order, scale."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import numpy as np
from PIL import Image

from flax_resnet.data.decode import LARGEST, PIL_MODES, Decoder, open_image
from flax_resnet.data.normalization import IMAGENET_MEAN, IMAGENET_STD, Statistics
from flax_resnet.errors import UserError, check_range, check_types, is_number


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """From an encoded photograph to what a network was trained on.

    Resampling is Pillow's own, which torchvision, timm and Keras's ``load_img`` use too.
    """

    size: int = 224
    """Height and width of the result, in pixels."""
    resize: int | None = 256
    """Shorter side before the centre crop; None: squeeze the whole image to ``size``."""
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bilinear"
    """Interpolation used when resizing."""
    channels: int = 3
    """Input channels of the network."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Subtracted on the 0..1 scale: one number, or one a channel as the network sees them."""
    std: tuple[float, ...] = IMAGENET_STD
    """Then divided by: one number a channel, or one a pixel and channel, rows first."""
    bgr: bool = False
    """Feed blue first, as Caffe did."""
    decoder: Decoder | None = None
    """Of weights trained here: decode as their data were, whatever the fields above say."""
    as_displayed: bool = False
    """Turn photographs as EXIF says, put transparent pixels on white and scale 16-bit greys, as
    viewers do; published weights were trained on the pixels as they are stored."""

    def __post_init__(self) -> None:
        check_types(self, "preprocessing.")
        for name in ("size", "resize"):
            check_range(f"preprocessing.{name}", getattr(self, name), 1, LARGEST)
        if self.channels not in ((3,) if self.bgr else PIL_MODES):
            expected = "3, as bgr is set" if self.bgr else "1, 3 or 4"
            raise UserError(f"preprocessing.channels={self.channels}: expected {expected}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not isinstance(values, tuple) or not all(is_number(v) for v in values):
                raise UserError(f"preprocessing.{name}={values!r:.80}: expected finite numbers")
        if self.resize is not None and self.resize < self.size:
            raise UserError(
                f"preprocessing.resize={self.resize} is below size={self.size}: the crop would "
                "stick out; use None or a larger one"
            )
        counts = (self.channels, math.prod(self.shape))
        if len(self.mean) not in (1, self.channels) or len(self.std) not in counts:
            raise UserError(
                f"preprocessing.mean has {len(self.mean)} numbers, std {len(self.std)}: expected "
                f"one for each of {self.channels} channels"
            )
        for value in self.std:
            check_range("preprocessing.std", value, 1e-9)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the result."""
        side = (self.decoder and self.decoder.side) or self.size
        return side, side, self.channels

    def __call__(self, data: bytes) -> np.ndarray:
        """Decodes one image to uint8 (size, size, channels), RGB.

        What Pillow cannot read raises one of ``datasets.decode.DECODE_ERRORS``.
        """
        if self.decoder is not None:
            return self.decoder(data)
        image = self._resized(data)
        return self._crop(image, *self._centre(image))

    def check_ten_crops(self) -> None:
        """Raises UserError where ten crops would all be the same part of an image."""
        if self.decoder is not None or self.resize in (None, self.size):
            raise UserError(
                f"ten crops of {self.size} pixels need a larger image, and the weights' "
                f"preprocessing resizes to {self.resize or self.size}: set resize (--resize) above "
                f"size (--size {self.size}), or evaluate one crop"
            )

    def ten_crops(self, data: bytes) -> np.ndarray:
        """Corners and centre, each also mirrored: uint8 (10, size, size, channels).

        Krizhevsky et al. 2012, section 4.1, in torchvision's order. What Pillow cannot read
        raises one of ``datasets.decode.DECODE_ERRORS``.

        Raises:
          UserError: as ``check_ten_crops``.
        """
        self.check_ten_crops()
        image = self._resized(data)
        width, height = image.size
        right, low = width - self.size, height - self.size
        corners = [(0, 0), (right, 0), (0, low), (right, low), self._centre(image)]
        mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.stack([self._crop(i, *at) for i in (image, mirrored) for at in corners])

    def statistics(self) -> Statistics:
        """What normalization.normalize takes: {"mean", "std"}, with ``bgr`` also {"order"}."""
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        if len(std) != self.channels:
            std = std.reshape(self.shape)
        stats = {"mean": mean if len(mean) == self.channels else mean[0], "std": std}
        return stats | ({"order": np.array([2, 1, 0], np.int32)} if self.bgr else {})

    def _resized(self, data: bytes) -> Image.Image:
        image = open_image(data, self.channels, self.as_displayed)
        width, height = image.size
        if self.resize is None:
            new = (self.size, self.size)
        else:
            # The longer side is cut off, not rounded, as torchvision does.
            short = min(width, height)
            new = (int(self.resize * width / short), int(self.resize * height / short))
        if math.prod(new) > Image.MAX_IMAGE_PIXELS:  # type: ignore[operator]
            raise ValueError(f"at {width}x{height} it is too long and thin to resize")
        return image.resize(new, Image.Resampling[self.interpolation.upper()])

    def _centre(self, image: Image.Image) -> tuple[int, int]:
        """(left, top) of a centred crop; halves round to even, as torchvision's do."""
        return round((image.width - self.size) / 2.0), round((image.height - self.size) / 2.0)

    def _crop(self, image: Image.Image, left: int, top: int) -> np.ndarray:
        pixels = np.asarray(image.crop((left, top, left + self.size, top + self.size)))
        return pixels if pixels.ndim == 3 else pixels[..., None]


TORCH = Preprocessing()
"""torchvision's first weights: shorter side to 256, centre 224, ImageNet's mean and deviation."""
KERAS_V1 = Preprocessing(
    resize=None,
    interpolation="nearest",
    mean=(103.939 / 255, 116.779 / 255, 123.68 / 255),
    std=(1 / 255,) * 3,
    bgr=True,
)
"""Keras's ResNet ("caffe"): ``load_img``'s squeeze to 224, blue first, less the mean in BGR."""
KERAS_V2 = Preprocessing(resize=None, interpolation="nearest", mean=(0.5,) * 3, std=(0.5,) * 3)
"""Keras's ResNetV2 ("tf"): ``load_img``'s squeeze to 224, then -1 to 1."""
