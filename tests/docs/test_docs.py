"""The documentation builds strictly, and every code block of it runs.

Python blocks run as written. Commands run as written too, on small sets of the same names, and
those that train with the flags of SMALLER after their own, so that they take seconds.
"""

import contextlib
import json
import os
import pathlib
import re
import subprocess
import sys

import jax.numpy as jnp
import pytest
from docs_helpers import blocks, commands, module_of, small_photos, small_sets
from helpers import QUICK, drawn
from hub_server import Hub

import flax_resnet
from experiments import mnist_transfer
from flax_resnet.data import preparation

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
NOTEBOOK = DOCS / "tutorials" / "mnist_transfer.ipynb"
README = "../README.md"
PAGES = sorted(
    page.relative_to(DOCS).as_posix()
    for page in DOCS.rglob("*.md")
    if "_build" not in page.parts and any(b.language in ("python", "bash") for b in blocks(page))
)
QUICK_PAGES = ("index.md",)

FEW_STEPS = "--num-steps 2 --batch-size 8 --eval-batch-size 16 --log-every-steps 1"
NO_DOWNLOAD = "--weights None --normalization imagenet"
SHALLOW = "--model.stage-sizes 1 1 1 1 --model.num-filters 8"
TINY = "--data.image-size 8 --augment.pad-crop 1 --model.num-filters 4"
SMALLER = {
    "flax-resnet train": "--num-steps 12 --log-every-steps 6 --model.stage-sizes 1 1 1",
    "flax-resnet finetune": f"{FEW_STEPS} {NO_DOWNLOAD} {SHALLOW} --data.image-size 32",
    "experiments.digits": "--num-steps 12 --log-every-steps 6 --model.stage-sizes 1 1 1",
    "experiments.mnist_transfer": f"{FEW_STEPS} {NO_DOWNLOAD} {SHALLOW}",
    "experiments.finetune": f"{FEW_STEPS} {NO_DOWNLOAD} {SHALLOW} --data.image-size 32",
    "experiments.cifar10_mini": f"{FEW_STEPS} --model.stage-sizes 1 1 --model.num-filters 8",
    "experiments.cifar10_resnet": f"{FEW_STEPS} {TINY} --model.stage-sizes 1 1 1",
    "experiments.cifar10_plain": f"{FEW_STEPS} {TINY} --model.stage-sizes 1 1 1",
    "experiments.cifar10_highway": f"{FEW_STEPS} {TINY} --model.stage-sizes 1 1 1",
    "experiments.cifar10_preact": f"{FEW_STEPS} {TINY} --model.stage-sizes 2 2 2",
    "experiments.cifar100_dropblock": f"{FEW_STEPS} --model.stage-filters 4 4 4 4 "
    "--model.dense-features 8 8",
    "experiments.gradient_flow": "--depths 8 --seeds 1 --batch-size 4 --image-size 8",
    "experiments.ablations.depth": f"{FEW_STEPS} {TINY} --model.scan-blocks --seeds 1",
}
"""Flags that make a command short; the last of two counts."""
NEEDS = {
    "export.md": ("jax2onnx", "onnxruntime"),
    "hub.md": ("huggingface_hub",),
    "tracking.md": ("wandb",),
}
"""Packages of the extras that a page is about."""
MLFLOW = "tests/tracking/test_tracking.py runs MLflow's server"
CURL = commands(next(block for block in blocks(DOCS / "serve.md") if "curl" in block.text))

CANNOT_RUN = {
    "flax-resnet serve runs/digits": "waits for visitors; tests/test_serving.py is one",
    **dict.fromkeys(CURL, "asks a server; tests/test_serving.py runs them"),
    "mlflow server --host 127.0.0.1 --port 5000": MLFLOW,
    "flax-resnet train digits --tracking mlflow --tracking.uri http://127.0.0.1:5000 "
    "--workdir runs/mlflow": MLFLOW,
    "python -m venv .venv && . .venv/bin/activate": "the tests run in an environment already",
    "pip install -e .": "installs; .ci/run has it",
    "flax-resnet prepare mnist": "downloads, with TensorFlow",
    "flax-resnet predict PHOTO.jpg FOLDER --model resnet50 --weights imagenet --format "
    "csv --output top5.csv": "downloads ImageNet's weights",
    "python -m experiments.cifar10_resnet --depth 110 --hosts.coordinator HOST:1234 "
    "--hosts.num-processes 4 --hosts.process-id 0 --workdir /shared/runs/110": "four machines",
    "srun python -m experiments.cifar10_resnet --depth 110 --workdir /shared/runs/110": "Slurm",
}
"""Commands of the pages that no test runs, and why."""


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    """A data_dir with the digits, and noise under the other sets' names."""
    directory = tmp_path_factory.mktemp("tfds")
    preparation.prepare("sklearn_digits", str(directory))
    small_sets(directory)
    return directory


