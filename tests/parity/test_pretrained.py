"""Files written by Keras and by torch give the same logits here; files written here, there.

The networks have random weights and statistics. Images are JPEG photographs of odd sizes, prepared
by each framework's own pipeline.
"""

import dataclasses
import io

import h5py
import jax
import numpy as np
import pytest
from parity_helpers import assert_close, channels_first, keras, torch
from parity_references import (
    R18,
    R50,
    R101,
    R152,
    KerasReference,
    Spec,
    TorchReference,
    random_variables,
)
from PIL import Image
from safetensors.torch import save_file

from flax_resnet.data.normalization import normalize
from flax_resnet.data.preprocess import KERAS_V1, KERAS_V2, TORCH, Preprocessing
from flax_resnet.models import create
from flax_resnet.weights.reading import open_file, read_weights
from flax_resnet.weights.writing import write_weights

OPTIMIZED = True
SIZES = [(301, 507), (640, 479), (97, 223)]
DEEP = pytest.mark.slow
# Keras's variables meet numpy 2 and h5py when Keras saves them.
KERAS_SAVES = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """JPEG files of a smooth pattern with noise."""
    rng, paths = np.random.default_rng(0), []
    for width, height in SIZES:
        coarse = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        noise = rng.integers(-20, 20, (height, width, 3))
        pixels = np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)
        path = tmp_path_factory.mktemp("photos") / f"{width}x{height}.jpg"
        Image.fromarray(pixels).save(path, quality=88)
        paths.append(path)
    return paths


def ours(module, variables, preprocessing, paths):
    pixels = np.stack([preprocessing(path.read_bytes()) for path in paths])
    images = normalize(pixels, preprocessing.statistics())
    return jax.jit(module.apply)(variables, images)


# --- Keras ------------------------------------------------------------------------------------


def write_published(model, path):
    """The published files' layout, by Keras's own writer."""
    from keras.src.legacy.saving import legacy_h5_format

    with h5py.File(path, "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, model)


@KERAS_SAVES
@pytest.mark.parametrize(
    "name",
    [
        "ResNet50",
        "ResNet50V2",
        pytest.param("ResNet101", marks=DEEP),
        pytest.param("ResNet152V2", marks=DEEP),
    ],
)
def test_keras_files(rng, tmp_path, photographs, name):
    module = create(name)
    size = 64
    given = random_variables(module, np.zeros((1, size, size, 3), np.float32), rng)
    given = jax.tree.map(np.array, given)  # Keras's predict donates what it was given
    model = KerasReference(name, given, (1, size, size, 3)).model
    resnet = keras.applications.resnet_v2 if name.endswith("V2") else keras.applications.resnet
    images = [keras.utils.load_img(path, target_size=(size, size)) for path in photographs]
    pixels = np.stack([keras.utils.img_to_array(image) for image in images])
    want = model.predict(resnet.preprocess_input(pixels), verbose=0)
    how = KERAS_V2 if name.endswith("V2") else KERAS_V1

    model.save_weights(tmp_path / "net.weights.h5")
    write_published(model, tmp_path / "net.h5")
    for file in ("net.weights.h5", "net.h5"):
        opened = open_file(tmp_path / file)
        assert opened.module == module
        assert opened.preprocessing == dataclasses.replace(how, as_displayed=True)
        small = Preprocessing(size, None, "nearest", mean=how.mean, std=how.std, bgr=how.bgr)
        assert_close(ours(module, opened.variables, small, photographs), want, what=file)

    # And back: Keras loads what is written here, and it is the same to the last bit.
    write_weights(tmp_path / "ours.weights.h5", module, given)
    there = getattr(keras.applications, name)(
        weights=None, input_shape=(size, size, 3), classifier_activation=None
    )
    there.load_weights(tmp_path / "ours.weights.h5")
    for a, b in zip(there.weights, model.weights, strict=True):
        np.testing.assert_array_equal(a.value, b.value, err_msg=a.path)


@KERAS_SAVES
def test_keras_files_without_the_top_and_of_whole_models(rng, tmp_path):
    x = rng.normal(size=(2, 64, 64, 3)).astype(np.float32)
    model = keras.applications.ResNet50(weights=None, include_top=False, input_shape=(64, 64, 3))
    model.save_weights(tmp_path / "notop.weights.h5")
    write_published(model, tmp_path / "notop.h5")
    model.save(tmp_path / "whole.h5")
    want = model.predict(x, verbose=0)
    for file in ("notop.weights.h5", "notop.h5", "whole.h5"):
        module, variables = read_weights(tmp_path / file)
        assert not module.include_top
        assert_close(jax.jit(module.apply)(variables, x), want, what=file)


def test_preprocessing_is_keras_s(photographs):
    for module, how in ((keras.applications.resnet, KERAS_V1),
                        (keras.applications.resnet_v2, KERAS_V2)):  # fmt: skip
        for path in photographs:
            image = keras.utils.img_to_array(keras.utils.load_img(path, target_size=(224, 224)))
            want = module.preprocess_input(image[None])
            got = normalize(how(path.read_bytes())[None], how.statistics())
            np.testing.assert_allclose(got, want, rtol=1e-6, atol=2e-5)


# --- torch ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("resnet18", Spec(False, R18)),
        ("resnet50", Spec(True, R50)),
        ("resnet50d", Spec(True, R50, stem="deep", shortcut="D")),
        ("resnext50_32x4d", Spec(True, R50, groups=32, width=4)),
        ("resnet20", Spec(False, (3,) * 3, 16, stem="cifar", shortcut="A", classes=10)),
        pytest.param("resnet34", Spec(False, R50), marks=DEEP),
        pytest.param("resnet152", Spec(True, R152), marks=DEEP),
        pytest.param("wide_resnet50_2", Spec(True, R50, width=128), marks=DEEP),
        pytest.param("wide_resnet101_2", Spec(True, R101, width=128), marks=DEEP),
    ],
)
def test_torch_files(rng, tmp_path, photographs, name, spec):
    module = create(name)
    given = random_variables(module, np.zeros((1, 64, 64, 3), np.float32), rng)
    model = TorchReference(spec, given).model.eval()
    how = Preprocessing(64, 72)
    with torch.no_grad():
        want = model(torch_images(photographs, 72, 64))["logits"].numpy()
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    torch.save(state, tmp_path / "net.pth")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save({"epoch": 9, "best_prec1": 92.1,
                "state_dict": {f"module.{k}": v for k, v in state.items()}},
               tmp_path / "checkpoint.th")  # fmt: skip
    save_file(state, tmp_path / "net.safetensors")
    for file in ("net.pth", "old.pth", "checkpoint.th", "net.safetensors"):
        found, variables = read_weights(tmp_path / file)
        assert found == module
        assert_close(ours(found, variables, how, photographs), want, what=file)

    # And back: torch loads what is written here, strictly, and it is the same to the last bit.
    from safetensors.torch import load_file

    write_weights(tmp_path / "ours.safetensors", module, given)
    written = load_file(tmp_path / "ours.safetensors")
    counters = {k: v for k, v in state.items() if k.endswith("num_batches_tracked")}
    assert written.keys() == state.keys() - counters.keys()
    for key, value in written.items():
        assert torch.equal(value, state[key]), key
    TorchReference(spec, given).model.load_state_dict(written | counters, strict=True)


