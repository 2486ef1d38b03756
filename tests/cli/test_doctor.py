"""What the doctor finds, and what it says of what is missing."""

import sys
from importlib.metadata import metadata

import jax
import numpy as np
import pytest
from helpers import assert_one_line_error

import flax_resnet
from flax_resnet.cli import doctor


def by_topic(data_dir=None):
    return {topic: (mark, text) for mark, topic, text in doctor.findings(data_dir)}


def test_what_is_here(digits_dir):
    found = by_topic(digits_dir)
    assert flax_resnet.__version__ in found["flax_resnet"][1]
    assert found["jax"] == (" ", jax.__version__)
    assert found["numpy"] == (" ", np.__version__)
    assert found["data"] == (" ", f"sklearn_digits/1.0.0 in {digits_dir}")
    extras = metadata("flax_resnet").get_all("Provides-Extra")
    assert len(extras) > 5
    assert {f"[{extra}]" for extra in extras} <= found.keys()
    assert "pytest" in found["[test]"][1]


def test_what_is_missing_has_its_command(monkeypatch, tmp_path):
    real = doctor.versions

    def versions(names):
        return {n: "not installed" if n == "huggingface_hub" else v for n, v in real(names).items()}

    monkeypatch.setattr(doctor, "versions", versions)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    found = by_topic(str(tmp_path))
    mark, text = found["[hub]"]
    assert (mark, "huggingface_hub (not installed)" in text) == ("-", True)
    assert text.endswith("   -> pip install -e '.[hub]'")
    assert found["GPU"][0] == "!"
    assert found["GPU"][1].endswith('   -> pip install "jax[cuda13]"')
    mark, text = found["data"]
    assert (mark, text.endswith(f"prepare NAME --data-dir {tmp_path}")) == ("-", True)
    monkeypatch.setattr(doctor, "git_state", lambda: None)
    assert by_topic(str(tmp_path))["[hub]"][1].endswith("pip install 'flax_resnet[hub]'")


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("echo fine", (" ", "fine")),
        ("echo 'flax-resnet 0.1.0 needs x'; exit 1", ("!", "flax-resnet 0.1.0 needs x")),
        ("echo 'No module named pip' >&2; exit 1", ("-", "No module named pip")),
    ],
)
def test_what_pip_says(program, expected, tmp_path, monkeypatch):
    (tmp_path / "python").write_text(f"#!/bin/sh\n{program}\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert by_topic()["pip check"] == expected


def test_the_command(call, monkeypatch, tmp_path):
    facts = [(" ", "jax", "1.0"), ("-", "[hub]", "not here   -> pip")]
    monkeypatch.setattr(doctor, "findings", lambda data_dir: facts)
    assert call("doctor", "--data-dir", tmp_path)[::2] == (0, "")
    facts.append(("!", "pip check", "broken"))
    code, out, err = call("doctor")
    assert code == 1
    assert out.startswith("  jax              1.0\n- [hub]            not here   -> pip\n! pip")
    assert_one_line_error((2, "", err), "1 wrong: pip check; the lines with ! say what it is")
