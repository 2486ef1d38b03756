"""Pixels as a viewer shows them: EXIF, transparency, and greys of more than 8 bits."""

import dataclasses
import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image

from flax_resnet.data import decode, jpeg
from flax_resnet.data.config import DataConfig
from flax_resnet.data.decode import Decoder, open_image
from flax_resnet.data.preprocess import TORCH, Preprocessing
from flax_resnet.records.configs import from_record, to_record

WHITE = [255, 255, 255]


def encoded(image, kind="PNG", **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def oriented(image, orientation, kind="JPEG", **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, kind, exif=exif, **options)


def raw_png(size, depth, colour, row, transparent):
    """A PNG of one row, which Pillow cannot write: its tRNS chunk holds ``transparent``."""

    def chunk(kind, content):
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", size, 1, depth, colour, 0, 0, 0)
    pixels = zlib.compress(b"\0" + row)
    parts = {b"IHDR": header, b"tRNS": transparent, b"IDAT": pixels, b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts.items())


@pytest.fixture(scope="module")
def photo():
    return Image.fromarray(load_sample_image("china.jpg")[:150, :211])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("how", [{}, {"progressive": True, "subsampling": 2}])
def test_a_turned_photograph_is_one_that_was_stored_so(photo, orientation, how, monkeypatch):
    data = oriented(photo, orientation, **how)
    shown = encoded(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    decoder = Decoder(3, 64, crop_ratio=0.8)
    got = decoder(data).astype(int)
    assert np.abs(got - decoder(shown)).max() <= 1
    crop = dataclasses.replace(decoder, random_crop=True)
    assert crop(data, np.random.default_rng(0)).shape == (64, 64, 3)
    monkeypatch.setattr(jpeg, "decode", lambda *_: None)
    np.testing.assert_array_equal(decoder(data), decoder(shown))  # as Pillow decodes it
    assert crop(data, np.random.default_rng(0)).shape == (64, 64, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_is_applied_in_every_kind_of_file(kind):
    image = Image.new("RGB", (64, 32))
    image.paste((250, 250, 250), (0, 0, 32, 32))
    data = oriented(image, 6, kind)
    shown = Decoder(3)(data)
    assert shown.shape == (64, 32, 3)
    assert shown[:30].min() > 240
    assert shown[34:].max() < 10
    square = Preprocessing(16, None, as_displayed=True)(data)
    assert square[:6].min() > 240
    assert square[10:].max() < 20
    if kind != "TIFF":  # which Pillow turns in any case
        assert Decoder(3, as_displayed=False)(data).shape == (32, 64, 3)
        assert TORCH(data).shape == (224, 224, 3)
        assert decode.orientation(Image.open(io.BytesIO(data))) == 6


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("app1", [b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0", b"Exif\0\0MM"])
def test_damaged_exif_turns_nothing(photo, app1):
    data = encoded(photo, "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", len(app1) + 2) + app1
    for decoder in (Decoder(3, 64), Decoder(3)):
        np.testing.assert_array_equal(decoder(data[:2] + segment + data[2:]), decoder(data))


def test_an_orientation_in_xmp_counts(photo):
    app1 = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta tiff:Orientation="6"/>'
    data = encoded(photo, "JPEG")
    turned = data[:2] + b"\xff\xe1" + struct.pack(">H", len(app1) + 2) + app1 + data[2:]
    assert decode.orientation(Image.open(io.BytesIO(turned))) == 6
    assert Decoder(3)(turned).shape == (211, 150, 3)


def cut_out(mode, hidden):
    """A red square of 2x2 pixels, opaque, in 4x4 transparent ones of a hidden colour."""
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[..., :3] = hidden
    pixels[1:3, 1:3] = (200, 60, 30, 255)
    image = Image.fromarray(pixels)
    return image.quantize() if mode == "P" else image.convert(mode)


@pytest.mark.parametrize("hidden", [(0, 0, 0), (240, 30, 10)])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_white(mode, hidden):
    data = encoded(cut_out(mode, hidden))
    shown = Decoder(3)(data)
    assert shown[0, 0].tolist() == WHITE
    assert Decoder(1)(data)[0, 0].tolist() == [255]
    assert shown[1, 1].tolist() == Decoder(4)(data)[1, 1, :3].tolist()
    assert Decoder(4)(data)[0, 0, 3] == 0  # RGBA is asked for: nothing is put under it
    assert Decoder(4)(data)[1, 1, 3] == 255


def test_half_transparent_pixels_are_half_white():
    data = encoded(Image.new("RGBA", (2, 2), (0, 100, 200, 51)))
    assert Decoder(3)(data)[0, 0].tolist() == [204, 224, 244]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(Image.new("RGB", (2, 1), (1, 2, 3)), transparency=(1, 2, 3)), [WHITE, WHITE]),
        (encoded(Image.new("L", (2, 1), 9), transparency=9), [WHITE, WHITE]),
        (encoded(Image.new("P", (2, 1), 0), "GIF", transparency=0), [WHITE, WHITE]),
        (raw_png(4, 2, 0, b"\x1b", b"\0\1"), [[0] * 3, WHITE, [170] * 3, WHITE]),
        (raw_png(2, 4, 0, b"\x3f", b"\0\3"), [WHITE, WHITE]),
        (raw_png(8, 1, 0, b"\x0f", b"\0\0"), [WHITE] * 8),
        (raw_png(3, 16, 0, struct.pack(">3H", 0, 700, 65535), struct.pack(">H", 700)),
         [[0] * 3, WHITE, WHITE]),
        (raw_png(2, 16, 2, struct.pack(">6H", 256, 512, 768, 0, 0, 65535),
                 struct.pack(">3H", 256, 512, 768)), [WHITE, [0, 0, 255]]),
    ],
    ids=["RGB", "L", "GIF", "2 bits", "4 bits", "1 bit", "16 bits", "RGB of 16 bits"],
)  # fmt: skip
def test_the_one_transparent_colour_of_a_file_is_white(data, expected):
    assert Decoder(3)(data)[0].tolist() == expected


def pgm(values, top):
    return b"P5\n%d 1\n%d\n" % (len(values), top) + struct.pack(f">{len(values)}H", *values)


def grey(values, dtype, kind="TIFF"):
    return encoded(Image.fromarray(np.array([values], dtype)), kind)


def big_endian(values):
    content = struct.pack(f">{len(values)}H", *values)
    return encoded(Image.frombytes("I;16B", (len(values), 1), content), "TIFF")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (grey([0, 257, 32896, 65535], np.uint16, "PNG"), [0, 1, 128, 255]),
        (grey([0, 257, 32896, 65535], np.uint16), [0, 1, 128, 255]),
        (big_endian([0, 257, 32896, 65535]), [0, 1, 128, 255]),
        (grey([0, 257, 32896, 65535], np.int32), [0, 1, 128, 255]),
        (grey([0, 1000, 2048, 4095], np.uint16, "PNG"), [0, 62, 128, 255]),
        (grey([0, 3, 200, 255], np.uint16, "PNG"), [0, 3, 200, 255]),
        (pgm([0, 1000, 2048, 4095], 4095), [0, 62, 128, 255]),
        (grey([0.0, 0.25, 0.5, 1.0], np.float32), [0, 64, 128, 255]),
    ],
    ids=["PNG", "TIFF", "big endian", "I", "12 bits", "8 bits", "PGM", "float"],
)
def test_deep_greys_keep_their_range(data, expected):
    assert Decoder(1)(data)[0, :, 0].tolist() == expected
    assert Decoder(3)(data)[0, :, 1].tolist() == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (grey([0.0, 200.0], np.float32), "its greys go from 0 to 200, expected 0 to 1: save it"),
        (grey([-0.1, 0.5], np.float32), "its greys go from -0.1 to 0.5, expected 0 to 1"),
        (grey([np.nan, 0.5], np.float32), "its greys go from nan to nan, expected 0 to 1"),
        (grey([0, 70000], np.int32), "its greys go from 0 to 70000, expected 0 to 65535"),
    ],
)
def test_greys_of_no_known_range_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        open_image(data, 1)
    with pytest.raises(ValueError, match=r"its mode is [FI], 8 or 16 bits a channel are expected"):
        open_image(data, 1, as_displayed=False)


