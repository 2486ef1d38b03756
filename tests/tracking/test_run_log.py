import json

from tensorboard_events import read_scalars

from flax_resnet.records.run_dir import read_metrics
from flax_resnet.tracking import run_log
from flax_resnet.tracking.run_log import RunLog, Timer

VALUES = {"loss": 0.5, "top1": 0.75, "images_per_second": 1234.5}


def test_run_log_writes_json_lines_events_and_plain_text(tmp_path, capsys):
    log = RunLog(tmp_path, 0, 20)
    log.write("train", 10, 1.0, VALUES)
    log.write("eval", 20, 2.0, {"loss": 0.25, "top1": 0.5})
    log.close()
    assert read_metrics(tmp_path) == [
        {"step": 10, "epoch": 1.0, "split": "train", **VALUES},
        {"step": 20, "epoch": 2.0, "split": "eval", "loss": 0.25, "top1": 0.5},
    ]
    assert capsys.readouterr().out.splitlines() == [
        "step 10/20 epoch 1.00 train: loss 0.5 top1 0.75 images_per_second 1234",
        "step 20/20 epoch 2.00 eval: loss 0.25 top1 0.5",
    ]
    assert read_scalars(tmp_path / "tensorboard") == {
        ("train/loss", 10): 0.5,
        ("train/top1", 10): 0.75,
        ("train/images_per_second", 10): 1234.5,
        ("eval/loss", 20): 0.25,
        ("eval/top1", 20): 0.5,
    }


def test_run_log_opened_at_a_step_drops_what_came_after(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "split": "train"}) + "\n" for step in (5, 10, 15)]
    path.write_text("".join(lines) + '{"step": 2')
    RunLog(tmp_path, 10, 20).close()
    assert path.read_text() == "".join(lines[:2])


def test_run_log_of_another_process_writes_nothing(tmp_path, capsys):
    log = RunLog(tmp_path, 0, 20, lead=False)
    log.write("train", 10, 1.0, VALUES)
    log.message("hello")
    log.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_timer_counts_the_wait_for_data(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(run_log.time, "perf_counter", lambda: now[0])

    def slow():
        for _ in range(4):
            now[0] += 1.0
            yield None

    timer = Timer()
    for _ in timer.waiting(slow()):
        timer.images += 8
        now[0] += 3.0
    assert timer.summary() == {"images_per_second": 2.0, "data_wait": 0.25}
    timer.reset()
    assert timer.summary()["images_per_second"] == 0.0
