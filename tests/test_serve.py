"""The demo page: what it computes, over HTTP, and in a browser."""

import contextlib
import dataclasses
import html
import io
import json
import os
import pathlib
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib

import jax
import numpy as np
import pytest
import requests
from flax import linen as nn
from helpers import QUICK, assert_one_line_error
from PIL import Image
from prediction_helpers import SQUARE, damaged, make_weights, paint

from experiments import digits
from flax_resnet import MiniModel, inspection, predict, replaced, serve, train_and_evaluate
from flax_resnet.augment import normalize
from flax_resnet.classify import Classifier
from flax_resnet.errors import UserError
from flax_resnet.pretrained import Pretrained, open_weights
from flax_resnet.serving import page
from flax_resnet.serving.answers import Answers, Limits, enlarged

ROOT = pathlib.Path(__file__).parents[1]
HOSTILE = tuple(f"<b>name {i}</b>" for i in range(10))
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    make_weights(path)
    return path


@pytest.fixture(scope="module")
def opened(weights):
    return open_weights(weights)


@pytest.fixture(scope="module")
def answers(opened):
    return Answers(Classifier.of(opened), Limits(megabytes=0.1, pixels=10_000))


def encoded(image, format="PNG", **options):
    held = io.BytesIO()
    image.save(held, format, **options)
    return held.getvalue()


def huge_png(width, height):
    """A PNG that says it is so large, with one byte of pixels."""
    found = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    for chunk in (b"IHDR" + header, b"IDAT" + zlib.compress(b"0"), b"IEND"):
        found += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return found


@pytest.mark.parametrize("name", ["a.jpg", "b.png", "e.png", "f.gif", "d.bmp"])
def test_answers_are_those_of_predict_to_the_last_bit(answers, opened, photos, name):
    (found,) = predict.predict(opened, [photos / name])
    answer = answers.read(photos / name)
    assert answer.probabilities == found.probabilities
    assert (answer.classes, answer.names) == (found.classes, found.names)
    np.testing.assert_array_equal(answer.pixels, opened.preprocessing((photos / name).read_bytes()))
    assert min(answer.decode_ms, answer.network_ms) > 0


def test_nothing_is_compiled_for_the_first_image(answers, photos):
    first = answers.read(photos / "a.jpg")
    sizes = predict.best_classes._cache_size(), inspection.layers._cam._cache_size()
    second = answers.read(photos / "b.png")
    for answer in (first, second):
        for index in answer.classes[:2]:
            answers.evidence(answer.pixels, index)
    assert sizes == (predict.best_classes._cache_size(), inspection.layers._cam._cache_size())
    assert sizes[0] > 0


def test_evidence_is_grad_cam_of_the_class_asked_for(answers, opened, photos):
    answer, of = answers.read(photos / "a.jpg"), answers.of
    images = normalize(answer.pixels[None], of.stats)
    under = enlarged(answer.pixels)
    assert under.shape == (256, 256, 3)
    np.testing.assert_array_equal(under[::32, ::32], answer.pixels)
    drawn = []
    for index in answer.classes[:2]:
        overlay = answers.evidence(answer.pixels, index).overlay.astype(int)
        maps, _, _ = inspection.grad_cam(of.module, of.variables, images, [index])
        (shares,) = inspection.heat(maps, 256, 256)
        hottest, coldest = np.unravel_index([shares.argmax(), shares.argmin()], shares.shape)
        hot, cold = 2 * overlay[hottest[0], coldest[0]], 2 * overlay[hottest[1], coldest[1]]
        hot -= under[hottest[0], coldest[0]]
        cold -= under[hottest[1], coldest[1]]
        assert hot[0] > 100 > hot[2]  # red, and blue below
        if shares.min() < 0.1:
            assert cold[2] > 100 > cold[0]
        drawn.append(overlay)
    assert not np.array_equal(*drawn)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"no picture", "it is none of BMP, GIF, JPEG, PNG"),
        (b"", "it is none of"),
        (bytes(104858), r"this file has 0\.1 MB: at most 0\.1 MB"),
        (huge_png(30_000, 30_000), "exceeds limit of"),
        (huge_png(10_000, 10_000), r"10000 x 10000 pixels: at most 0\.01 million are allowed"),
        (huge_png(101, 100), r"101 x 100 pixels: at most 0\.01 million"),
        (encoded(Image.new("RGB", (40, 40)), "EPS"), "it is none of"),
    ],
)
def test_bad_input_is_refused_before_it_is_decoded(answers, monkeypatch, data, message):
    def decode(self, data):
        raise AssertionError("it was decoded")

    monkeypatch.setattr(type(answers.of.preprocessing), "__call__", decode)
    with pytest.raises(UserError, match=message):
        answers(data)


