"""What is drawn is what was given, with units; no two texts of a figure touch."""

import errno
import itertools
import pathlib

import matplotlib
import numpy as np
import pytest
from matplotlib import font_manager
from matplotlib.text import Text
from PIL import Image

from experiments import study_figures
from experiments.study_figures import Group
from flax_resnet import figures
from flax_resnet.errors import UserError
from flax_resnet.figures import canvas


@pytest.fixture
def drawn(monkeypatch):
    """The matplotlib figures that were saved; no two texts in one overlap, and all are on it."""
    seen, boxes = [], {}
    save, draw = canvas.save, Text.draw

    def record(self, renderer, *args, **kwargs):
        if self.get_visible() and self.get_text():
            boxes[self] = self.get_window_extent(renderer).extents
        return draw(self, renderer, *args, **kwargs)

    def saved(figure, path):
        boxes.clear()
        save(figure, path)
        width, height = figure.get_size_inches() * canvas.DOTS_PER_INCH
        for text, (left, low, right, high) in boxes.items():
            inside = left > -1 and low > -1 and right < width + 1 and high < height + 1
            assert inside, f"{text.get_text()!r} is cut off"
        for (one, a), (other, b) in itertools.combinations(boxes.items(), 2):
            if one.get_rotation() == other.get_rotation() == 45:
                continue  # side by side, though the boxes around them are not
            apart = a[2] <= b[0] + 1 or b[2] <= a[0] + 1 or a[3] <= b[1] + 1 or b[3] <= a[1] + 1
            assert apart, f"{one.get_text()!r} lies over {other.get_text()!r}"
        seen.append(figure)

    monkeypatch.setattr(Text, "draw", record)
    monkeypatch.setattr(canvas, "save", saved)
    return seen


def legend_of(figure):
    return [t.get_text() for t in figure.legends[0].get_texts()]


def test_curves_show_both_splits_with_units(tmp_path, drawn):
    records = [
        {"split": "train", "epoch": e, "loss": 2 / e, "top1": 1 - 0.5 / e} for e in (1, 2, 3)
    ] + [{"split": "eval", "epoch": 3, "loss": 0.7, "top1": 0.75}]
    figures.curves(records, tmp_path / "curves.png", "a title")
    loss, error = drawn[0].axes
    assert (loss.get_xlabel(), loss.get_ylabel()) == ("epoch", "loss (nats)")
    assert (error.get_xlabel(), error.get_ylabel()) == ("epoch", "top-1 error (%)")
    assert [t.get_text() for t in loss.get_legend().get_texts()] == [
        "training (augmented)", "evaluation",
    ]  # fmt: skip
    np.testing.assert_allclose(error.lines[0].get_xydata(), [[1, 50], [2, 25], [3, 50 / 3]])
    np.testing.assert_allclose(error.lines[1].get_xydata(), [[3, 25]])
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (1350, 570)
    assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]


