"""Runs side by side."""

import dataclasses
import json

import pytest
from helpers import assert_one_line_error

from experiments import digits
from flax_resnet import SGD, replaced
from flax_resnet.inspection.comparison import compare
from flax_resnet.training.workdir import write_record


@pytest.fixture
def runs(tmp_path):
    """Makes a run's record of a config, with a result."""

    def make(name, config, **result):
        workdir = tmp_path / name
        workdir.mkdir(parents=True)
        write_record(workdir, config)
        if result:
            (workdir / "result.json").write_text(json.dumps(result))
        return workdir

    return make


def cells(text, first):
    """The cells of the line that begins with ``first``."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_what_differs_and_what_came_of_it(runs):
    base = digits.get_config()
    other = dataclasses.replace(base, optimizer=SGD(learning_rate=0.03), seed=4)
    a = runs("a", base, top1=0.98, loss=0.07, train_top1=0.9, train_loss=0.3, step=690, seconds=9.5)
    b = runs("b", other, top1=0.955, loss=0.2, step=690, seconds=12)
    text = compare([a, b])
    assert cells(text, "config") == ["a", "b"]
    assert cells(text, "`optimizer.learning_rate`") == ["0.1", "0.03"]
    assert cells(text, "`optimizer.schedule`") == ["Cosine", "Constant"]
    assert "`seed`" not in text
    assert "batch_size" not in text
    assert cells(text, "evaluation top-1 (%)") == ["98.00", "95.50"]
    assert cells(text, "training loss (nats)") == ["0.3000", "-"]
    assert cells(text, "steps") == ["690", "690"]


def test_seeds_are_averaged_and_unfinished_runs_said(runs, tmp_path):
    base = digits.get_config()
    for seed, top1 in enumerate((0.9, 0.8)):
        runs(f"a/seed{seed}", replaced(base, "seed", seed), top1=top1, loss=0.1, step=5, seconds=1)
        late = replaced(replaced(base, "seed", seed), "batch_size", 32)
        runs(f"b/seed{seed}", late, **({"top1": 0.7, "loss": 0.1} if seed else {}))
    (tmp_path / "b" / "seed0" / "metrics.jsonl").write_text('{"step": 3, "split": "train"}\n')
    text = compare([tmp_path])
    assert cells(text, "`batch_size`") == ["64", "32"]
    assert cells(text, "evaluation top-1 (%)") == ["85.00 ± 7.07", "70.00"]
    assert cells(text, "runs finished") == ["2", "1 of 2"]
    assert f"{tmp_path / 'b' / 'seed0'} is not finished: at step 3" in text


def test_runs_of_one_name_are_told_apart_by_their_places(runs):
    found = [runs(f"{place}/run", digits.get_config()) for place in "xy"]
    text = compare(found)
    assert cells(text, "config") == [str(path) for path in found]
    assert cells(text, "no field") == ["the same", "the same"]
    assert text.count("before its first log line") == 2


def test_the_command(call, runs, tmp_path):
    base = digits.get_config()
    places = runs("a", base), runs("b", replaced(base, "seed", 1))
    assert call("compare", *places) == (0, compare(places), "")
    assert call("compare", *places, "--output", tmp_path / "t.md") == (0, "", "")
    assert (tmp_path / "t.md").read_text() == compare(places)
    assert_one_line_error(call("compare"), "no runs are given: expected two or more")
    assert_one_line_error(call("compare", places[0]), "one run alone; expected two or more")
    assert_one_line_error(call("compare", tmp_path / "nowhere", places[0]), "holds no run")
