"""What importing the library imports, which every start of a command waits for."""

import subprocess
import sys

LATE = {
    "array_record",
    "gradio",
    "grain",
    "h5py",
    "keras",
    "matplotlib",
    "mlflow",
    "orbax",
    "pandas",
    "requests",
    "safetensors",
    "scipy",
    "sklearn",
    "tensorboardX",
    "tensorflow",
    "tensorflow_datasets",
    "tensorstore",
    "torch",
    "wandb",
}
"""Packages that a command imports where it needs them, and not before."""


def test_importing_the_library_imports_what_every_command_needs_alone(clean_environment):
    code = "import sys, flax_resnet.cli.experiment; print(*{n.split('.')[0] for n in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=clean_environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    loaded = set(done.stdout.split())
    assert "jax" in loaded
    assert LATE & loaded == set()
