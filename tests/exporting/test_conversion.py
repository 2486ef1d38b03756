import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_one_line_error, assert_trees_equal
from prediction_helpers import NAMES, SQUARE, make_weights

from flax_resnet import models
from flax_resnet.weights import open_weights, write_weights


def zero_weights(path, name, **fields):
    """Writes a named network's variables, each its own constant, and returns them."""
    module = models.create(name, **fields)
    images = jax.ShapeDtypeStruct((1, *models.default_shape(module)), jnp.float32)
    shapes, treedef = jax.tree.flatten(models.variable_shapes(module, images))
    arrays = [np.full(s.shape, i, s.dtype) for i, s in enumerate(shapes)]
    variables = jax.tree.unflatten(treedef, arrays)
    write_weights(path, module, variables)
    return variables


def test_a_file_keeps_everything(call, tmp_path):
    module, variables = make_weights(tmp_path / "a.safetensors")
    code, out, err = call("convert", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert (code, err) == (0, "")
    count = sum(x.size for x in jax.tree.leaves(variables["params"]))
    assert out == f"ResNet, {count:,} parameters, written to {tmp_path / 'b.safetensors'}\n"
    opened = open_weights(tmp_path / "b.safetensors")
    assert (opened.preprocessing, opened.class_names) == (SQUARE, NAMES)
    assert opened.module == module
    assert_trees_equal(opened.variables, dict(variables))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_flags_change_what_is_kept(call, tmp_path):
    make_weights(tmp_path / "a.safetensors", preprocessing=None)
    arguments = ("convert", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    code, _, err = call(*arguments, "--size", 9, "--mean", 0.5, "--std", 0.25)
    assert code == 0, err
    kept = open_weights(tmp_path / "b.safetensors").preprocessing
    assert (kept.size, kept.resize, kept.mean, kept.std) == (9, None, (0.5,), (0.25,) * 3)


@pytest.mark.filterwarnings("ignore:.*how images are prepared:UserWarning")
def test_keras_and_back(call, tmp_path):
    first, keras, last = (tmp_path / n for n in ("a.safetensors", "k.weights.h5", "b.safetensors"))
    variables = zero_weights(first, "ResNet50V2", num_classes=3, num_filters=1, stage_sizes=(2, 2))
    assert call("convert", first, keras)[0] == 0
    assert call("convert", keras, last)[0] == 0
    assert_trees_equal(open_weights(last).variables, dict(variables))


def test_what_is_there_is_kept_unless_told(call, tmp_path):
    make_weights(tmp_path / "a.safetensors")
    there = tmp_path / "b.safetensors"
    there.write_text("mine")
    arguments = ("convert", tmp_path / "a.safetensors", there)
    assert_one_line_error(call(*arguments), f"{there} is there already: give another name, or")
    assert there.read_text() == "mine"
    assert call(*arguments, "--overwrite")[0] == 0
    assert open_weights(there).class_names == NAMES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{source}", "{tmp}/x.pth"], "x.pth: expected a name that ends in .safetensors or .weig"),
        (["{source}", "{tmp}/x.weights.h5"], "the network is not one of Keras's"),
        (["{source}", "{tmp}/none/x.safetensors"], "cannot be written"),
        (["{source}", "{tmp}/x.safetensors", "--model", "resnet50"], "are not of resnet50"),
    ],
)
def test_bad_input_is_one_line(call, tmp_path, arguments, message):
    source = tmp_path / "source.safetensors"
    make_weights(source)
    result = call("convert", *[a.format(source=source, tmp=tmp_path) for a in arguments])
    assert_one_line_error(result, message)
    assert not (tmp_path / "x.safetensors").exists()
