"""What --analyze says of a run's steps, and that it leaves nothing behind."""

import re

import jax
import pytest
from helpers import tiny_resnet

from experiments import digits
from flax_resnet.cli.experiment import main
from flax_resnet.data.config import DataConfig
from flax_resnet.distributed.sharding import data_mesh
from flax_resnet.errors import UserError
from flax_resnet.inspection import step_cost
from flax_resnet.models.summary import summarize
from flax_resnet.training.config import TrainConfig


@pytest.fixture(scope="module")
def config(digits_dir):
    data = DataConfig(data_dir=digits_dir)
    return TrainConfig(tiny_resnet(), data, batch_size=64, eval_batch_size=32)


@pytest.mark.parametrize("devices", [1, 2])
def test_what_the_steps_cost_is_in_proportion(config, devices):
    found = step_cost.analyze(config, data_mesh(jax.devices()[:devices]))
    macs = summarize(config.model, (8, 8, 1)).macs
    for name, images, flops in (("train", 64 // devices, 6), ("eval", 32 // devices, 2)):
        cells = found[name]
        assert cells["images"] == images
        counted = cells["GFLOP, by the network's multiply-adds"]
        assert counted == pytest.approx(flops * macs * images / 1e9)
        assert cells["GFLOP, by XLA"] == pytest.approx(counted, rel=20)
        assert cells["MB accessed"] > cells["MB of arguments"] > 0
        assert cells["seconds to compile"] > 0
    in_place = "MB of outputs in donated arguments' place"
    assert 0 < found["train"][in_place] <= found["train"]["MB of outputs"]
    assert found["eval"][in_place] == 0
    assert found["train"]["collectives"].endswith("all-reduce" if devices > 1 else "none")


def test_the_command_prints_a_table_and_leaves_nothing(config, tmp_path, capsys, digits_dir):
    argv = ["--analyze", "--workdir", str(tmp_path / "w"), "--data.data-dir", digits_dir,
            "--model.stage-sizes", "1", "--model.num-filters", "8"]  # fmt: skip
    before = set(tmp_path.rglob("*"))
    main(digits.get_config, "runs/digits", argv)
    assert set(tmp_path.rglob("*")) == before
    out = capsys.readouterr().out
    assert out.startswith("a step of ResNet on each of 8 x cpu")
    assert re.search(r"GFLOP, by XLA +│ +[\d.e-]+ │ +[\d.e-]+ │", out)
    assert re.search(r"collectives +│ +\d+ all-reduce", out)


def test_cached_features_are_not_analyzed(config):
    with pytest.raises(UserError, match="cache_features"):
        step_cost.analyze(
            TrainConfig(tiny_resnet(frozen_stages=1), config.data, cache_features=True)
        )
