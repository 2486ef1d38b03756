"""experiments.plots draws what it is asked for, from workdirs alone."""

import json
import shutil

import numpy as np
import pytest
from inspection_helpers import tiny_config, tiny_run
from PIL import Image

from experiments import plots
from flax_resnet.models import cifar_resnet
from flax_resnet.records.configs import to_record
from flax_resnet.studies import tables


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Two connections, two depths, two seeds: records, curves and a table; one run failed."""
    root, rows = tmp_path_factory.mktemp("sweep"), []
    for connection in ("plain", "residual"):
        for depth in (20, 56):
            for seed in range(2):
                name = f"{connection}{depth}/seed{seed}"
                (root / name).mkdir(parents=True)
                config = tiny_config(
                    None, model=cifar_resnet(depth, connection=connection), seed=seed
                )
                record = {"config": to_record(config), "starts": []}
                (root / name / "config.json").write_text(json.dumps(record))
                lines = [
                    {"split": split, "step": 10 * i, "epoch": i, "loss": 1 / i, "top1": 1 - 0.5 / i}
                    for split in ("train", "eval")
                    for i in range(1, 4)
                ]
                text = "".join(json.dumps(line) + "\n" for line in lines)
                (root / name / "metrics.jsonl").write_text(text)
                failed = name == "residual56/seed1"
                rows.append({"variant": f"{connection}{depth}", "seed": seed,
                             "state": "failed" if failed else "finished",
                             "top1": "" if failed else 0.9 + seed / 100, "loss": 0.3,
                             "train_top1": 0.95, "train_loss": 0.1, "workdir": name})  # fmt: skip
    tables.write(rows, root)
    return root


def command(capsys, *argv):
    """(exit status, stdout, stderr)."""
    capsys.readouterr()
    try:
        plots.main([str(a) for a in argv])
        code = 0
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


@pytest.fixture
def titles(monkeypatch):
    """Titles of what figures are asked to draw; nothing is drawn."""
    seen = []
    for name in ("bands", "training_and_test", "error_by_depth"):
        monkeypatch.setattr(
            plots.study_figures,
            name,
            lambda what, path, title, *x, n=name: seen.append((n, what, title, *x)),
        )
    return seen


def test_studies_of_a_sweep(sweep, titles, capsys):
    of = "plain20, plain56, resnet20, resnet56 on sklearn_digits, n = 8 runs"
    assert command(capsys, "curves", sweep)[:2] == (0, f"figure: {sweep}/plots/curves.png\n")
    assert command(capsys, "paper", sweep / "plain20", sweep / "residual56")[0] == 0
    assert command(capsys, "depth", sweep, "--title", "a title")[0] == 0
    assert command(capsys, "curves", sweep / "plain20/seed1", "--x", "step")[0] == 0
    assert command(capsys, "depth", sweep, "--by", "seed")[0] == 0
    curves, paper, depth, one, by = titles
    assert {name: len(runs) for name, runs in by[1].items()} == {"seed 0": 4, "seed 1": 3}
    assert curves[0], curves[2:] == ("bands", (of, "epoch"))
    assert [(g.name, len(g.runs)) for g in curves[1]] == [
        ("plain20", 2), ("plain56", 2), ("residual20", 2), ("residual56", 2),
    ]  # fmt: skip
    assert (paper[0], [g.name for g in paper[1]]) == (
        "training_and_test", ["plain20", "residual56"],
    )  # fmt: skip
    assert paper[2:] == ("plain20, resnet56 on sklearn_digits, n = 4 runs", "step")
    assert depth[2] == "a title"
    assert [layers for layers, *_ in depth[1]["residual"]] == [20, 20, 56]
    assert sorted(depth[1]["plain"]) == pytest.approx(
        np.array([(20, 9, 5), (20, 10, 5), (56, 9, 5), (56, 10, 5)])
    )
    assert (len(one[1]), *one[2:]) == (1, "plain20 on sklearn_digits, n = 1 run", "step")


@pytest.fixture
def unfinished(sweep, tmp_path):
    """The sweep, with plain56's second seed in its first epoch."""
    root = tmp_path / "sweep"
    shutil.copytree(sweep, root)
    path = root / "plain56" / "seed1" / "metrics.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    return root


def test_a_run_without_evaluations_is_left_out_and_named(unfinished, titles, capsys):
    code, _, error = command(capsys, "curves", unfinished)
    young = unfinished / "plain56" / "seed1"
    assert (code, error) == (0, f"left out {young}: it has no evaluation line yet\n")
    assert [len(group.runs) for group in titles[0][1]] == [2, 1, 2, 2]


def test_a_run_alone_is_drawn_with_what_it_has(unfinished, capsys):
    young = unfinished / "plain56" / "seed1"
    for what in ("curves", "paper"):
        figure = young / "plots" / f"{what}.png"
        assert command(capsys, what, young) == (0, f"figure: {figure}\n", "")
        assert figure.exists()


def test_seeds_beside_a_run_are_said_not_to_be_drawn(sweep, tmp_path, titles, capsys):
    root = shutil.copytree(sweep / "plain20", tmp_path / "run")
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(root / "seed0" / name, root)
    code, _, error = command(capsys, "curves", root)
    assert (code, error) == (
        0,
        f"{root} is a run itself, and is drawn; the 2 seeds in it are not\n",
    )
    assert [(group.name, len(group.runs)) for group in titles[0][1]] == [("run", 1)]


@pytest.mark.slow
def test_a_checkpoint_is_looked_into(digits_dir, tmp_path, photos, capsys):
    output = tmp_path / "cam.png"
    code, out, error = command(
        capsys, "gradcam", tiny_run(digits_dir), "--images", photos, "--checkpoint", "latest",
        "--count", "3", "--output", output,
    )  # fmt: skip
    assert (code, error) == (0, "")
    assert out.splitlines()[-1] == f"figure: {output}"
    with Image.open(output) as image:
        assert image.size[0] > image.size[1] > 200


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["curves"], "curves: no directory is given"),
        (["depth", "x", "y"], "depth is of one directory, 2 are given"),
        (["curves", "x", "--images", "y"], "--images is for maps, gradcam, not for curves"),
        (["tsne", "x", "--title", "y"], "--title is for curves, paper and depth, not for tsne"),
        (["curves", "young"], "young: no run has been evaluated yet"),
        (["depth", "sweep", "--by", "model.conection"], "(did you mean 'model.connection'?)"),
        (["depth", "sweep/plain20"], "sweep/plain20 holds no table.csv of a sweep"),
        (["curves", "sweep", "--output", "no/such/x.png"], "x.png cannot be written"),
    ],
)
def test_bad_input_is_one_line(argv, line, sweep, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep").symlink_to(sweep)
    (tmp_path / "young").mkdir()
    shutil.copy(sweep / "plain20/seed0/config.json", "young")
    code, _, error = command(capsys, *argv)
    assert code == 2
    assert line in error
    *left_out, last = error.splitlines()
    assert last.startswith("error: ")
    assert all(line.startswith("left out ") for line in left_out)
