"""JPEG photographs: what libjpeg-turbo decodes of them and what becomes of it, beside Pillow."""

import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from flax_resnet.data import decode, jpeg
from flax_resnet.data.decode import DECODE_ERRORS, Decoder

WAYS = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "restarts": {"restart_marker_rows": 1},
    "progressive": {"progressive": True},
    "no chroma transform": {"keep_rgb": True},
    "comment": {"comment": b"\xff\xd8\xff\xc0 no frame \xff\xd9"},
}


@pytest.fixture(scope="module")
def photo():
    """427 x 640 pixels."""
    return load_sample_image("china.jpg")


def as_jpeg(pixels, **how):
    data = io.BytesIO()
    pixels = pixels[..., 0] if pixels.shape[2] == 1 else pixels
    Image.fromarray(np.ascontiguousarray(pixels)).save(data, "jpeg", **how)
    return data.getvalue()


def by_pillow(data, box, size, channels=3, gap=None):
    """All decoded, then resized."""
    image = decode.open_image(data, channels)
    shrunk = image.resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=gap)
    return np.asarray(shrunk).reshape(size, size, channels)


def crop(data, box, size):
    """What jpeg.decode and decode.resized make of a crop, and the rows that were decoded."""
    pixels, inner = jpeg.decode(data, jpeg.read_header(data), box, size)
    return decode.resized(pixels, inner, size), len(pixels)


def levels(a, b):
    """Absolute differences."""
    assert a.shape == b.shape
    return np.abs(a.astype(int) - b)


def random_box(rng, width, height):
    left, top = rng.uniform(0, 0.9, 2)
    right, bottom = rng.uniform([left + 0.05, top + 0.05], 1)
    return left * width, top * height, right * width, bottom * height


def only_pillow(monkeypatch):
    def unexpected(*arguments):
        raise AssertionError("it took the quick way")

    monkeypatch.setattr(jpeg, "decode", unexpected)


@pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)
def test_a_crop_is_within_a_level_of_pillows(photo, how, rng):
    shorter = 0
    for _ in range(12):
        width, height = rng.integers(1, 200, 2)
        data = as_jpeg(photo[100:][:height, :width], quality=int(rng.integers(40, 100)), **how)
        box, size = random_box(rng, width, height), int(rng.integers(70, 230))
        found, rows = crop(data, box, size)
        assert levels(found, by_pillow(data, box, size)).max() <= 1
        shorter += rows < height
    assert (shorter > 0) == ("progressive" not in how)


@pytest.mark.parametrize("size", [1, 16, 40, 64])
def test_a_fraction_of_a_large_crop_is_near(photo, size, rng):
    data = as_jpeg(photo, quality=90)
    header = jpeg.read_header(data)
    for box in ((0, 0, 640, 427), (31.3, 20.9, 600.2, 401.7), (100, 100, 301, 299)):
        pixels, inner = jpeg.decode(data, header, box, size)
        assert pixels.shape[1] in (320, 160, 80)
        assert min(inner[2] - inner[0], inner[3] - inner[1]) >= jpeg.GAP * size
        found = decode.resized(pixels, inner, size)
        difference = levels(found, by_pillow(data, box, size))
        assert difference.mean() < 3
        assert difference.max() <= 24


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_grey_photographs(photo, channels):
    data = as_jpeg(photo[..., :1], quality=90)
    found = Decoder(channels, 160, crop_ratio=0.875)(data)
    box = decode._centre_box(0.875, 640, 427)
    assert found.shape == (160, 160, channels)
    assert levels(found, by_pillow(data, box, 160, channels)).max() <= 1


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_of_a_photograph_are_pillows(photo, channels):
    data, box = as_jpeg(photo), decode._centre_box(1.0, 640, 427)
    found = Decoder(channels, 160)(data)
    np.testing.assert_array_equal(found, by_pillow(data, box, 160, channels))


