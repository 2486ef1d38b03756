from etils import epath

from flax_resnet.checkpoints import seals


def test_what_is_no_seal(tmp_path):
    directory = epath.Path(tmp_path)
    (directory / "a").write_text("a")
    seals.write(directory, seals.take(directory, {"top1": 0.5}))
    assert seals.problem(directory, seals.read(directory)) is None
    whole = (directory / seals.SEAL).read_text()
    better = whole.replace("0.5", "0.6")
    for text in ("{}", "[]", "null", "1", '{"sealed": 3, "sha256": 4}', better):
        (directory / seals.SEAL).write_text(text)
        assert seals.read(directory) is seals.DAMAGED
    (directory / seals.SEAL).write_bytes(b"\xff\xfe")
    assert seals.problem(directory, seals.read(directory)) == "SEALED.json is not as it was written"
    (directory / seals.SEAL).unlink()
    assert seals.read(directory) is None