def test_an_image_that_breaks_off_is_refused(answers, rng):
    data = encoded(paint(rng, 50, 60))
    assert answers(data).note == ""
    with pytest.raises(UserError, match="this image cannot be read"):
        answers(data[: len(data) // 2])


def test_of_an_animation_the_first_frame_counts(answers, rng):
    frames = [paint(rng, 20, 20).quantize() for _ in range(3)]
    moving = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    answer = answers(moving)
    np.testing.assert_array_equal(answer.pixels, answers(encoded(frames[0])).pixels)
    assert answer.note == "Only the first of its frames is used."


def test_a_turned_photograph_is_said_to_be(answers, rng):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = paint(rng, 20, 30)
    turned, plain = encoded(image, "JPEG", exif=exif), encoded(image, "JPEG")
    assert "EXIF" in answers(turned).note
    assert answers(plain).note == ""
    np.testing.assert_array_equal(answers(turned).pixels, answers(plain).pixels)


def test_equal_names_are_told_apart(opened, rng):
    same = dataclasses.replace(opened, class_names=("crane",) * 9 + ("heron",))
    names = Answers(Classifier.of(same), Limits(), top=10)(encoded(paint(rng, 9, 9))).names
    assert len(set(names)) == 10
    assert "heron" in names
    assert "crane (3)" in names


def test_weights_without_finite_outputs_are_refused_before_the_page_opens(weights):
    with pytest.raises(UserError, match="is not finite"):
        Answers(Classifier.of(open_weights(damaged(weights))), Limits())


class Flat(nn.Module):
    """No map in it."""

    @nn.compact
    def __call__(self, images, train=False):
        return nn.Dense(4, name="head")(images.reshape(len(images), -1))


def test_a_network_without_maps_has_no_grad_cam(rng):
    variables = Flat().init(jax.random.key(0), np.zeros((1, 8, 8, 3)))
    opened = Pretrained(Flat(), variables, preprocessing=SQUARE)
    flat = Answers(Classifier.of(opened), Limits())
    assert "has no maps" in flat.no_evidence
    assert len(flat(encoded(paint(rng, 9, 9))).classes) == 4


# Over HTTP.


@contextlib.contextmanager
def running(environment, arguments, cwd, before=""):
    """The command in a process of its own: (its address, its directory, the process)."""
    pytest.importorskip("gradio", reason="the page needs the [serve] extra", exc_type=ImportError)
    (cwd / "tmp").mkdir()
    # What a shell starts in the background ignores SIGINT.
    ignores = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)"
    code = f"{ignores}\n{before}\nfrom flax_resnet.command import command\ncommand()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "serve", *map(str, arguments), "--port", "0", "--no-browser"],
        cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment | QUICK | {"PYTHONPATH": str(ROOT), "TMPDIR": str(cwd / "tmp")},
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        assert " (Ctrl-C ends it)\n" in line, process.communicate()
        (directory,) = (cwd / "tmp").glob("flax_resnet_serve_*")
        yield line.split(" (Ctrl-C")[0].rsplit(" ", 1)[1], directory
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out.strip()) == (0, "stopped")
        # Gradio reports paths that were made up, and nothing else may go wrong.
        raised = [line for line in err.splitlines() if line and line[0] not in " T|"]
        assert all("InvalidPathError: Cannot move" in line for line in raised), err
        assert not directory.exists()
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def server(clean_environment, tmp_path_factory):
    """(address, the directory of its files, its weights)."""
    cwd = tmp_path_factory.mktemp("served")
    make_weights(cwd / "tiny.safetensors", class_names=HOSTILE)
    (cwd / "here.txt").write_text("secret")
    arguments = ["tiny.safetensors", "--max-mb", "0.1", "--max-pixels", "10000"]
    with running(clean_environment, arguments, cwd) as (url, directory):
        yield url, directory, cwd / "tiny.safetensors"


