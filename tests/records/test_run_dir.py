"""What a run's directory holds is read back, and what it should not hold is one line."""

import pytest

from flax_resnet.errors import UserError
from flax_resnet.records.run_dir import (
    CONFIG,
    METRICS,
    RESULT,
    finished,
    read_config,
    read_json,
    read_metrics,
    read_record,
    variants,
    write_json,
)
from flax_resnet.training.config import TrainConfig
from flax_resnet.training.workdir import write_record


def test_what_is_written_is_read(tmp_path):
    write_record(tmp_path, TrainConfig(seed=5))
    record = read_record(tmp_path)
    assert read_config(tmp_path) == TrainConfig(seed=5)
    assert (record["config"]["seed"], len(record["starts"])) == (5, 1)
    assert finished(tmp_path) is None
    write_json(tmp_path / RESULT, {"top1": 0.5})
    assert finished(tmp_path) == {"top1": 0.5}
    assert read_metrics(tmp_path) == []
    (tmp_path / METRICS).write_text('{"step": 5}\n{"st')  # cut off by a crash
    assert read_metrics(tmp_path) == [{"step": 5}]


NO_CLASS = '{"config": {"class": "flax_resnet.config:Odd"}, "starts": []}'


@pytest.mark.parametrize(
    ("read", "file", "text", "message"),
    [
        (read_config, CONFIG, None, "holds no run: expected a config.json there"),
        (read_config, CONFIG, "", "config.json is not a run's record (JSONDecodeError('Expecting"),
        (read_config, CONFIG, "null", "config.json is not a run's record (TypeError("),
        (read_config, CONFIG, "{}", "config.json is not a run's record (KeyError('config'))"),
        (read_config, CONFIG, '{"config": {}, "starts": []}', "record (KeyError('class'))"),
        (read_config, CONFIG, '{"config": {"class": ""}}', "record (KeyError('starts'))"),
        (read_config, CONFIG, NO_CLASS, "class 'flax_resnet.config:Odd' is not known"),
        (read_config, CONFIG, b"\xff", "config.json is not a run's record (UnicodeDecodeError("),
        (finished, RESULT, '{"top1": 0.', "result.json is not a run's record (JSONDecodeError("),
        (finished, RESULT, "7", "result.json is not a run's record (TypeError("),
        (read_metrics, METRICS, b"\xff", "jsonl is not a run's record (UnicodeDecodeError("),
    ],
)
def test_bad_files_are_one_line(tmp_path, read, file, text, message):
    if text is not None:
        (tmp_path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        read(tmp_path)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value) or text == NO_CLASS
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_none(tmp_path):
    assert read_json(tmp_path / "tracking.json") is None
    (tmp_path / "file").touch()
    assert read_json(tmp_path / "file" / CONFIG) is None


def test_variants_of_a_sweep_are_by_name_and_their_seeds_by_number(tmp_path):
    for name in ("b/seed0", "a/seed10", "a/seed9"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").touch()
    nine, ten = tmp_path / "a/seed9", tmp_path / "a/seed10"
    assert variants(tmp_path) == [("a", [nine, ten]), ("b", [tmp_path / "b/seed0"])]
    assert variants(tmp_path / "a") == [("a", [nine, ten])]
    assert variants(nine) == [("seed9", [nine])]
