import hashlib
import json

import pytest
from etils import epath

from flax_resnet import seals


@pytest.fixture
def directory(tmp_path):
    """Three files, one of them of more than a block and one in a directory of its own."""
    place = epath.Path(tmp_path / "d")
    (place / "deep" / "er").mkdir(parents=True)
    (place / "a").write_bytes(b"")
    (place / "big").write_bytes(bytes(range(256)) * (2 * seals.BLOCK_BYTES // 256) + b"!")
    (place / "deep/er/c").write_bytes(b"ccc")
    return place


@pytest.fixture
def sealed(directory):
    seals.write(directory, seals.take(directory, {"top1": 0.5}))
    return directory


def test_a_seal_lists_every_file(directory):
    seal = seals.take(directory)
    assert list(seal.files) == ["a", "big", "deep/er/c"]
    for name, (size, sha) in seal.files.items():
        data = (directory / name).read_bytes()
        assert (size, sha) == (len(data), hashlib.sha256(data).hexdigest())


def test_it_is_read_as_it_was_written_and_may_be_replaced(sealed):
    seal = seals.read(sealed)
    assert seal.scores == {"top1": 0.5}
    assert seals.problem(sealed, seal) is None
    seals.write(sealed, seals.Seal(seal.files, {"top1": 0.75}))
    assert seals.read(sealed).scores == {"top1": 0.75}
    assert seals.problem(sealed, seals.read(sealed)) is None
    assert sorted(path.name for path in sealed.iterdir()) == [seals.SEAL, "a", "big", "deep"]


def test_a_seal_that_cannot_be_written_leaves_the_old_one(sealed, monkeypatch):
    before = (sealed / seals.SEAL).read_bytes()

    def full(path, text):
        path.write_bytes(text[:5].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(sealed), "write_text", full)
    with pytest.raises(OSError, match="No space"):
        seals.write(sealed, seals.read(sealed))
    assert (sealed / seals.SEAL).read_bytes() == before
    assert sorted(path.name for path in sealed.iterdir()) == [seals.SEAL, "a", "big", "deep"]


def test_what_is_no_seal(sealed):
    whole = json.loads((sealed / seals.SEAL).read_text())
    other = {**whole, "sealed": whole["sealed"].replace("0.5", "0.6")}
    for text in ("", "{}", "[]", "null", "1", '{"sealed": 3, "sha256": 4}', json.dumps(other)):
        (sealed / seals.SEAL).write_text(text)
        assert seals.read(sealed) is None
        assert seals.exists(sealed)
    (sealed / seals.SEAL).write_bytes(b"\xff\xfe")
    assert seals.read(sealed) is None
    (sealed / seals.SEAL).unlink()
    assert seals.read(sealed) is None
    assert not seals.exists(sealed)
    assert seals.read(sealed / "nowhere") is None


def test_links_are_followed(sealed, tmp_path):
    seal = seals.read(sealed)
    (tmp_path / "elsewhere").write_bytes((sealed / "big").read_bytes())
    (sealed / "big").unlink()
    (tmp_path / "d/big").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(tmp_path / "d")
    assert seals.problem(epath.Path(tmp_path / "link"), seal) is None
    (tmp_path / "elsewhere").unlink()
    assert "cannot be read: No such file" in seals.problem(sealed, seal)
    (tmp_path / "d/big").unlink()
    assert seals.problem(sealed, seal) == "big is missing"
    (tmp_path / "d/big").symlink_to(tmp_path / "d")  # round and round
    assert seals.problem(sealed, seal) is not None


def test_what_goes_away_while_it_is_read_is_a_problem_and_no_error(sealed, monkeypatch):
    seal = seals.read(sealed)
    names = list(seals.files(sealed))
    sealed.rmtree()
    assert "cannot be read" in seals.problem(sealed, seal)
    monkeypatch.setattr(seals, "files", lambda directory: names)
    assert seals.problem(sealed, seal) == "it cannot be read: No such file or directory"


def test_the_seal_is_removed_first(sealed, monkeypatch):
    seen = []
    monkeypatch.setattr(type(sealed), "rmtree", lambda path, **_: seen.append(seals.exists(path)))
    seals.remove(sealed)
    assert seen == [False]
    monkeypatch.undo()
    seals.remove(sealed)
    seals.remove(sealed)  # by two at a time
    assert not sealed.exists()
