"""What timm and Hugging Face write beside weights: preprocessing, classes' names, the network."""

import dataclasses
import json
import re
import shutil

import pytest
from weights_helpers import SMALL, TIMM, random_variables, saved, without_description

import flax_resnet
from flax_resnet.cli import export, flags
from flax_resnet.data.preprocess import TORCH
from flax_resnet.errors import Note, UserError
from flax_resnet.models import create
from flax_resnet.weights import config_files, open_weights, write_weights
from flax_resnet.weights.imagenet import imagenet_classes, imagenet_ids


@pytest.mark.parametrize(
    ("changes", "size", "resize", "interpolation"),
    [
        ({}, 288, 288, "bicubic"),
        ({"test_input_size": None, "test_crop_pct": None}, 224, 235, "bicubic"),
        ({"test_crop_pct": 0.95}, 288, 303, "bicubic"),
        ({"crop_mode": "squash", "interpolation": "bilinear"}, 288, None, "bilinear"),
    ],
)
def test_timm_says_how_images_are_prepared(tmp_path, changes, size, resize, interpolation):
    assert config_files.read(tmp_path) == config_files.Description()
    path = tmp_path / "config.json"
    path.write_text('{"model": {}}')  # a run's record
    assert config_files.read(tmp_path) == config_files.Description()
    content = {"architecture": "resnet50", "pretrained_cfg": TIMM | changes | {"mean": [0.5] * 3}}
    path.write_text(json.dumps(content))
    prepared = config_files.read(tmp_path).preprocessing
    assert (prepared.size, prepared.resize, prepared.interpolation) == (size, resize, interpolation)
    assert (prepared.mean, prepared.std) == ((0.5,) * 3, TORCH.std)


CONVNEXT = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 224},
            "crop_pct": 0.875, "resample": 3, "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225]}  # fmt: skip
BIT = {"size": {"shortest_edge": 256}, "do_center_crop": True,
       "crop_size": {"height": 224, "width": 224}}  # fmt: skip
SQUEEZED = {"crop_pct": None, "image_processor_type": "ViTImageProcessor"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"interpolation": "bicubic"}),
        ({"size": 224, "image_processor_type": None}, {"interpolation": "bicubic"}),
        ({"size": {"shortest_edge": 384}},
         {"size": 384, "resize": None, "interpolation": "bicubic"}),
        ({**BIT, "crop_pct": None, "image_processor_type": "BitImageProcessor"},
         {"interpolation": "bicubic"}),
        ({**SQUEEZED, "size": {"height": 96, "width": 96}, "resample": 2},
         {"size": 96, "resize": None}),
        ({**SQUEEZED, "size": 64, "resample": 0},
         {"size": 64, "resize": None, "interpolation": "nearest"}),
    ],
)  # fmt: skip
def test_image_processors_of_transformers(tmp_path, changes, expected):
    content = {k: v for k, v in {**CONVNEXT, **changes}.items() if v is not None}
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    assert config_files.read(tmp_path).preprocessing == dataclasses.replace(TORCH, **expected)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{", "config.json cannot be used"),
        ("config.json", {"pretrained_cfg": {**TIMM, "test_input_size": [3, 288, 320]}}, "288x320"),
        ("config.json", {"pretrained_cfg": {**TIMM, "crop_mode": "border"}}, "crop_mode 'border'"),
        ("config.json", {"pretrained_cfg": {**TIMM, "interpolation": "lanczos"}}, "'lanczos'"),
        ("config.json", {"model_type": "resnet", "hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("config.json", {"architecture": "resnet50", "model_args": {"aa_layer": "blur"}},
         "model_args change aa_layer"),
        ("config.json", {"architecture": "resnet50", "global_pool": "max"}, "global_pool is 'max'"),
        ("config.json", {"model_type": "resnet", "id2label": {"a": "b"}}, "invalid literal"),
        ("config.json", {"architecture": "resnetblur50"}, "blur pooling, which has no parameters"),
        ("config.json", {"model_type": "resnet", "id2label": {"0": "cat"}},
         "names 1 classes, and its head has 7"),
        ("preprocessor_config.json", {**CONVNEXT, "resample": 1}, "KeyError(1)"),
        ("preprocessor_config.json", {**CONVNEXT, "do_rescale": False}, "do_rescale is False"),
        ("preprocessor_config.json",
         {"size": {"shortest_edge": 224}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
         "without a crop: expected a square"),
    ],
)  # fmt: skip
def test_what_the_networks_here_cannot_do_is_one_line(tmp_path, name, content, message):
    path = without_description(saved(tmp_path, create("resnet18", stage_sizes=(1,), **SMALL))[0])
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError) as caught:
        open_weights(path)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("filename", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_of_weights_is_a_path(tmp_path, filename):
    net = create("resnet50_v1", stage_sizes=(1, 1), **SMALL)
    path = without_description(saved(tmp_path, net)[0])
    folder = tmp_path / "net"
    folder.mkdir()
    shutil.copy(path, folder / filename)
    names = dict(enumerate("abcdefg"))
    config = {"model_type": "resnet", "downsample_in_bottleneck": True, "id2label": names}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(CONVNEXT))
    opened = open_weights(folder)
    assert flax_resnet.models.architecture(opened.module) == flax_resnet.models.architecture(net)
    assert opened.module.stride_conv == "1x1"
    assert opened.class_names == tuple("abcdefg")
    assert opened.preprocessing == dataclasses.replace(TORCH, interpolation="bicubic")
    assert opened.assumed == ""
    # What was taken from the files is kept in the one that is written.
    settings = flags.cli(export.Convert, [str(folder), str(tmp_path / "out.safetensors")])
    export.convert_weights(settings)
    again = open_weights(tmp_path / "out.safetensors")
    assert (again.class_names, again.preprocessing) == (opened.class_names, opened.preprocessing)


@pytest.mark.parametrize(
    ("names", "expected"),
    [(imagenet_ids(), imagenet_classes()), (["a\x1b[2J", "b"], ("a?[2J", "b"))],
)
def test_names_of_classes(tmp_path, names, expected):
    content = {"architecture": "resnet50", "label_names": names}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert config_files.read(tmp_path).class_names == expected


def test_what_is_taken_for_the_preprocessing_is_said(tmp_path):
    module = create("resnet18", stage_sizes=(1,), **SMALL)
    path = without_description(saved(tmp_path, module)[0])
    said = f"{path}: nothing says how images are prepared for it: unless it is given, the "
    with pytest.warns(Note, match=re.escape(said) + "preprocessing is torchvision's first"):
        assert open_weights(path).preprocessing == dataclasses.replace(TORCH, as_displayed=True)
    write_weights(path, module, random_variables(module), preprocessing=TORCH)
    assert open_weights(path).assumed == ""  # a Note would fail the test