def test_16_bit_colours_and_cmyk_are_scaled_to_8_bits():
    ppm = b"P6\n1 1\n65535\n" + struct.pack(">3H", 0, 32896, 65535)
    assert Decoder(3)(ppm)[0, 0].tolist() == [0, 128, 255]
    for colour in ((255, 0, 0), (255, 255, 255), (0, 0, 0)):
        data = encoded(Image.new("RGB", (8, 8), colour).convert("CMYK"), "JPEG", quality=95)
        np.testing.assert_allclose(Decoder(3, 8)(data)[0, 0], colour, atol=3)


def test_records_without_the_field_decode_as_they_did():
    config = DataConfig(folder="photos")
    assert config.decoder(3).as_displayed
    assert not DataConfig().decoder(3).as_displayed  # a tfds set: as tfds has it
    record = json.loads(json.dumps(to_record(config)))
    assert from_record(record) == config
    del record["as_displayed"]
    assert not from_record(record).decoder(3).as_displayed
    prepared = to_record(Preprocessing(decoder=config.decoder(3), as_displayed=True))
    assert from_record(prepared).decoder.as_displayed
    del prepared["as_displayed"], prepared["decoder"]["as_displayed"]
    old = from_record(prepared)
    assert (old.as_displayed, old.decoder.as_displayed) == (False, False)
    assert not TORCH.as_displayed
