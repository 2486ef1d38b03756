"""What the doctor finds, and what it says of what is missing."""

import json

import jax
import pytest
from helpers import assert_one_line_error

import flax_resnet
from flax_resnet import doctor


def by_topic(data_dir=None):
    found = {}
    for finding in doctor.findings(data_dir):
        found.setdefault(finding.topic, []).append(finding)
    return found


def test_what_is_here(digits_dir):
    found = by_topic(digits_dir)
    assert flax_resnet.__version__ in found["flax_resnet"][0].text
    assert found["jax"][0].text == jax.__version__
    assert found["devices"][0].text == "8 of kind cpu, platform cpu"
    assert "error" in found["computation"][0].text
    (data,) = found["data"]
    assert "train 1,442, test 355" in data.text
    needed = {"jax", "flax", "optax", "numpy", "orbax-checkpoint", "computation", "flax_resnet"}
    assert all(found[name][0].state == "ok" for name in needed)


def test_every_requirement_and_every_extra_is_looked_at():
    from importlib.metadata import metadata

    found, said = by_topic(), metadata("flax_resnet")
    extras = said.get_all("Provides-Extra")
    assert len(extras) > 5
    assert {f"[{extra}]" for extra in extras} <= found.keys()
    assert "pytest" in found["[test]"][0].text
    assert "pytest" not in found


def test_what_is_missing_has_its_command(monkeypatch, tmp_path):
    real = doctor.versions

    def versions(names):
        gone = {"huggingface_hub": "not installed", "optax": "0.0.1"}
        return {name: gone.get(name, version) for name, version in real(names).items()}

    monkeypatch.setattr(doctor, "versions", versions)
    found = by_topic(str(tmp_path))
    (hub,) = found["[hub]"]
    assert (hub.state, hub.advice) == ("absent", "pip install -e '.[hub]'")
    assert "huggingface_hub (not installed" in hub.text
    monkeypatch.setattr(doctor, "git_state", lambda: None)
    assert by_topic(str(tmp_path))["[hub]"][0].advice == "pip install 'flax_resnet[hub]'"
    (optax,) = found["optax"]
    assert optax.state == "wrong"
    assert optax.advice.startswith('pip install "optax>=')
    (data,) = found["data"]
    assert (data.state, str(tmp_path) in data.text) == ("absent", True)


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLAX_RESNET_CACHE", str(tmp_path / "file" / "cache"))
    (weights,) = by_topic(str(tmp_path))["weights"]
    assert weights.state == "wrong"
    assert "not writable" in weights.text
    monkeypatch.setenv("FLAX_RESNET_CACHE", str(tmp_path))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "a.h5").write_bytes(b"12345")
    (tmp_path / "weights" / "b.h5.partial").write_bytes(b"1")
    (weights,) = by_topic(str(tmp_path))["weights"]
    assert weights.text == f"1 files, 5.0 B in {tmp_path}/weights"


def test_offline_is_said(monkeypatch, tmp_path):
    assert "network" not in by_topic(str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in by_topic(str(tmp_path))["network"][0].text


def test_a_convolution_that_is_wrong_is_found(monkeypatch):
    right = jax.lax.conv_general_dilated
    monkeypatch.setattr(jax.lax, "conv_general_dilated", lambda *a, **k: 1.1 * right(*a, **k))
    assert doctor._computation().state == "wrong"


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0.0 B"), (2**20, "1.0 MiB"), (3 * 2**29, "1.5 GiB")]
)
def test_sizes(size, text):
    assert doctor._size(size) == text


def test_the_command(call, monkeypatch, tmp_path):
    code, out, err = call("doctor", "--json", "--data-dir", tmp_path)
    found = json.loads(out)
    assert {"topic", "text", "state", "advice"} == found[0].keys()
    assert (code, err) == (0, "")
    fails = doctor.Finding("disk", "full", "wrong", "free some")
    monkeypatch.setattr(doctor, "_computation", lambda: fails)
    code, out, err = call("doctor")
    assert code == 1
    assert "! disk                     full   -> free some\n" in out
    assert_one_line_error((2, "", err), "1 wrong: disk; the lines with ! say what to do")
