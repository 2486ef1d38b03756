import numpy as np
import pytest
from PIL import Image

from flax_resnet import figures


@pytest.fixture
def drawn(monkeypatch):
    """The matplotlib figure that was saved last."""
    seen = []
    save = figures._save
    monkeypatch.setattr(
        figures, "_save", lambda figure, path: (seen.append(figure), save(figure, path))
    )
    return seen


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
    figures.confusion(counts, ["cat", "dog"], tmp_path / "confusion.png", "a title")
    axes = drawn[0].axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.8, 0.2], [0, 0]])
    assert {(t.get_position(), t.get_text()) for t in axes.texts} == {((0, 0), "8"), ((1, 0), "2")}
    assert [t.get_text() for t in axes.get_yticklabels()] == ["cat", "dog"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")


def test_confusion_of_many_classes_has_no_cell_text(tmp_path, drawn):
    names = [str(i) for i in range(100)]
    figures.confusion(np.eye(100, dtype=int), names, tmp_path / "confusion.png", "a title")
    assert not drawn[0].axes[0].texts
    assert len(drawn[0].axes[0].get_xticklabels()) < 20
