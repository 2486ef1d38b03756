"""experiments.first_photographs: its folders are counted, its table is of the runs' records."""

import json

from experiments import first_photographs


def test_the_table_has_a_row_for_each_folder(tmp_path, monkeypatch, capsys):
    def train(command, **_):
        workdir = command[command.index("--workdir") + 1]
        for seed, top1 in enumerate((0.25, 0.75)):
            path = tmp_path / workdir / f"seed{seed}" / "result.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps({"top1": top1, "step": 400}))

    monkeypatch.setattr(first_photographs.subprocess, "run", train)
    first_photographs.main([str(tmp_path / "w"), "--before", "x"])
    head, _, *rows = capsys.readouterr().out.rstrip().splitlines()
    assert head.count("top-1") == 2
    run = " | 400 | 50.0 ± 35.4" * 2
    assert rows == [
        f"| digits, 20 a class | 10 | 200{run} |",
        f"| digits, 100 a class | 10 | 1000{run} |",
        f"| digits, all | 10 | 1797{run} |",
        f"| crops of two photographs --num-epochs 3 | 2 | 80{run} |",
        f"| crops of two photographs --data.image-size 64 | 2 | 80{run} |",
    ]