def ask(url, data, fn_index=0):
    """What the page's own script does: joins the queue, reads the events to the last one."""
    session = os.urandom(8).hex()
    body = {"data": data, "fn_index": fn_index, "session_hash": session}
    joined = requests.post(f"{url}/gradio_api/queue/join", json=body, timeout=30)
    assert joined.status_code == 200, joined.text
    parameters = {"session_hash": session}
    with requests.get(
        f"{url}/gradio_api/queue/data", params=parameters, stream=True, timeout=60
    ) as events:
        for line in events.iter_lines():
            event = json.loads(line[6:]) if line.startswith(b"data:") else {}
            if event.get("msg") == "process_completed":
                return event
    raise AssertionError("no answer")


def upload(url, name, data):
    return requests.post(f"{url}/gradio_api/upload", files={"files": (name, data)}, timeout=30)


def file_data(path, **more):
    return {"path": path, "meta": {"_type": "gradio.FileData"}, **more}


def shown(event):
    return json.dumps(event["output"], ensure_ascii=False)


@pytest.mark.parametrize("name", ["a.jpg", "b.png"])
def test_the_page_says_what_predict_prints(server, call, photos, name):
    url, _, weights = server
    (path,) = upload(url, name, (photos / name).read_bytes()).json()
    event = ask(url, [file_data(path, orig_name=name)])
    assert event["success"]
    code, out, _ = call("predict", photos / name, "--weights", weights)
    assert code == 0
    for line in out.splitlines()[1:]:
        p, label = line.strip().split("  ")
        assert label in HOSTILE
        assert f"<span>{html.escape(label)}</span><span>{p}</span>" in shown(event)
    assert "Grad-CAM " in shown(event)


def test_bad_uploads_are_answered_in_a_line_and_the_server_lives_on(server, photos):
    url, _, _ = server
    too_large = upload(url, "x.png", bytes(110_000))
    assert too_large.status_code == 413
    for data, said in [
        (b"no picture", "This image cannot be read: it is none of BMP"),
        (huge_png(101, 100), "This image has 101 x 100 pixels"),
    ]:
        (path,) = upload(url, "x.png", data).json()
        event = ask(url, [file_data(path)])
        assert event["success"]
        assert said in shown(event)
        assert "Traceback" not in shown(event)
    (path,) = upload(url, "a.jpg", (photos / "a.jpg").read_bytes()).json()
    assert "<ol>" in shown(ask(url, [file_data(path)]))


def test_files_of_the_machine_are_not_given(server, tmp_path):
    url, directory, weights = server
    outside = tmp_path / "outside.txt"
    outside.write_text("secret")
    around = f"{directory}/../../here.txt"
    for path in (
        "/etc/passwd",
        weights,
        weights.with_name("here.txt"),
        outside,
        around,
        "here.txt",
    ):
        for at in ("file=", "file/"):
            asked = requests.Request("GET", url).prepare()
            asked.url = f"{url}/gradio_api/{at}{path}"  # as it is: .. is not taken out
            with requests.Session() as session:
                assert session.send(asked, timeout=30).status_code in (403, 404)
        event = ask(url, [file_data(str(path))])
        assert not event["success"]
        assert "<ol>" not in shown(event)
    assert requests.get(f"{url}/", timeout=30).status_code == 200


