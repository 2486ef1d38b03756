"""Preprocessing against plain Pillow; tests/parity/test_pretrained.py has Keras and torch."""

import contextlib
import io
import warnings

import numpy as np
import pytest
from PIL import Image

from flax_resnet.data.decode import DECODE_ERRORS, Decoder
from flax_resnet.data.normalization import normalize
from flax_resnet.data.preprocess import KERAS_V1, KERAS_V2, TORCH, Preprocessing
from flax_resnet.errors import UserError

SIZES = [(301, 507), (507, 301), (224, 224), (37, 1000), (640, 480), (5, 7)]


def photograph(rng, width, height, mode="RGB"):
    """A JPEG of smooth noise: (encoded, decoded as Pillow does)."""
    small = rng.integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue(), Image.open(io.BytesIO(file.getvalue())).convert("RGB")


@pytest.mark.parametrize("size", SIZES)
def test_resize_and_centre_crop_are_pillows(rng, size):
    data, image = photograph(rng, *size)
    width, height = size
    scale = 256 / min(size)
    short = [int(256 * side / min(size)) for side in size]
    assert min(short) == 256
    resized = image.resize(tuple(short), Image.Resampling.BILINEAR)
    left, top = round((short[0] - 224) / 2), round((short[1] - 224) / 2)
    want = np.asarray(resized)[top : top + 224, left : left + 224]
    np.testing.assert_array_equal(TORCH(data), want)
    assert max(abs(short[0] - width * scale), abs(short[1] - height * scale)) < 1


@pytest.mark.parametrize("size", SIZES)
def test_keras_squeezes_the_whole_image(rng, size):
    data, image = photograph(rng, *size)
    want = np.asarray(image.resize((224, 224), Image.Resampling.NEAREST))
    np.testing.assert_array_equal(KERAS_V1(data), want)
    np.testing.assert_array_equal(KERAS_V2(data), want)


def test_grey_and_cmyk_photographs_become_rgb(rng):
    for mode in ("L", "CMYK"):
        data, image = photograph(rng, 60, 50, mode)
        how = Preprocessing(size=16, resize=None, interpolation="bicubic")
        want = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(how(data), want)


def test_statistics_are_the_published_ones(rng):
    pixels = rng.integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    bgr = pixels[..., ::-1] - np.array([103.939, 116.779, 123.68])
    np.testing.assert_allclose(normalize(pixels, KERAS_V1.statistics()), bgr, atol=1e-4)
    unit = pixels / 127.5 - 1
    np.testing.assert_allclose(normalize(pixels, KERAS_V2.statistics()), unit, atol=1e-6)
    torch = (pixels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(normalize(pixels, TORCH.statistics()), torch, atol=1e-6)


def test_a_deviation_for_each_pixel(rng):
    std = tuple(np.linspace(0.1, 1, 12))
    how = Preprocessing(size=2, resize=None, mean=(0.5,), std=std)
    stats = how.statistics()
    assert (stats["mean"].shape, stats["std"].shape) == ((), (2, 2, 3))
    pixels = rng.integers(0, 256, (1, 2, 2, 3), dtype=np.uint8)
    want = (pixels / 255 - 0.5) / np.reshape(std, (2, 2, 3))
    np.testing.assert_allclose(normalize(pixels, stats), want, rtol=1e-5)


def test_ten_crops_are_the_corners_and_the_centre_and_their_mirrors(rng):
    data, image = photograph(rng, 60, 48)
    how = Preprocessing(size=16, resize=24)
    crops = how.ten_crops(data)
    resized = np.asarray(image.resize((30, 24), Image.Resampling.BILINEAR))
    mirrored = resized[:, ::-1]
    at = [(0, 0), (0, 14), (8, 0), (8, 14), (4, 7)]
    want = [i[y : y + 16, x : x + 16] for i in (resized, mirrored) for y, x in at]
    np.testing.assert_array_equal(crops, np.stack(want))
    np.testing.assert_array_equal(crops[4], how(data))
    with pytest.raises(UserError, match="ten crops of 224 pixels need a larger image"):
        KERAS_V1.ten_crops(data)


def test_weights_trained_here_decode_as_their_data_were(rng):
    data, _ = photograph(rng, 60, 48)
    decoder = Decoder(1, size=8, pad=2)
    how = Preprocessing(size=12, channels=1, mean=(0.5,), std=(0.5,), decoder=decoder)
    np.testing.assert_array_equal(how(data), decoder(data))
    assert how(data).shape == (12, 12, 1)
    assert not how(data)[:2].any()


def test_bad_images_raise_what_the_readers_catch():
    for data in (b"", b"no picture", b"\xff\xd8\xff\xe0 cut"):
        with pytest.raises(DECODE_ERRORS):
            TORCH(data)


@pytest.mark.parametrize(
    "kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "AVIF", "DDS", "PCX", "TGA"]
)
def test_damaged_images_raise_what_the_readers_catch(rng, kind):
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(file, kind)
    taken = 0
    for _ in range(150):
        data = np.frombuffer(file.getvalue(), np.uint8).copy()
        data[rng.integers(min(len(data), 300), size=4)] = rng.integers(256, size=4)
        with contextlib.suppress(*DECODE_ERRORS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Preprocessing(size=8, resize=9)(data.tobytes())
            taken += 1
    assert taken < 150


def test_an_image_as_thin_as_a_hair_is_refused():
    file = io.BytesIO()
    Image.new("RGB", (60_000, 1)).save(file, "PNG")
    with pytest.raises(ValueError, match="too long and thin"):
        Preprocessing(size=224, resize=256)(file.getvalue())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 0}, "preprocessing.size=0"),
        ({"resize": 100}, "resize=100 is below size=224"),
        ({"interpolation": "lanczos"}, "interpolation='lanczos'"),
        ({"mean": (0.5, 0.5)}, "mean has 2 numbers"),
        ({"std": (0.5,)}, "std 1: expected one for each of 3 channels"),
        ({"std": (0.5, 0.0, 0.5)}, "preprocessing.std=0.0"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(UserError, match=message):
        Preprocessing(**fields)
