"""Weight files whose names, shapes or description are wrong: taken or refused, by one line."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file
from weights_helpers import SMALL, keras_h5, random_variables, saved, without_description

from flax_resnet.data.preprocess import TORCH
from flax_resnet.errors import UserError
from flax_resnet.models import create
from flax_resnet.records.configs import MOVED_CLASSES
from flax_resnet.weights.readers.tensors import TensorFile, read_tensors
from flax_resnet.weights.reading import METADATA_KEY, _inferred, open_file, read_weights
from flax_resnet.weights.writing import write_weights


def mangled(rng, tensors):
    """The tensors with one to three of them renamed, dropped, reshaped, cut or replaced."""
    tensors = dict(tensors)
    for _ in range(rng.integers(1, 4)):
        name = str(rng.choice(sorted(tensors)))
        tensor = tensors.pop(name)
        other = str(rng.choice(sorted(tensors)))
        shape = [max(1, int(n)) for n in rng.choice([*tensor.shape, 1, 2, 3, 7, 64], tensor.ndim)]
        huge = (rng.choice([10**5, 10**9]), *shape[1:])
        renamed = name.replace("1", str(rng.choice(["0", "9", "99999", "x", ""])), 1)
        changes = [{}, {renamed: tensor}, {other: tensor}, {f"{name}.{other}": tensor},
                   {name: np.ones(shape, np.float32)}, {name: tensor.reshape(-1)},
                   {name: tensor[:1]}, {name: np.broadcast_to(np.float32(1), huge)}]  # fmt: skip
        tensors |= changes[rng.integers(len(changes))]
    return tensors


MANGLED = [
    ("resnet50d", {"stage_sizes": (1, 1), "se_reduction": 4}, "safetensors"),
    ("resnet18_v2", {"stage_sizes": (1, 1)}, "safetensors"),
    ("ResNet50", {"stage_sizes": (1, 2)}, "keras_h5"),
    ("ResNet50V2", {"stage_sizes": (2, 2)}, "keras_weights"),
]


@pytest.mark.parametrize("cases", [8, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "fields", "kind"), MANGLED)
def test_mangled_files_are_taken_or_refused(tmp_path, name, fields, kind, cases):
    module = create(name, **{**SMALL, **fields})
    path, variables = tmp_path / "net.weights.h5", random_variables(module)
    if kind == "safetensors":
        path = without_description(saved(tmp_path, module)[0])
    elif kind == "keras_h5":
        keras_h5(path, module, variables)
    else:
        write_weights(path, module, variables)
    tensors, refused, rng = read_tensors(path).tensors, [], np.random.default_rng(0)
    for _ in range(cases):
        try:
            _inferred(path, TensorFile(kind, mangled(rng, tensors), {}), {}, [])
        except UserError as error:
            refused.append(str(error))
    assert refused
    assert max(map(len, refused)) < 4000
    assert not any("\n" in line for line in refused)


def describe(path, change):
    """Rewrites the description in a file's metadata."""
    file = read_tensors(path)
    about = json.loads(file.metadata[METADATA_KEY])
    change(about)
    save_file(dict(file.tensors), path, {METADATA_KEY: json.dumps(about)})


MODELS = "flax_resnet.models.resnet"
STRANGERS = ("subprocess:Popen", "os:system", "flax_resnet.training.config:TrainConfig",
             "experiments.speedrun:Triangle", f"{MODELS}:Layers", f"os.{MODELS}:ResNet",
             "flax_resnet.models.regularize:DropBlock")  # fmt: skip
BAD = [
    *(("module", change) for change in (
        {"class": 7}, {"block_cls": {"class_itself": f"{MODELS}:ResNet"}}, {"block_cls": {}},
        {"stem": {"class": "flax_resnet.optim:SGD"}}, {"depth": 3}, {"dtype": "float64"},
        *({"stage_sizes": v} for v in ([10**6], [1] * 10**5, [10**400], [-1], "x", [1e999], None)),
        *({"hidden_units": v} for v in ([1] * 10**5, ["x"])),
        *({"num_filters": v} for v in (10**12, 10**400, 0)),
        *({name: 10**30} for name in ("groups", "width_per_group", "num_classes", "se_reduction")),
    )),
    *(("preprocessing", change) for change in (
        *({"size": v} for v in (32.5, 10**400, "x", 10**6)), {"class": f"{MODELS}:ResNet"},
        *({"mean": v} for v in ([None] * 3, [1e999] * 3, "abc")), {"std": [0.0] * 3},
        *({"decoder": v} for v in ({}, "x")), {"interpolation": [1]}, {"unknown": 1},
    )),
]  # fmt: skip


@pytest.mark.parametrize(("part", "change"), BAD)
def test_descriptions_of_what_cannot_be_are_refused(tmp_path, part, change):
    path, _ = saved(tmp_path, create("resnet20", **SMALL), preprocessing=TORCH)
    describe(path, lambda about: about[part].update(change))
    with pytest.raises(UserError) as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", STRANGERS)
def test_descriptions_name_networks_of_this_library_only(tmp_path, name):
    both = {"class": f"{MODELS}:ResNet", "class_itself": name}
    for change in ({"class": name}, {"block_cls": {"class_itself": name}}, {"block_cls": both}):
        path, _ = saved(tmp_path, create("resnet20", **SMALL))
        describe(path, lambda about, change=change: about["module"].update(change))
        with pytest.raises(UserError, match=r"is no network or block of flax_resnet\.models"):
            read_weights(path)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"module": 7, "input_shape": [8, 8, 3]}'])
def test_descriptions_of_nothing_are_refused(tmp_path, text):
    path, _ = saved(tmp_path, create("resnet20", **SMALL))
    save_file(dict(read_tensors(path).tensors), path, {METADATA_KEY: text})
    with pytest.raises(UserError, match="description of the network cannot be read"):
        read_weights(path)


def test_class_names_cannot_steer_a_terminal(tmp_path):
    path, _ = saved(tmp_path, create("resnet20", **SMALL), class_names=tuple("abcdefg"))
    describe(path, lambda about: about.update(class_names=["\x1b]0;x\x07", "a\nb", *"cdefg"]))
    assert open_file(path).class_names[:2] == ("?]0;x?", "a?b")
    describe(path, lambda about: about.update(class_names=7))
    with pytest.raises(UserError, match="cannot be read"):
        open_file(path)


def test_the_wall_is_for_the_names_of_today(tmp_path, monkeypatch):
    """A network's older name is read; no older name opens a way to another class."""
    path, _ = saved(tmp_path, create("resnet20", **SMALL))
    describe(path, lambda about: about["module"].update({"class": "flax_resnet.old:Net"}))
    monkeypatch.setitem(MOVED_CLASSES, "flax_resnet.old:Net", f"{MODELS}:ResNet")
    assert type(read_weights(path)[0]).__name__ == "ResNet"
    monkeypatch.setitem(MOVED_CLASSES, "flax_resnet.old:Net", "flax_resnet.optim.optimizers:SGD")
    with pytest.raises(UserError, match=r"'flax_resnet.old:Net' is no network or block"):
        read_weights(path)
