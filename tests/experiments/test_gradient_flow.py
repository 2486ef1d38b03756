"""Gradient norms are those of jax.grad; the command writes them, a figure and a summary."""

import csv
import json

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import drawn, line_of_bad_input, tiny_resnet
from PIL import Image

from experiments import gradient_flow
from experiments.gradient_flow import digits_batch, gradient_norms
from flax_resnet.models import stack_blocks


def test_norms_equal_brute_force():
    batch = digits_batch(0, 6, 8)
    module = tiny_resnet(num_filters=4)
    variables = drawn(module, batch["image"])

    def loss(params):
        logits, _ = module.apply(
            {**variables, "params": params}, batch["image"], train=True, mutable=["batch_stats"]
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return jnp.mean(losses), logits

    grads, logits = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    norms = gradient_norms(module, variables, batch)
    ends = ("conv1/kernel", "conv2/kernel", "output")
    assert [name for name, _ in norms] == [f"stage1_block1/{end}" for end in ends]
    for name, norm in norms:
        if name.endswith("kernel"):
            block, conv, _ = name.split("/")
            want = jnp.linalg.norm(grads[block][conv]["kernel"].ravel())
            assert norm == pytest.approx(float(want), rel=1e-4)
    # The last block's output goes through a mean over its 8x8 pixels and the head.
    error = (jax.nn.softmax(logits) - jax.nn.one_hot(batch["label"], 10)) / 6
    by_features = error @ variables["params"]["head"]["kernel"].T
    by_output = jnp.broadcast_to(by_features[:, None, None] / 64, (6, 8, 8, 4))
    assert norms[-1][1] == pytest.approx(float(jnp.linalg.norm(by_output.ravel())), rel=1e-4)


def test_stacked_variables_give_the_same_norms():
    batch = digits_batch(0, 4, 8)
    module = tiny_resnet(stage_sizes=(12,), num_filters=2, norm_kind="none")
    variables = drawn(module, batch["image"])
    scanned = module.clone(scan_blocks=True)
    norms = gradient_norms(module, variables, batch)
    assert gradient_norms(scanned, stack_blocks(module, variables), batch) == norms
    blocks = [name.split("/")[0] for name, _ in norms if name.endswith("output")]
    assert blocks == [f"stage1_block{i}" for i in range(1, 13)]


def test_command_writes_figure_norms_and_summary(tmp_path, monkeypatch, capfd):
    run = [("stage1_block1/conv1/kernel", 8.0), ("stage1_block1/output", 4.0),
           ("stage1_block2/conv1/kernel", 2.0), ("stage1_block2/output", 0.5)]  # fmt: skip
    monkeypatch.setattr(gradient_flow, "measure", lambda module, settings: [run] * settings.seeds)
    gradient_flow.main(["--workdir", str(tmp_path / "w"), "--depths", "8", "14", "--seeds", "2"])
    out = capfd.readouterr().out.splitlines()
    start = "batch he_normal plain 8 first/last by kernel 4.0e+00 output 8.0e+00 ("
    assert out[0].startswith(start)
    assert len(out) == 12 + 1
    with (tmp_path / "w" / "gradient_norms.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 * 2 * len(run)
    assert rows[-1] == {
        "norm": "none", "init": "glorot_uniform", "connection": "highway", "depth": "14",
        "seed": "1", "name": "stage1_block2/output", "gradient_norm": "0.5",
    }  # fmt: skip
    record = json.loads((tmp_path / "w" / "result.json").read_text())
    assert record["settings"]["depths"] == [8, 14]
    ratios = [network["output"]["first_over_last"] for network in record["networks"]]
    assert ratios == pytest.approx([8.0] * 12)
    with Image.open(tmp_path / "w" / "gradient_flow.png") as image:
        assert image.size == (1650, 1200)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--depths", "9"], "depth 9 is not 6n + 2"),
        (["--depths"], "--depths: expected one or more"),
        (["--seeds", "0"], "--seeds=0: expected 1 or more"),
        (["--image-size", "12"], "--image-size 12: expected a multiple of 8"),
        (["--workdir", "file"], "cannot be made: File exists"),
    ],
)
def test_bad_input_is_one_line(argv, line, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    error = line_of_bad_input(gradient_flow.main, ["--workdir", str(tmp_path), *argv], capfd)
    assert line in error
    assert error.startswith("error: ")
