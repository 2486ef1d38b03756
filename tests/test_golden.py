"""Runs that commit c4826e5 wrote (tests/golden/write.py) are resumed, used and reported today."""

import dataclasses
import json
import pathlib
import tarfile

import numpy as np
import pytest
from helpers import max_difference

import flax_resnet
from flax_resnet.records.configs import from_record

OPTIMIZED = True  # compiled as the golden runs were, so that the numbers can be compared

ARCHIVE = pathlib.Path(__file__).parent / "golden" / "c4826e5.tar.xz"
PUSHED = "repository/model.safetensors"


@pytest.fixture
def golden(tmp_path, digits_dir, monkeypatch):
    """The golden runs, unpacked in the current directory, with the digits where they look."""
    assert ARCHIVE.stat().st_size < 1_000_000
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", digits_dir)
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def lines(workdir):
    """What a run has logged, without what depends on the machine's speed."""
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    speed = ("time", "images_per_second", "data_wait")
    return [{k: v for k, v in r.items() if k not in speed} for r in records]


def test_the_stopped_run_ends_where_the_finished_one_did(golden, mesh, call):
    stopped, finished = golden / "stopped", golden / "finished"
    assert {p.name for p in (stopped / "checkpoints").iterdir()} == {"46", "54"}
    config = from_record(json.loads((stopped / "config.json").read_text())["config"])
    result = flax_resnet.train_and_evaluate(config, stopped, mesh=mesh)
    expected = json.loads((finished / "result.json").read_text())
    assert result["step"] == expected["step"] == 115
    assert result["top1"] == pytest.approx(expected["top1"], abs=2 / 355)
    assert [r["step"] for r in lines(stopped)] == [r["step"] for r in lines(finished)]
    for ours, theirs in zip(lines(stopped), lines(finished), strict=True):
        assert ours == pytest.approx(theirs, abs=0.02), theirs["step"]
    assert call("convert", "stopped", "now.safetensors")[0] == 0
    now, then = (flax_resnet.read_weights(golden / name)[1] for name in ("now.safetensors", PUSHED))
    gap = max_difference(now, then)
    print(f"largest difference to c4826e5's parameters: {gap}")
    assert gap < 0.01  # 3e-7 on the same machine and jax 0.10; 0.0016 on jax 0.12
    again = json.loads((stopped / "config.json").read_text())
    assert len(again["starts"]) == 2
    assert from_record(again["config"]) == config


def test_the_best_checkpoint_of_the_stopped_run_is_used(golden, call):
    code, _, err = call("convert", "stopped", "stopped.safetensors")
    assert (code, err) == (0, "")
    module, variables = flax_resnet.read_weights("stopped.safetensors")
    assert (module.stage_sizes, module.num_filters) == ((1, 1), 4)
    assert max_difference(variables, flax_resnet.read_weights(PUSHED)[1]) > 0.01  # step 46, not 115
    assert all(np.isfinite(x).all() for x in variables["params"]["head"].values())


def test_the_finished_run_is_evaluated_as_it_was(golden, call):
    code, out, err = call("evaluate", "--weights", "finished", "--output", "now.json")
    assert (code, err) == (0, "")
    then, now = (json.loads((golden / n).read_text()) for n in ("evaluation.json", "now.json"))
    for name in ("top1", "top5", "n"):
        assert now[name] == then[name]
    for name in ("loss", "calibration_error", "brier"):
        assert now[name] == pytest.approx(then[name], rel=1e-4)
    assert "73.52 %" in out


@pytest.mark.parametrize("weights", ["finished", PUSHED])
def test_it_predicts_what_it_did(golden, call, weights):
    code, out, _ = call("predict", "zero.png", "--weights", weights, "--format", "json")
    then, now = json.loads((golden / "prediction.json").read_text()), json.loads(out)
    assert code == 0
    assert now["classes"] == then["classes"]
    np.testing.assert_allclose(now["probabilities"], then["probabilities"], rtol=1e-4)


def test_it_is_reported_and_compared(golden, call):
    assert call("report", "finished")[0] == 0
    page = (golden / "finished" / "report.html").read_text()
    assert "73.52" in page
    code, out, _ = call("compare", "finished", "finished")
    assert code == 0
    assert "73.52" in out


def test_it_is_exported_and_converted(golden, call):
    assert call("convert", "finished", "now.safetensors")[0] == 0
    then, now = (flax_resnet.read_weights(name) for name in (PUSHED, "now.safetensors"))
    assert dataclasses.asdict(then[0]) == dataclasses.asdict(now[0])
    assert max_difference(then[1], now[1]) == 0
    assert call("export", "finished", "program")[0] == 0
    assert any((golden / "program").iterdir())
