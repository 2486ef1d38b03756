"""Names, layouts and inference of networks; round trips; what does not fit is listed exactly."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from helpers import assert_trees_equal
from safetensors.numpy import load_file, save_file
from weights_helpers import SMALL, keras_h5, random_variables, saved, without_description

import flax_resnet
from flax_resnet.data.preprocess import KERAS_V1, TORCH
from flax_resnet.errors import UserError
from flax_resnet.models import Block, ConvSpec, WeightsError, architecture, create, keras_resnet
from flax_resnet.weights.readers.tensors import read_tensors
from flax_resnet.weights.reading import METADATA_KEY, open_file, read_weights
from flax_resnet.weights.writing import write_weights

NETWORKS = [  # those that tests/parity does not read from torch's own files
    ("seresnet50", {}), ("resnet18_v2", {"conv_bias": "unnormalized"}), ("resnet50_v2", {}),
    ("resnet56", {"shortcut": "B"}), ("resnet20", {"shortcut": "C", "stage_sizes": (1, 1, 1)}),
    ("resnet18", {"hidden_units": (5, 6), "stem": "cifar"}), ("resnet18", {"include_top": False}),
    ("resnet18", {"conv_bias": "all", "scan_blocks": True}), ("resnet20", {"norm_kind": "none"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields"), NETWORKS)
def test_the_network_is_inferred_from_names_and_shapes(tmp_path, name, fields):
    module = create(name, **{**SMALL, **fields})
    path, variables = saved(tmp_path, module)
    found, read = read_weights(without_description(path))
    assert architecture(found) == architecture(module)
    for field in ("include_top", "hidden_units"):
        assert getattr(found, field) == getattr(module, field)
    assert found.num_classes == (7 if module.include_top else 1000)
    assert_trees_equal(read, flax_resnet.unstack_blocks(module, variables))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("plain20", {}), ("highway19", {}), ("resnet50", {"output_stride": 8, "remat": True}),
        ("mini", {}), ("dropblock_resnet", {"stage_filters": (8, 8, 8, 8)}),
    ],
)  # fmt: skip
def test_what_is_written_here_says_what_it_is(tmp_path, name, fields):
    """Strides, connections and constants leave no trace in names and shapes."""
    module = create(name, **(fields if "stage_filters" in fields else {**SMALL, **fields}))
    shape = flax_resnet.models.default_shape(module)
    variables = random_variables(module, shape)
    write_weights(tmp_path / "net.safetensors", module, variables)
    found, read = read_weights(tmp_path / "net.safetensors")
    assert found == module
    assert_trees_equal(read, variables)


def test_preprocessing_classes_and_image_shape_are_kept(tmp_path):
    names = ("cat", "dog", *"abcde")
    path, _ = saved(tmp_path, create("resnet18", **SMALL), preprocessing=KERAS_V1,
                    class_names=names, input_shape=(48, 40, 3))  # fmt: skip
    opened = open_file(path)
    assert (opened.preprocessing, opened.class_names) == (KERAS_V1, names)
    about = json.loads(read_tensors(path).metadata[METADATA_KEY])
    assert about["input_shape"] == [48, 40, 3]


def test_grey_images(tmp_path):
    module = create("resnet20", **SMALL)
    variables = random_variables(module, (32, 32, 1))
    write_weights(tmp_path / "net.safetensors", module, variables)
    assert_trees_equal(read_weights(tmp_path / "net.safetensors")[1], variables)
    path = without_description(tmp_path / "net.safetensors")
    assert_trees_equal(read_weights(path)[1], variables)


# --- other people's names ---------------------------------------------------------------------

HUGGING_FACE = [
    (r"^conv1\.", "resnet.embedder.embedder.convolution."),
    (r"^bn1\.", "resnet.embedder.embedder.normalization."),
    (r"\.downsample\.0\.", ".shortcut.convolution."),
    (r"\.downsample\.1\.", ".shortcut.normalization."),
    *((rf"\.conv{i + 1}\.", f".layer.{i}.convolution.") for i in range(3)),
    *((rf"\.bn{i + 1}\.", f".layer.{i}.normalization.") for i in range(3)),
    *((rf"^layer{i + 1}\.(\d+)", rf"resnet.encoder.stages.{i}.layers.\1") for i in range(4)),
    (r"^fc\.", "classifier.1."),
]
CIFAR = [(r"^fc\.", "linear."), (r"\.downsample\.", ".shortcut."), (r"^", "module.")]


@pytest.mark.parametrize(
    ("name", "fields", "spelling"),
    [
        ("resnet50", {}, HUGGING_FACE),
        ("resnet18", {}, [*HUGGING_FACE[:-1], (r"^resnet\.", ""), (r"^fc\.", "classifier.1.")]),
        ("resnet18", {"stem": "cifar"}, CIFAR),
        ("resnet18", {}, [(r"^", "model._orig_mod.module.")]),
        ("wrn_16_4", {}, [(r"^bn\.", "bn1."), (r"\.downsample\.", ".shortcut.")]),
    ],
)
def test_names_of_others(tmp_path, name, fields, spelling):
    module = create(name, **{**SMALL, **fields})
    path, variables = saved(tmp_path, module)
    tensors = {}
    for key, value in load_file(path).items():
        new = key
        for pattern, replacement in spelling:
            new = re.sub(pattern, replacement, new)
        tensors[new] = value
        if key.endswith("running_var"):
            tensors[new.replace("running_var", "num_batches_tracked")] = np.array(7)
    assert tensors.keys() != load_file(path).keys()
    save_file(tensors, path)
    found, read = read_weights(path)
    assert architecture(found) == architecture(module)
    assert_trees_equal(read, variables)


def test_half_precision_is_read_as_float32(tmp_path):
    path, variables = saved(tmp_path, create("resnet20", **SMALL))
    save_file({k: v.astype(np.float16) for k, v in load_file(path).items()}, path)
    read = read_weights(path)[1]
    assert {x.dtype for x in jax.tree.leaves(read)} == {np.dtype(np.float32)}
    half = jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), variables)
    assert_trees_equal(read, half)


# --- Keras ------------------------------------------------------------------------------------


def old_name(layer):
    """keras_applications before 2019."""
    if found := re.fullmatch(r"conv(\d)_block(\d+)_(\d)_(conv|bn)", layer):
        stage, block, number, kind = found.groups()
        branch = {"0": "1", "1": "2a", "2": "2b", "3": "2c"}[number]
        letter = "abcdefg"[int(block) - 1]
        return f"{'res' if kind == 'conv' else 'bn'}{stage}{letter}_branch{branch}"
    names = {"conv1_conv": "conv1", "conv1_bn": "bn_conv1", "predictions": "fc1000"}
    return names.get(layer, layer)


def test_keras_files_of_before_2019_and_of_whole_models(tmp_path):
    module = keras_resnet(50, stage_sizes=(1, 2, 1, 1), **SMALL)
    variables = random_variables(module)
    opened = open_file(keras_h5(tmp_path / "old.h5", module, variables, old_name))
    assert opened.module.bn_epsilon == 1e-3
    assert_trees_equal(opened.variables, variables)
    path = keras_h5(tmp_path / "whole.h5", module, variables, below="/model_weights")
    assert_trees_equal(open_file(path).variables, variables)
    probs = keras_h5(tmp_path / "probs.h5", module, variables,
                     lambda layer: layer.replace("predictions", "probs"))  # fmt: skip
    assert_trees_equal(open_file(probs).variables, variables)


# --- what does not fit ------------------------------------------------------------------------


def test_what_is_missing_left_over_or_misshapen_is_listed(tmp_path):
    path, _ = saved(tmp_path, create("resnet20", **SMALL))
    tensors = load_file(path)
    tensors["layer9x.weight"] = tensors.pop("layer2.1.bn2.running_var")
    tensors["layer3.0.conv2.weight"] = tensors["layer3.0.conv2.weight"][:, :5].copy()
    del tensors["layer1.0.conv2.weight"]
    tensors["layer1.0.conv2.weight"] = np.ones((8, 8, 3, 3), np.float32)
    del tensors["layer1.1.conv1.weight"]
    save_file(tensors, path)
    with pytest.raises(WeightsError) as raised:
        read_weights(path)
    error = raised.value
    assert error.missing == ("layer1.1.conv1.weight", "layer2.1.bn2.running_var")
    assert error.unexpected == ("layer9x.weight",)
    assert error.misshaped == {"layer3.0.conv2.weight": ((32, 5, 3, 3), (32, 32, 3, 3))}
    assert "\n" not in str(error)
    for name in (*error.missing, *error.unexpected, "(32, 5, 3, 3) for (32, 32, 3, 3)"):
        assert name in str(error)


BLOCKS = {f"layer1.{i}.conv1.weight": np.ones((1, 1, 1, 1), np.float32) for i in range(3, 3000)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"x": t["fc.bias"]}, "no residual network's: expected names like"),
        (lambda t: {k: v for k, v in t.items() if "layer2.0" not in k}, "missing (layer2.0."),
        (lambda t: {k: v for k, v in t.items() if not k.startswith("conv1")}, "'conv1.weight'"),
        (lambda t: t | {"conv1.weight": t["conv1.weight"][:, :, :1, :1]}, "conv1 is 1x1"),
        (lambda t: t | {"conv1.weight": t["conv1.weight"].reshape(-1)}, "has shape"),
        (lambda t: t | {f"module.{k}": v for k, v in t.items()}, "holds 2 networks: say which"),
        (lambda t: t | {"linear.bias": t["fc.bias"]}, "under another name too"),
        (lambda t: t | {"layer1.999999.conv1.weight": t["conv1.weight"]}, "missing (layer1.3."),
        (lambda t: t | BLOCKS, "tensors: too few"),
        # Shapes inferred from one tensor are not allocated for the others.
        (lambda t: t | {"layer1.0.conv2.weight": np.ones((10**5, 1, 1, 1), np.float32)}, "another"),
        (lambda t: t | {"fc.weight": t["fc.weight"].astype(np.int32)}, "int32"),
    ],
)
def test_files_that_are_no_such_network(tmp_path, change, message):
    path, _ = saved(tmp_path, create("resnet20", **SMALL))
    changed = {k: np.ascontiguousarray(v) for k, v in change(load_file(path)).items()}
    save_file(changed, path)
    with pytest.raises(UserError, match=re.escape(message)):
        read_weights(path)


class Single(Block):
    """A block of one's own."""

    def convs(self):
        return (ConvSpec(self.filters, 3, self.strides),)


