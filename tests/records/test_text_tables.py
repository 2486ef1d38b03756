from flax_resnet.records.text_tables import markdown_table, result_rows, show


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