def test_addresses_are_not_fetched(server):
    url, _, _ = server
    asked = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(2)

        def accept():
            with contextlib.suppress(OSError):
                other.accept()
                asked.set()

        waiting = threading.Thread(target=accept)
        waiting.start()
        address = f"http://127.0.0.1:{other.getsockname()[1]}/x.png"
        for data in (file_data(address), file_data(address, url=address)):
            event = ask(url, [data])
            assert not event["success"]
            assert "addresses are not fetched" in shown(event)
        waiting.join()
    assert not asked.is_set()


def test_only_requests_that_name_this_machine_are_answered(server):
    url, _, _ = server
    port = url.rsplit(":", 1)[1]
    for host, status in [(f"localhost:{port}", 200), (f"rebound.example:{port}", 400)]:
        assert requests.get(url, headers={"Host": host}, timeout=30).status_code == status


def test_there_are_no_endpoints_for_clients(server):
    url, _, _ = server
    info = requests.get(f"{url}/gradio_api/info", timeout=30).json()
    assert info == {"named_endpoints": {}, "unnamed_endpoints": {}}


def test_the_head_of_the_page_is_text():
    head = page._head(page.About("<b>tiny</b>", ("a & b", "<script>")))
    assert "<h1>&lt;b&gt;tiny&lt;/b&gt;</h1>" in head
    assert "a &amp; b · &lt;script&gt;" in head


@pytest.mark.slow
def test_uploads_are_deleted_and_examples_kept(digits_run, clean_environment, tmp_path, photos):
    before = "from flax_resnet.serving import page\npage.KEPT_SECONDS = page.SWEEP_SECONDS = 1"
    with running(clean_environment, [digits_run, "--examples", 3], tmp_path, before) as (url, own):
        (path,) = upload(url, "a.jpg", (photos / "a.jpg").read_bytes()).json()
        assert pathlib.Path(path).is_relative_to(own)
        time.sleep(4)
        assert not pathlib.Path(path).exists()
        kept = sorted((own / "examples").glob("*.png"))
        assert len(kept) == 3
        at = f"{url}/gradio_api/file={kept[0]}"
        assert requests.get(at, timeout=30).content == kept[0].read_bytes()
        # The first function is that of the examples.
        assert "<ol>" in shown(ask(url, [file_data(str(kept[0]))], fn_index=1))
        info = requests.get(f"{url}/gradio_api/info", timeout=30).json()
        assert info == {"named_endpoints": {}, "unnamed_endpoints": {}}


# The command.


def test_settings_of_gradio_in_the_environment_do_not_count(monkeypatch):
    monkeypatch.setenv("GRADIO_SHARE", "True")
    monkeypatch.setenv("NO_PROXY", "example.org")
    before = dict(os.environ)
    with serve.surroundings() as directory:
        assert "GRADIO_SHARE" not in os.environ
        assert os.environ["GRADIO_TEMP_DIR"] == str(directory)
        assert os.environ["NO_PROXY"] == "example.org,127.0.0.1,localhost,::1"
        assert directory.stat().st_mode & 0o077 == 0
    assert dict(os.environ) == before


def test_a_port_in_use_is_said_with_one_to_try(call, weights):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = call("serve", weights, "--port", port, "--no-browser")
        assert_one_line_error(result, f"port {port} of 127.0.0.1 cannot be used (Address already")
        free = int(result[2].rsplit("--port ", 1)[1])
        assert free > port
        with socket.create_server(("127.0.0.1", free)):
            pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected an argument, SOURCE"),
        (["w.safetensors", "--port", "70000"], "--port=70000: expected 0 or more, below 65536"),
        (["w.safetensors", "--max-mb", "0"], "--max-mb=0.0"),
        (["w.safetensors", "--max-pixels", "100000000"], "--max-pixels=100000000"),
        (["w.safetensors", "--host", "192.0.2.1"], "--host 192.0.2.1 cannot be listened on"),
        (["w.safetensors", "--host", "no.such.invalid"], "--host no.such.invalid is not known"),
    ],
)
def test_bad_flags_are_one_line(call, arguments, message):
    assert_one_line_error(call("serve", *arguments), message)


