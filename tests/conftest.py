"""Eight virtual CPU devices, quick compilation, prepared digits, and small networks and images."""

import contextlib
import os
import pathlib
import tempfile

import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# Many tests compile the same small programs; each worker keeps them for its session.
jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp(prefix="flax_resnet_tests_"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

SHARED_DATA = pathlib.Path(
    os.environ.get("FLAX_RESNET_DATA", pathlib.Path(__file__).parents[2] / "shared" / "data")
)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(request):
    """Compiles in half the time, but for modules with OPTIMIZED: they compare numbers tightly."""
    optimized = getattr(request.module, "OPTIMIZED", False)
    jax.config.update("jax_disable_most_optimizations", not optimized)


@pytest.fixture(scope="session")
def clean_environment(tmp_path_factory):
    """For processes that tests start: what they compile is kept too, a shell's settings are not.

    Nor do they touch the user's cache.
    """
    foreign = ("JAX_", "XLA_", "TFDS_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    return kept | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "FLAX_RESNET_CACHE": str(tmp_path_factory.mktemp("cache")),
    }


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
    """A data_dir with the bundled digits prepared."""
    from flax_resnet.data import preparation

    directory = str(tmp_path_factory.mktemp("tfds"))
    preparation.prepare("sklearn_digits", directory)
    return directory


@pytest.fixture(scope="session")
def shared_data():
    """The real CIFAR-10 and MNIST, where they are."""
    if not (SHARED_DATA / "cifar10").is_dir():
        pytest.skip(f"no data sets in {SHARED_DATA}; FLAX_RESNET_DATA names another place")
    return str(SHARED_DATA)


@pytest.fixture
def meshes():
    """(a mesh of one device, a mesh of eight)."""
    from flax_resnet.distributed.sharding import data_mesh

    return data_mesh(jax.devices()[:1]), data_mesh(jax.devices())


@pytest.fixture
def mesh(meshes):
    """A mesh of one device."""
    return meshes[0]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def image_folder(tmp_path):
    """Two classes of 20 random 8x8 RGB PNGs each, in tmp_path/photos."""
    from helpers import class_folders

    return class_folders(tmp_path / "photos", ("cat", "dog"), 20, (8, 8))


@pytest.fixture
def photos(tmp_path, rng):
    """Seven images of odd sizes, modes and kinds, and what is no image of the folder's."""
    from prediction_helpers import paint

    root = tmp_path / "photos"
    (root / "deep" / ".hidden").mkdir(parents=True)
    for i, name in enumerate(["b.png", "a.jpg", "deep/c.PNG", "d.bmp", "e.png", "f.gif", "z.png"]):
        image = paint(rng, 8 + i, 9 + 2 * i)
        (image.convert("L") if name == "e.png" else image).save(root / name)
    (root / "notes.txt").write_text("no image")
    (root / ".thumb.png").write_bytes(b"hidden")
    (root / "deep" / ".hidden" / "x.png").write_bytes(b"hidden")
    return root


@pytest.fixture
def call(capsys):
    """Runs a command line in this process: (exit status, stdout, stderr)."""

    def call(*arguments):
        from flax_resnet.cli.app import command

        capsys.readouterr()
        try:
            command([str(a) for a in arguments])
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the Hugging Face hub, with a cache and a login of the test's own."""
    client = pytest.importorskip("huggingface_hub", reason="needs [hub]")
    from hub_server import Hub
    from huggingface_hub import constants

    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith("HF_"):
            monkeypatch.delenv(name)
    monkeypatch.delenv("FLAX_RESNET_OFFLINE", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # of its own, not HTTP
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between attempts
    with contextlib.closing(Hub()) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running
        client.close_session()


@pytest.fixture
def net(tmp_path):
    """A weight file of no run."""
    from prediction_helpers import make_weights

    make_weights(tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


def pytest_sessionfinish(session, exitstatus):
    """FLAX_RESNET_NO_SKIP=1 (what .ci/run sets) fails a session that skipped anything.

    FLAX_RESNET_SKIPPED=FILE has their names written there, a line each.
    """
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    if reporter and (place := os.environ.get("FLAX_RESNET_SKIPPED")):
        names = dict.fromkeys(report.nodeid for report in skipped)
        pathlib.Path(place).write_text("".join(f"{name}\n" for name in names))
    if skipped and exitstatus == 0 and os.environ.get("FLAX_RESNET_NO_SKIP"):
        reporter.write_line(f"{len(skipped)} tests were skipped and FLAX_RESNET_NO_SKIP is set")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