@pytest.fixture
def environment(tmp_path, small_data, clean_environment):
    """Of a reader's shell: the small sets, this checkout, this Python first on the path.

    DIR, in the pages a folder of the reader's own photographs, is one in its directory.
    """
    small_photos(tmp_path / "DIR")
    python = pathlib.Path(sys.executable).parent
    return clean_environment | QUICK | {
        "TFDS_DATA_DIR": str(small_data),
        "PYTHONPATH": str(ROOT),
        "PATH": f"{python}{os.pathsep}{os.environ['PATH']}",
        "PYTHONWARNINGS": "error",
        "MPLBACKEND": "agg",
    }  # fmt: skip


def shortened(command):
    """A command as the test runs it; "" for one that cannot be run."""
    if command in CANNOT_RUN:
        return ""
    return " ".join([command, SMALLER.get(module_of(command), "")]).strip()


def runnable(page):
    """The page's Python and bash blocks, commands shortened.

    The README's commands are left out: test_readme parses them, and .ci/run runs the first two.
    """
    found = []
    for block in blocks(DOCS / page):
        if page == README and block.language == "bash":
            continue
        if block.language == "bash":
            lines = [line for line in map(shortened, commands(block)) if line]
            block = block._replace(text="\n".join(lines))
        if block.language in ("python", "bash"):
            found.append(block._asdict())
    return found


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=() if p in QUICK_PAGES else pytest.mark.slow) for p in (README, *PAGES)],
)
def test_the_code_of_a_page_runs(page, tmp_path, environment):
    for package in NEEDS.get(page, ()):
        pytest.importorskip(package)
    with contextlib.ExitStack() as stack:
        if page == "hub.md":
            hub = stack.enter_context(contextlib.closing(Hub()))
            environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_me", "HF_HUB_DISABLE_XET": "1"}
            environment |= {"HF_HOME": str(tmp_path / "hf")}
            # huggingface_hub's own, of httpx
            environment |= {"PYTHONWARNINGS": "error,ignore::DeprecationWarning"}
        run_page(page, tmp_path, environment)


def run_blocks(page, found, **options):
    """The docs_runner's process on a page's blocks, ended."""
    runner = [sys.executable, str(ROOT / "tests" / "support" / "docs_runner.py")]
    text = json.dumps([page, found])
    return subprocess.run(runner, input=text, capture_output=True, text=True, **options)


def run_page(page, tmp_path, environment):
    found = runnable(page)
    done = run_blocks(page, found, cwd=tmp_path, env=environment)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert done.stdout.count(f"[{page}:") == len(found)


def test_a_block_that_fails_or_prints_something_else_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# X\n```python\nprint(1 + 1)\n```\n```text\n3\n```\n\n```bash\nfalse\n```\n")
    first, second = blocks(page)
    assert tuple(first) == ("python", "print(1 + 1)\n", 3, "3\n")
    assert (second.text, second.line, second.output) == ("false\n", 10, None)
    for chosen, message in (([first], "page says\n3"), ([second], "status 1 of")):
        done = run_blocks("page.md", [block._asdict() for block in chosen])
        assert done.returncode == 1
        assert message in done.stderr


@pytest.fixture
def notebook(tmp_path, small_data):
    """The notebook with small parameters, not executed."""
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    found = nbformat.read(NOTEBOOK, as_version=4)
    (cell,) = [c for c in found.cells if "parameters" in c.metadata.get("tags", ())]
    written, weights = cell.source, tmp_path / "ResNet50.weights.h5"
    module = flax_resnet.keras_resnet(50)
    flax_resnet.write_weights(weights, module, drawn(module, jnp.zeros((1, 32, 32, 3))))
    small = {"DATA_DIR": str(small_data), "WEIGHTS": str(weights), "DEPTH": 50, "EPOCHS": 1,
             "BATCH_SIZE": 16, "HIDDEN": 8, "WORKDIR": str(tmp_path / "run")}  # fmt: skip
    assert set(re.findall(r"^([A-Z_]+) =", written, re.MULTILINE)) == set(small)
    imports = [line for line in written.splitlines() if re.match("import|from", line)]
    cell.source = "\n".join([*imports, *(f"{name} = {value!r}" for name, value in small.items())])
    for other in found.cells:
        if other.cell_type == "code":
            other.outputs, other.execution_count = [], None
    return found