def test_without_gradio_the_extra_is_named(call, weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert_one_line_error(call("serve", weights, "--port", "0"), "pip install 'flax_resnet[serve]'")


@pytest.mark.parametrize(
    ("host", "local"), [("127.0.0.1", True), ("localhost", True), ("0.0.0.0", False)]
)
def test_loopback(host, local):
    assert serve.is_loopback(host) is local


@pytest.fixture(scope="module")
def digits_run(digits_dir, tmp_path_factory):
    """The working directory of a short run on the digits."""
    workdir = tmp_path_factory.mktemp("runs") / "digits"
    config = replaced(digits.get_config(), "data.data_dir", digits_dir)
    config = replaced(config, "model", MiniModel(num_classes=10, stage_sizes=(1,), num_filters=8))
    train_and_evaluate(dataclasses.replace(config, num_epochs=None, num_steps=4), workdir)
    return workdir


def test_a_run_is_described_and_gives_examples(digits_run, tmp_path):
    found, run = serve.about(open_weights(digits_run), str(digits_run))
    assert found.title == "mini on sklearn_digits"
    top1 = json.loads((digits_run / "result.json").read_text())["best_top1"]
    assert found.facts[1:3] == ("step 4", f"top-1 {100 * top1:.2f} % of 355 evaluation images")
    paths = serve.example_images(run, 3, tmp_path / "examples")
    images, labels = inspection.eval_images(run, [0, 177, 354])
    of = Classifier.of(open_weights(digits_run))
    for path, pixels, label in zip(paths, images, labels, strict=True):
        np.testing.assert_array_equal(of.preprocessing(path.read_bytes()), pixels)
        assert path.stem.endswith(f"_{label}")
    assert serve.example_images(run, 0, tmp_path / "none") == []


# In a browser.


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the [browser] extra")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_in_a_browser(server, browser, photos, tmp_path, width, height):
    url, _, weights = server
    opened = browser.new_page(viewport={"width": width, "height": height})
    requested, wrong = [], []
    opened.on("request", lambda request: requested.append(request.url))
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
    opened.goto(url)
    chooser = opened.locator("#image input[type=file]")
    chooser.set_input_files(str(photos / "a.jpg"))
    opened.locator("#overlay img").wait_for()
    answer = Answers(Classifier.of(open_weights(weights)), Limits()).read(photos / "a.jpg")
    listed = opened.locator("#classes li").all_inner_texts()
    ranked = zip(answer.names, answer.probabilities, strict=True)
    assert [line.split("\n") for line in listed] == [[name, f"{p:.4f}"] for name, p in ranked]
    assert opened.locator("#choice label").all_inner_texts() == list(answer.names)

    def picture(name):
        image = opened.locator(f"#{name} img")
        image.evaluate("i => i.decode()")
        return image.evaluate("i => [i.naturalWidth, i.naturalHeight, i.src]")

    first = picture("overlay")
    assert first[:2] == picture("seen")[:2] == [256, 256]
    opened.locator("#choice input").nth(1).check()
    opened.wait_for_function("s => document.querySelector('#overlay img').src != s", arg=first[2])
    assert picture("overlay")[:2] == [256, 256]
    opened.screenshot(path=tmp_path / "page.png", full_page=True)
    for part in ("#classes li", "#choice label", "#seen img", "#overlay img", "#timing span"):
        for box in [found.bounding_box() for found in opened.locator(part).all()]:
            assert box["x"] >= 0, part  # nothing sticks out sideways
            assert box["x"] + box["width"] <= width, part
    assert opened.locator("#timing span").count() == 3
    remove = "#image button[aria-label*=Remove], #image button[aria-label*=Clear]"
    opened.locator(remove).first.click()
    opened.locator("#classes li").first.wait_for(state="hidden")
    (photos / "bad.png").write_bytes(b"no picture")
    chooser.set_input_files(str(photos / "bad.png"))
    opened.get_by_role("alert").filter(has_text="This image cannot be read").wait_for()
    outside = [r for r in requested if not r.startswith((url, "data:", "blob:"))]
    assert (outside, wrong) == ([], [])
    assert len(requested) > 10
    opened.close()
