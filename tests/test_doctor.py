"""What the doctor finds, and what it says of what is missing."""

import json
import sys
from importlib.metadata import metadata

import jax
import numpy as np
import pytest
from helpers import assert_one_line_error

import flax_resnet
from flax_resnet import doctor


def by_topic(data_dir=None):
    return {finding.topic: finding for finding in doctor.findings(data_dir)}


def test_what_is_here(digits_dir):
    found = by_topic(digits_dir)
    assert flax_resnet.__version__ in found["flax_resnet"].text
    assert found["jax"].text == jax.__version__
    assert found["numpy"].text == np.__version__
    assert found["data"].text == f"sklearn_digits/1.0.0 in {digits_dir}"
    extras = metadata("flax_resnet").get_all("Provides-Extra")
    assert len(extras) > 5
    assert {f"[{extra}]" for extra in extras} <= found.keys()
    assert "pytest" in found["[test]"].text
    assert all(found[name].state == "ok" for name in ("flax_resnet", "jax"))


def test_what_is_missing_has_its_command(monkeypatch, tmp_path):
    real = doctor.versions

    def versions(names):
        return {n: "not installed" if n == "huggingface_hub" else v for n, v in real(names).items()}

    monkeypatch.setattr(doctor, "versions", versions)
    found = by_topic(str(tmp_path))
    hub = found["[hub]"]
    assert (hub.state, hub.advice) == ("absent", "pip install -e '.[hub]'")
    assert "huggingface_hub (not installed)" in hub.text
    monkeypatch.setattr(doctor, "git_state", lambda: None)
    assert by_topic(str(tmp_path))["[hub]"].advice == "pip install 'flax_resnet[hub]'"
    data = found["data"]
    assert (data.state, str(tmp_path) in data.text) == ("absent", True)


@pytest.mark.parametrize(
    ("program", "state", "text"),
    [
        ("echo fine", "ok", "fine"),
        ("echo 'flax-resnet 0.1.0 requires x'; exit 1", "wrong", "flax-resnet 0.1.0 requires x"),
        ("echo 'other 1 requires y'; exit 1", "absent", "other 1 requires y"),
        ("echo 'No module named pip' >&2; exit 1", "absent", "No module named pip"),
    ],
)
def test_what_pip_says(program, state, text, tmp_path, monkeypatch):
    (tmp_path / "python").write_text(f"#!/bin/sh\n{program}\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    found = doctor._requirements()
    assert (found.state, found.text) == (state, text)


def test_a_gpu_that_jax_does_not_use_is_said(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    gpu = by_topic()["GPU"]
    assert (gpu.state, gpu.advice) == ("wrong", 'pip install "jax[cuda13]"')


def test_the_command(call, monkeypatch, tmp_path):
    facts = [doctor.Finding("jax", "1.0"), doctor.Finding("[hub]", "not here", "absent", "pip")]
    monkeypatch.setattr(doctor, "findings", lambda data_dir: iter(facts))
    code, out, err = call("doctor", "--json", "--data-dir", tmp_path)
    found = json.loads(out)
    assert {"topic", "text", "state", "advice"} == found[0].keys()
    assert (code, err) == (0, "")
    facts.append(doctor.Finding("pip check", "broken", "wrong", "mend it"))
    code, out, err = call("doctor")
    assert code == 1
    assert "- [hub]            not here   -> pip\n! pip check        broken   -> mend it\n" in out
    assert_one_line_error((2, "", err), "1 wrong: pip check; the lines with ! say what to do")