def test_random_crops_are_drawn_from_the_sizes_alone(photo):
    """PNG and JPEG, and whichever way a JPEG goes, have the same crops."""
    decoder = Decoder(3, 48, random_crop=True)
    png = io.BytesIO()
    Image.fromarray(photo).save(png, "png")
    for seed in range(5):
        found = [
            decoder(data, np.random.default_rng(seed))
            for data in (png.getvalue(), as_jpeg(photo, quality=100, subsampling=0))
        ]
        assert levels(*found).mean() < 2.5


def test_without_simd_pillow_resizes(photo, monkeypatch, rng):
    data, decoder = as_jpeg(photo), Decoder(3, 150, random_crop=True)
    fast = decoder(data, np.random.default_rng(0))
    monkeypatch.setattr(decode, "simd", None)
    assert levels(fast, decoder(data, np.random.default_rng(0))).max() <= 1
    grey = rng.integers(0, 256, (9, 9, 1), dtype=np.uint8)
    np.testing.assert_array_equal(decode.resized(grey, (0, 0, 9, 9), 9), grey)
    assert decode.resized(grey, (1, 2, 8.5, 9), 4).shape == (4, 4, 1)


def test_orientation_is_not_applied_to_the_pixels_as_stored(photo):
    turned = Image.Exif()
    turned[0x0112] = 6
    plain, tagged = (as_jpeg(photo[:80, :120], exif=exif) for exif in (Image.Exif(), turned))
    assert plain != tagged
    stored = Decoder(3, 50, as_displayed=False)
    np.testing.assert_array_equal(stored(plain), stored(tagged))


def altered(data, at, *values):
    return data[:at] + bytes(values) + data[at + len(values) :]


def left_to_pillow():
    """Files that the quick way does not take, and what of them is otherwise."""
    photo = load_sample_image("flower.jpg")[:64, :96]
    data = as_jpeg(photo)
    cmyk = io.BytesIO()
    Image.fromarray(photo).convert("CMYK").save(cmyk, "jpeg")
    png = io.BytesIO()
    Image.fromarray(photo).save(png, "png")
    return {
        "CMYK": cmyk.getvalue(),
        "PNG": png.getvalue(),
        "more after its end": data + b"\0\0",
        "fill bytes": data[:2] + b"\xff" + data[2:],
    }


@pytest.mark.parametrize("name", left_to_pillow())
def test_what_is_left_to_pillow_is_as_it_was(name, monkeypatch):
    data = left_to_pillow()[name]
    only_pillow(monkeypatch)
    box = decode._centre_box(0.8, 96, 64)
    np.testing.assert_array_equal(Decoder(3, 20, crop_ratio=0.8)(data), by_pillow(data, box, 20))


def test_a_file_that_breaks_off_is_an_error(photo):
    data = as_jpeg(photo)
    for length in (0, 1, 3, 20, 300, 700, len(data) // 2, len(data) - 2000):
        with pytest.raises(DECODE_ERRORS):
            Decoder(3, 100, random_crop=True)(data[:length], np.random.default_rng(0))


def test_more_pixels_than_pillow_takes_are_an_error(photo, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(Image.DecompressionBombError):
        Decoder(3, 100)(as_jpeg(photo))


def test_damage_is_no_worse_than_with_pillow(photo, rng):
    """Flipped bytes anywhere: an error that is expected, or pixels."""
    data = as_jpeg(photo[:64, :96], quality=60)
    decoder, errors = Decoder(3, 20), 0
    for _ in range(150):
        at = int(rng.integers(0, len(data) if rng.random() < 0.5 else 640))
        damaged = altered(data, at, *rng.integers(0, 256, 2).tolist())
        try:
            assert decoder(damaged).shape == (20, 20, 3)
        except DECODE_ERRORS:
            errors += 1
            with pytest.raises(DECODE_ERRORS):
                decode.open_image(damaged, 3)
    assert 0 < errors < 150