@pytest.mark.slow
def test_the_notebook_runs(notebook, tmp_path, environment):
    """In a process of its own: what Jupyter warns of is not ours."""
    import nbformat

    nbformat.write(notebook, tmp_path / "small.ipynb")
    del environment["PYTHONWARNINGS"], environment["MPLBACKEND"]
    environment |= {"IPYTHONDIR": str(tmp_path), "JUPYTER_PLATFORM_DIRS": "1"}
    program = (
        "import nbclient, nbformat; book = nbformat.read('small.ipynb', as_version=4); "
        "nbclient.NotebookClient(book, timeout=300, kernel_name='python3').execute(); "
        "nbformat.write(book, 'done.ipynb')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    executed = nbformat.read(tmp_path / "done.ipynb", as_version=4)
    outputs = [out for cell in executed.cells for out in cell.get("outputs", ())]
    texts = "".join(out.get("text", "") for out in outputs)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert f"test top-1 {result['top1']:.4f}, loss {result['loss']:.4f}, 3 steps\n" in texts
    assert "48 training and 16 test images of (32, 32, 3)\n" in texts
    pictures = [out.data["image/png"] for out in outputs if "data" in out]
    assert len(pictures) == 3
    assert all(pictures)


def test_the_notebook_has_the_experiments_recipe():
    """What it stores ran as a whole, and trains what experiments.mnist_transfer does."""
    cells = [c for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"]
    counts = [cell["execution_count"] for cell in cells]
    assert counts == list(range(1, len(cells) + 1))
    sources = ["".join(cell["source"]) for cell in cells]
    namespace = {}
    for source in sources:
        if "DEPTH =" in source or "TrainConfig(" in source:
            exec(source, namespace)
        if source.startswith("import matplotlib"):
            exec("from flax_resnet import DataConfig", namespace)
            exec(next(x for x in source.splitlines() if "DataConfig(" in x), namespace)
        if "model = " in source:
            exec("from flax_resnet import keras_resnet", namespace)
            exec(next(x for x in source.splitlines() if x.startswith("model = ")), namespace)
    assert namespace["config"] == mnist_transfer.get_config()


def test_what_cannot_run_is_in_the_pages_and_nothing_else_is_left_out():
    written = [
        c for p in PAGES for b in blocks(DOCS / p) if b.language == "bash" for c in commands(b)
    ]
    assert set(CANNOT_RUN) <= set(written)
    assert all(CANNOT_RUN.values())
    assert set(SMALLER) <= {module_of(command) for command in written}


def test_every_fence_is_code_output_or_a_directive():
    for page in DOCS.rglob("*.md"):
        if "_build" not in page.parts:
            found = {block.language for block in blocks(page)}
            assert {x for x in found if not x.startswith("{")} <= {"python", "bash", "text"}, page


def test_every_public_name_is_in_the_reference():
    text = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    found = re.findall(
        r"^\.\. auto(?:class|function|exception|module):: (?:flax_resnet[.]training[.])?(\w+)$",
        text,
        re.MULTILINE,
    )
    tree = vars(flax_resnet)
    source = (ROOT / "flax_resnet" / "__init__.py").read_text()
    public = {name for name in re.findall(r" as (\w+)$", source, re.MULTILINE) if name in tree}
    assert len(found) == len(set(found))
    assert set(found) == public


def test_pictures_are_small_and_used():
    text = "\n".join(page.read_text() for page in DOCS.rglob("*.md") if "_build" not in page.parts)
    pictures = list((DOCS / "images").iterdir())
    assert len(pictures) >= 4
    for picture in pictures:
        assert picture.stat().st_size < 100_000, picture
        assert f"images/{picture.name}" in text, picture


def test_the_strict_build_passes_and_loads_nothing_from_elsewhere(tmp_path, clean_environment):
    pytest.importorskip("furo")
    pytest.importorskip("myst_nb")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-b", "html",
         "-d", str(tmp_path / "trees"), str(DOCS), str(tmp_path / "html")],
        env=clean_environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "html").rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        loaded = re.findall(
            r"<(?:script|link|img)[^>]*(?:src|href)=\"(https?:[^\"]*)", page.read_text()
        )
        assert loaded == [], page
    index = (tmp_path / "html" / "api" / "training.html").read_text()
    assert 'id="flax_resnet.train_and_evaluate"' in index