def test_confusion_shades_rows_and_prints_counts(tmp_path, drawn):
    counts = np.array([[8, 2], [0, 0]])
    figures.confusion(counts, ["cat", "$dog$"], tmp_path / "confusion.png", "a title")
    axes = drawn[0].axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.8, 0.2], [0, 0]])
    assert {(t.get_position(), t.get_text()) for t in axes.texts} == {((0, 0), "8"), ((1, 0), "2")}
    assert [t.get_text() for t in axes.get_yticklabels()] == ["cat", r"\$dog\$"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")


def test_confusion_of_long_names_does_not_overlap(tmp_path, drawn):
    names = [f"a rather long name of class {i}" for i in range(12)]
    figures.confusion(np.full((12, 12), 88), names, tmp_path / "c.png", "long " * 40)
    assert [t.get_text()[-1] for t in drawn[0].axes[0].get_xticklabels()] == ["…"] * 12


def test_reliability_draws_the_bins_that_have_examples(tmp_path, drawn):
    confidence, correct = np.array([0, 0.4, 0.9]), np.array([0, 0.5, 0.8])
    figures.reliability(confidence, correct, np.array([0, 10, 30]), tmp_path / "r.png", "a title")
    above, below = drawn[0].axes
    assert [(b.get_x(), b.get_height()) for b in above.patches] == [
        (pytest.approx(1 / 3), 0.5), (pytest.approx(2 / 3), 0.8),
    ]  # fmt: skip
    np.testing.assert_allclose(above.lines[1].get_xydata(), [[0.4, 0.5], [0.9, 0.8]])
    assert [b.get_height() for b in below.patches] == [0, 25, 75]
    assert (above.get_ylabel(), below.get_ylabel()) == ("top-1 accuracy (share)", "examples (%)")
    assert below.get_xlabel() == "confidence (largest probability)"
    assert len(above.get_legend().get_texts()) == 3


def test_learning_rates_marks_the_suggestion(tmp_path, drawn):
    rates = np.geomspace(1e-4, 1, 5)
    losses = np.array([2.3, 2.2, 1.5, 1.4, 9.0])
    figures.learning_rates(rates, losses, losses, 0.01, tmp_path / "lr.png", "a title")
    (axes,) = drawn[0].axes
    assert axes.get_xscale() == "log"
    np.testing.assert_allclose(axes.lines[1].get_xdata(), rates)
    assert legend_of(drawn[0])[-1] == "steepest descent: 0.01"
    assert axes.get_ylim()[1] < 4


def run(errors, steps, offset=0.0):
    """metrics.jsonl of a run: the same steps trained and evaluated."""
    return [
        {"split": split, "step": s, "epoch": s / 10, "loss": e + offset, "top1": 1 - e - offset}
        for split in ("train", "eval")
        for s, e in zip(steps, errors, strict=True)
    ]


def test_average_is_numpys_over_common_steps():
    runs = (run([0.9, 0.5, 0.2], [10, 20, 30]), run([0.7, 0.6], [10, 20]),
            run([0.8, 0.1, 0.4], [10, 15, 20]))  # fmt: skip
    values = np.array([[90, 50], [70, 60], [80, 40]])
    places, mean, spread = study_figures.average(Group("g", runs), "eval", "step", "error")
    np.testing.assert_array_equal(places, [10, 20])
    np.testing.assert_allclose(mean, values.mean(axis=0))
    np.testing.assert_allclose(spread, values.std(axis=0, ddof=1))
    places, mean, spread = study_figures.average(Group("g", runs[:1]), "train", "epoch", "loss")
    np.testing.assert_allclose([places, mean, spread], [[1, 2, 3], [0.9, 0.5, 0.2], [0, 0, 0]])


def test_runs_that_cannot_be_averaged_are_one_line():
    apart = Group("deep", (run([0.9], [10]), run([0.9], [15])))
    with pytest.raises(UserError, match=r"deep: its 2 runs have no evaluation line at the same st"):
        study_figures.average(apart, "eval", "step", "loss")
    young = Group("young", ([{"split": "train", "step": 1, "epoch": 1, "loss": 1, "top1": 0}],))
    with pytest.raises(UserError, match="young: a run of it has no evaluation line yet"):
        study_figures.average(young, "eval", "step", "loss")


def two_groups():
    steps = [1000, 2000, 3000]
    return [
        Group("plain56", tuple(run([0.5, 0.3, 0.2], steps, s / 100) for s in range(3))),
        Group("resnet56", (run([0.4, 0.2, 0.1], steps),)),
    ]


def test_bands_show_mean_and_deviation(tmp_path, drawn):
    study_figures.training_and_test(two_groups(), tmp_path / "p.png", "a title")
    study_figures.bands(two_groups(), tmp_path / "b.png", "a title", "step")
    looks = [(line.get_linestyle(), line.get_linewidth()) for line in drawn.pop(0).axes[0].lines]
    assert looks == [("--", 0.9), ("-", 2.2)] * 2
    loss, error = drawn[0].axes
    assert (loss.get_xlabel(), loss.get_ylabel()) == ("step (optimizer updates)", "loss (nats)")
    assert error.get_ylabel() == "top-1 error (%)"
    np.testing.assert_allclose(error.lines[1].get_ydata(), [51, 31, 21])
    band = error.collections[1].get_paths()[0].vertices
    assert {round(float(y), 6) for x, y in band if x == 2000} == {30.0, 32.0}
    assert len(error.collections) == 2  # of the one run there is no band
    assert legend_of(drawn[0]) == ["plain56, 3 runs", "resnet56, 1 run", "training (augmented)",
                                   "evaluation", "± 1 standard deviation over seeds"]  # fmt: skip


def test_error_by_depth_averages_runs_of_a_depth(tmp_path, drawn):
    points = {"plain": [(56, 14.0, 9.0), (20, 8.0, 4.0), (20, 10.0, None)],
              "residual": [(20, 8.0, 3.0), (56, 6.0, 2.0), (110, 6.0, 1.0)]}  # fmt: skip
    study_figures.error_by_depth(points, tmp_path / "d.png", "a title")
    (axes,) = drawn[0].axes
    lines = [c.lines[0].get_xydata().tolist() for c in axes.containers]
    assert lines[:2] == [[[20, 4], [56, 9]], [[20, 9], [56, 14]]]
    bars = axes.containers[1].lines[2][0].get_segments()
    np.testing.assert_allclose(bars[0][:, 1], [9 - 2**0.5, 9 + 2**0.5])
    assert axes.get_xlabel() == "depth (weighted layers)"
    assert [t.get_text() for t in axes.get_xticklabels()] == ["20", "56", "110"]
    assert legend_of(drawn[0]) == ["plain, 3 runs", "residual, 3 runs", "test error",
                                   "training error (augmented)",
                                   "standard deviation over seeds"]  # fmt: skip


def test_filters_are_scaled_each(tmp_path, drawn, rng):
    kernel = rng.normal(size=(3, 3, 1, 5))
    figures.filters(kernel, tmp_path / "f.png", "a title")
    tiles = [axes.images[0].get_array() for axes in drawn[0].axes[:5]]
    for index, tile in enumerate(tiles):
        want = kernel[..., 0, index] / np.abs(kernel[..., 0, index]).max()
        np.testing.assert_allclose(tile, want)
    assert drawn[0].axes[-1].get_ylabel().startswith("weight, in shares")
    figures.filters(rng.normal(size=(7, 7, 3, 20)), tmp_path / "f.png", "a title")
    colored = np.stack([axes.images[0].get_array() for axes in drawn[1].axes[:20]])
    np.testing.assert_allclose(colored.min(axis=(1, 2, 3)), 0)
    np.testing.assert_allclose(colored.max(axis=(1, 2, 3)), 1)


def test_maps_show_the_strongest_channels(tmp_path, drawn, rng):
    stages = {"stage1": rng.random((8, 8, 3)), "stage2": rng.random((4, 4, 16))}
    image = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    figures.maps(image, stages, tmp_path / "m.png", "a title")
    grid = np.array(drawn[0].axes[:18]).reshape(2, 9)
    np.testing.assert_array_equal(grid[0, 0].images[0].get_array(), image)
    order = np.argsort(-stages["stage2"].mean(axis=(0, 1)))[:8]
    assert [a.get_title() for a in grid[1, 1:]] == [f"channel {c}" for c in order]
    np.testing.assert_array_equal(grid[1, 1].images[0].get_array(), stages["stage2"][..., order[0]])
    assert grid[1, 1].get_ylabel() == "stage2\n4 x 4"
    assert not grid[0, 4].images
    assert drawn[0].axes[-1].get_ylabel() == "activation"


def test_attention_lies_over_its_image(tmp_path, drawn, rng):
    images = rng.integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)
    heat = rng.random((5, 8, 8))
    names = [f"a long file name that has to be cut {i}.jpg\nsays: {i}" for i in range(5)]
    figures.attention(images, heat, names, tmp_path / "a.png", "a title")
    axes = drawn[0].axes
    np.testing.assert_array_equal(axes[2].images[0].get_array(), images[1, ..., 0])
    np.testing.assert_array_equal(axes[3].images[1].get_array(), heat[1])
    assert [a.get_title(loc="left").split("\n")[-1] for a in axes[:8:2]] == [
        f"says: {i}" for i in range(4)
    ]
    assert axes[-1].get_ylabel() == "Grad-CAM,\nin shares of its largest"