def test_a_block_of_ones_own_is_given(tmp_path):
    module = create("resnet20", **SMALL).clone(block_cls=Single)
    path, variables = saved(tmp_path, module)
    with pytest.raises(UserError, match="of your own has to be given, as block_cls"):
        read_weights(path)
    found, read = read_weights(path, block_cls=Single)
    assert found == module
    assert_trees_equal(read, variables)


def test_writing_refuses_what_cannot_be_written(tmp_path):
    module = create("resnet20", **SMALL)
    variables = random_variables(module)
    with pytest.raises(UserError, match=r"ends in \.safetensors or \.weights\.h5"):
        write_weights(tmp_path / "net.pth", module, variables)
    with pytest.raises(UserError, match="not one of Keras's"):
        write_weights(tmp_path / "net.weights.h5", module, variables)
    with pytest.raises(UserError, match="cannot be written"):
        write_weights(tmp_path / "nowhere" / "net.safetensors", module, variables)
    module = keras_resnet(50, stage_sizes=(1,), param_dtype="bfloat16", **SMALL)
    with pytest.raises(UserError, match="Keras's format with bfloat16"):
        write_weights(tmp_path / "net.weights.h5", module, random_variables(module))
    assert list(tmp_path.iterdir()) == []


def test_torch_files_are_taken_as_torchvisions(tmp_path):
    opened = open_file(without_description(saved(tmp_path, create("resnet18", **SMALL))[0]))
    assert opened.preprocessing == dataclasses.replace(TORCH, as_displayed=True)
    path, _ = saved(tmp_path, create("resnet20", **SMALL))
    assert open_file(without_description(path)).preprocessing is None


def test_the_same_weights_are_the_same_bytes(tmp_path):
    from prediction_helpers import make_weights

    written = set()
    for i in range(8):
        make_weights(tmp_path / f"{i}.safetensors")
        written.add((tmp_path / f"{i}.safetensors").read_bytes())
    assert len(written) == 1