def torch_images(paths, resize, crop):
    """As torchvision's Resize, CenterCrop, ToTensor and Normalize do."""
    images = []
    for path in paths:
        image = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
        short, long = sorted(image.size)
        new = (resize, int(resize * long / short))
        image = image.resize(new if image.width == short else new[::-1], Image.Resampling.BILINEAR)
        left, top = (round((side - crop) / 2.0) for side in image.size)
        pixels = np.asarray(image.crop((left, top, left + crop, top + crop)))
        images.append(torch.tensor(pixels).permute(2, 0, 1).float().div(255))
    mean, std = (torch.tensor(v)[:, None, None] for v in (TORCH.mean, TORCH.std))
    return (torch.stack(images) - mean) / std


def test_preprocessing_is_torchs(photographs):
    got = normalize(np.stack([TORCH(p.read_bytes()) for p in photographs]), TORCH.statistics())
    want = torch_images(photographs, 256, 224)
    np.testing.assert_allclose(channels_first(got), want, rtol=1e-5, atol=1e-6)


def test_resampling_is_torchs_antialiased_one(photographs):
    """torch resizes 8-bit images by a kernel of its own, in whole numbers: to a grey level."""
    for path in photographs:
        image = torch.tensor(np.asarray(Image.open(path)).copy()).permute(2, 0, 1)[None]
        height, width = image.shape[2:]
        scale = 256 / min(height, width)
        size = (int(height * scale + 1e-6), int(width * scale + 1e-6))
        resized = torch.nn.functional.interpolate(image, size, mode="bilinear", antialias=True)[
            0
        ].permute(1, 2, 0)
        top, left = (round((side - 224) / 2.0) for side in size)
        want = resized[top : top + 224, left : left + 224].numpy().astype(int)
        assert np.max(np.abs(TORCH(path.read_bytes()) - want)) <= 1