@pytest.mark.parametrize("classes", [3, 30])
def test_scatter_says_which_class_is_which(classes, tmp_path, drawn, rng):
    points, labels = rng.normal(size=(60, 2)), np.arange(60) % classes
    names = [f"class {i}" for i in range(classes)]
    figures.scatter(points, labels, names, ("one", "two"), tmp_path / "s.png", "a title")
    axes = drawn[0].axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("one", "two")
    if classes == 3:
        np.testing.assert_allclose(axes.collections[1].get_offsets(), points[labels == 1])
        assert legend_of(drawn[0]) == names
    else:
        assert drawn[0].axes[1].get_ylabel() == "true class (0 to 29)"


def test_examples_and_rows_have_their_texts(tmp_path, drawn, rng):
    images = rng.integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
    texts = [f"true: a class of a long name {i}\nsays: another class with one" for i in range(7)]
    figures.examples(images, texts, tmp_path / "e.png", "a title")
    np.testing.assert_array_equal(drawn[0].axes[6].images[0].get_array(), images[6])
    assert drawn[0].axes[6].get_title().startswith("true: a class of a")
    draws = np.stack([images[:2] // d for d in (1, 2, 3)])
    mixed = [["0.7 + 0.3 dog", ""]] * 3
    figures.rows(images[:2], draws, ["cat", "automobile"], mixed, tmp_path / "r.png", "a title")
    axes = np.array(drawn[1].axes).reshape(2, 4)
    np.testing.assert_array_equal(axes[1, 3].images[0].get_array(), images[1] // 3)
    assert [a.get_title() for a in axes[0]] == ["original: cat", *["0.7 + 0.3 dog"] * 3]
    assert axes[1, 2].get_title() == "draw 2"


@pytest.mark.parametrize(
    "name", ["caf\udce9", "$x", "a$b_{$", "$\\frac$", "a\\$", "_x", "\t", "%s"]
)
def test_any_class_name_is_drawn(tmp_path, drawn, name):
    names = [name, "b"]
    figures.confusion(np.eye(2, dtype=int), names, tmp_path / "a.png", f"{name} in {name}")
    figures.scatter(np.eye(2), np.arange(2), names, ("x", "y"), tmp_path / "b.png", name)
    figures.examples(np.zeros((2, 8, 8, 3), np.uint8), names, tmp_path / "c.png", name)
    assert len(drawn) == 3
    assert drawn[0].axes[0].get_xticklabels()[0].get_text() == canvas.plain(name)
    assert legend_of(drawn[1]) == [canvas.plain(name), "b"]


def test_a_character_is_drawn_with_a_font_that_has_it_or_boxes_are_said_once(
    tmp_path, monkeypatch, capsys
):
    canvas._say_boxes.cache_clear()
    font = str(pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf", "STIXGeneral.ttf"))
    default = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    codes = font_manager.get_font(font).get_charmap()
    character = next(chr(c) for c in codes if c > 127 and not default.get_char_index(c))
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(tmp_path / "damaged.ttf")])
    for _ in range(2):
        figures.confusion(np.eye(2, dtype=int), ["雪", character], tmp_path / "a.png", "boxes")
    error = capsys.readouterr().err
    assert error.startswith("boxes stand for ")
    assert ("雪" in error, character in error, error.count("\n")) == (True, True, 1)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [font])
    boxes = (tmp_path / "a.png").read_bytes()
    figures.confusion(np.eye(2, dtype=int), ["b", character], tmp_path / "a.png", "boxes")
    assert capsys.readouterr().err == ""
    assert (tmp_path / "a.png").read_bytes() != boxes


def test_a_picture_that_fails_is_one_line_and_a_full_disk_is_an_error(tmp_path, capsys):
    with figures.failure_as_one_line(tmp_path / "caf\udce9.png") as path:
        raise TypeError(f"no\nfont for {path.name}")
    assert capsys.readouterr().err == (
        f"{tmp_path}/caf\\xe9.png is not drawn (TypeError: no font for caf\\xe9.png); "
        "all else goes on\n"
    )
    with pytest.raises(OSError, match="space"), figures.failure_as_one_line(tmp_path):
        raise OSError(errno.ENOSPC, "no space")
