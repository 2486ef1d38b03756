import pytest

from flax_resnet.files import replacing


def break_off(path):
    path.write_text("sec")
    raise OSError("disk full")


def test_a_file_is_replaced_when_whole_and_left_alone_otherwise(tmp_path):
    path = tmp_path / "a.json"
    with replacing(path) as partial:
        partial.write_text("first")
        assert not path.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(OSError, match="disk full"), replacing(path) as partial:
        break_off(partial)
    assert path.read_text() == "first"
