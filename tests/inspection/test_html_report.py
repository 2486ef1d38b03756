"""One HTML file, valid, with every picture in it and nothing from outside."""

import base64
import html.parser
import io
import json
import shutil

import numpy as np
import pytest
from inspection_helpers import tiny_config, tiny_run
from PIL import Image

from flax_resnet.cli import reports
from flax_resnet.errors import UserError
from flax_resnet.inspection import PARTS, RateSearch, embed, html_report, lr_finder
from flax_resnet.models import cifar_resnet
from flax_resnet.records.configs import to_record

VOID = {"meta", "img", "br"}


class Page(html.parser.HTMLParser):
    """Checks that elements close, and collects what there is."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.images = [], [], [], []
        self.text = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        assert tag not in ("script", "link", "iframe")
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs["href"]] if "href" in attrs else []
        self.images += [(attrs["alt"], attrs["src"])] if "src" in attrs else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.text.setdefault(self.open[-1], []).append(data)


@pytest.fixture(scope="module")
def workdir(digits_dir, tmp_path_factory):
    copy = tmp_path_factory.mktemp("report") / "run <b>&"
    return shutil.copytree(tiny_run(digits_dir), copy)


@pytest.fixture(scope="module")
def page(workdir):
    found = RateSearch(
        np.geomspace(1e-3, 1, 9), np.linspace(2, 1, 9), np.linspace(2, 1, 9), 0.1, False
    )
    with pytest.MonkeyPatch.context() as patch:
        # Both are slow, and tested elsewhere.
        patch.setattr(lr_finder, "find_rate", lambda config, **options: found)
        patch.setattr(embed, "tsne", lambda features, seed: embed.pca(features))
        return Page(html_report.report(workdir, lr_finder=True))


def test_every_picture_is_in_the_file_and_decodes(page):
    headings = ["Curves", *(part.heading for part in PARTS.values())]
    assert [alt for alt, _ in page.images] == headings
    for _, source in page.images:
        head, _, data = source.partition(",")
        assert head == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
            image.load()
            assert min(image.size) > 200


def test_links_stay_inside(page):
    assert page.links == [f"#{anchor}" for anchor in page.ids]
    assert len(set(page.ids)) == len(page.ids) == len(PARTS) + 4


def test_numbers_config_and_environment_are_there(page, workdir):
    result = json.loads((workdir / "result.json").read_text())
    cells = page.text["td"]
    assert f"{100 * result['top1']:.2f} % of 355 images" in cells
    assert dict(zip(page.text["th"], cells, strict=True))["optimizer.learning_rate"] == "0.05"
    assert json.loads((workdir / "config.json").read_text())["starts"][0]["python"] in cells
    assert page.text["h1"] == ["ResNet on sklearn_digits, seed 3"]
    assert page.text["p"][0].endswith("run <b>&")  # as text, and not as an element
    assert "b" not in page.text
    assert any("surer than it is right" in text for text in page.text["figcaption"])
    assert "The smoothed loss falls fastest at a rate of 0.1." in page.text["figcaption"]


def test_without_data_the_rest_is_there(workdir, tmp_path):
    gone = shutil.copytree(workdir, tmp_path / "gone")
    record = json.loads((gone / "config.json").read_text())
    record["config"]["data"] |= {"name": "cifar10", "data_dir": str(tmp_path)}
    (gone / "config.json").write_text(json.dumps(record))
    (gone / "result.json").unlink()
    said = []
    found = Page(html_report.report(gone, say=said.append))
    assert [alt for alt, _ in found.images] == ["Curves", "First-layer filters"]
    head, *reasons = found.text["p"][1:]
    assert head == said[-1]
    assert head.startswith("Not drawn: Confusion matrix, Reliability, Worst-classified examples, ")
    assert "dataset 'cifar10' is not prepared in" in head
    assert reasons[0] == "No result: the run is not finished."
    assert len(reasons) == len(PARTS) - 1  # the finder is not asked for, the filters are there
    assert all(line.startswith("Not drawn: ") and "\n" not in line for line in reasons[1:])


def test_a_run_that_has_just_begun_has_a_report(tmp_path):
    config = tiny_config(None, model=cifar_resnet(20))
    (tmp_path / "config.json").write_text(json.dumps({"config": to_record(config), "starts": []}))
    found = Page(html_report.report(tmp_path))
    assert found.images == []
    assert found.text["h1"] == ["resnet20 on sklearn_digits, seed 3"]
    assert f"Not drawn: {tmp_path} has no lines in metrics.jsonl yet" in found.text["p"]
    with pytest.raises(UserError, match="holds no run"):
        html_report.report(tmp_path / "nowhere")


def test_command_writes_the_file_whole(call, workdir, tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(reports, "report", lambda _, **options: asked.update(options) or "page\n")
    code, out, _ = call("report", workdir, "--checkpoint", "latest", "--images", "a.png", "b")
    assert (code, out) == (0, f"report: {workdir / 'report.html'}\n")
    assert (workdir / "report.html").read_text() == "page\n"
    del asked["say"]
    wanted = {"checkpoint": "latest", "images": ("a.png", "b"), "lr_finder": False, "seed": 0}
    assert asked == {**wanted, "folder": None, "data_dir": None}
    code, _, error = call("report", tmp_path / "nowhere", "--output", tmp_path / "x.html")
    assert (code, error.count("\n")) == (2, 1)
    assert "holds no run" in error
    assert list(tmp_path.iterdir()) == []
