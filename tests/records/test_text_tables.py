import io
import sys

import pytest

from flax_resnet.records.text_tables import markdown_table, result_rows, say, show


def test_bars_in_cells_are_escaped():
    assert markdown_table(["x"], [["a|b"]]) == "| x |\n| --- |\n| a\\|b |\n"


def test_a_printed_table_has_every_row(capsys):
    show("a run", [("top-1", "99.00 %"), ("steps", 7)])
    out = capsys.readouterr().out
    assert "a run" in out
    assert [row.split("│")[1:3] for row in out.splitlines() if row.startswith("│")] == [
        [" top-1 ", " 99.00 % "],
        [" steps ", " 7       "],
    ]
    show("layers", [("a", 5), ("b", 10)], ("layer", "values"), numbers=1)
    assert "│ a     │      5 │" in capsys.readouterr().out


def test_the_numbers_of_a_result_as_text():
    run = {"top1": 0.98, "num_eval": 355, "loss": 0.07, "best_top1": 0.99, "best_step": 60,
           "step": 690, "epochs": 30.0, "seconds": 9.54, "parameters": 7}  # fmt: skip
    assert result_rows(run) == {
        "evaluation top-1": "98.00 % of 355 images",
        "evaluation loss": "0.0700 nats",
        "best top-1": "99.00 % at step 60",
        "steps": "690 (30 epochs)",
        "time": "9.5 s with compilation and evaluation",
    }
    found = {"top1": 0.5, "brier": 0.25, "n": 10, "seconds": 2.0}
    assert result_rows(found) == {
        "evaluation top-1": "50.00 % of 10 images",
        "Brier score": "0.2500",
        "time": "2.0 s (5 images a second)",
    }


@pytest.mark.parametrize("text", ["[draft]", "[/b]", "[red]x[/red]", ":smile:", "50 %s {x} \\["])
def test_a_table_shows_any_text_as_it_is(capsys, text):
    show(text, [(text, text)], (text, "b"))
    assert [line.count(text) for line in capsys.readouterr().out.splitlines()] == [1, 0, 1, 0, 2, 0]


@pytest.mark.parametrize(
    ("encoding", "printed"), [("utf-8", r"雪 caf\xe9 é"), ("ascii", r"\u96ea caf\xe9 \xe9")]
)
def test_what_the_terminal_cannot_show_is_escaped(monkeypatch, encoding, printed):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    say("雪 caf\udce9 é")
    show("t", [("雪 caf\udce9 é", "b")])
    assert stdout.buffer.getvalue().decode(encoding).count(printed) == 2
