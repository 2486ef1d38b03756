import errno
import os
import subprocess

import numpy as np
import pytest

from flax_resnet.errors import TryAgain, UserError
from flax_resnet.records.files import (
    digest,
    error_as_one_line,
    os_error_as_one_line,
    quoted,
    replacing,
    replacing_tree,
    shown,
)


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
    with replacing(path) as one, replacing(path) as other:  # two may write at once
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("file", [".", "text"])
def test_a_file_or_directory_takes_a_place_whole_or_not_at_all(tmp_path, file):
    path = tmp_path / "net.onnx"
    for content in ("first", "second"):
        with replacing_tree(path) as partial:
            assert (partial.name, partial.exists()) == ("net.onnx", False)
            (partial / file).parent.mkdir(exist_ok=True)
            (partial / file).write_text(content)
        assert (path / file).read_text() == content
    with pytest.raises(OSError, match="disk full"), replacing_tree(path) as partial:
        break_off(partial)
    assert [*tmp_path.iterdir()] == [path]
    assert (path / file).read_text() == "second"


def test_an_error_of_the_system_names_the_place_and_not_the_unfinished_file(tmp_path):
    path = tmp_path / "none" / "x"
    with pytest.raises(UserError) as caught, os_error_as_one_line(path), replacing(path) as partial:
        partial.write_text("x")
    assert str(caught.value) == f"{path} cannot be written: No such file or directory"


def test_a_hash_tells_arrays_apart_by_dtype_shape_and_value():
    a = np.arange(6, dtype=np.int32)
    arrays = [a, a.reshape(2, 3), a.astype(np.int64), a[::-1], a.tobytes()]
    assert len({digest(part) for part in [*([x] for x in arrays), [a, b""], [a, "x"]]}) == 7
    assert digest([a[::2]]) == digest([a[::2].copy()])


@pytest.mark.parametrize(
    ("error", "num_processes", "kind"),
    [
        (RuntimeError("barrier timed out"), 1, UserError),
        (RuntimeError("barrier timed out\nat step 3"), 2, TryAgain),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 2, UserError),
        (ValueError(f"FAILED_PRECONDITION: {os.strerror(errno.ENOSPC)} [fd 3]"), 2, UserError),
        (UserError("as it was"), 2, UserError),
    ],
)
def test_an_error_that_anothers_death_may_have_caused_may_be_tried_again(
    error, num_processes, kind
):
    """Launchers give up on exit status 2 and start again on 1."""
    with pytest.raises(UserError) as caught, error_as_one_line(str, num_processes):
        raise error
    assert type(caught.value) is kind


def test_names_that_are_no_utf8_are_escaped():
    assert [shown(x) for x in ("é", "caf\udce9", "\udce9\udc9b\udcaa", "\ud800")] == [
        "é", r"caf\xe9", "雪", r"\ud800"
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["a", "a b", "[x] $HOME `a` 'q\" \\", "caf\udce9's\n\tx", "雪"])
def test_a_quoted_word_is_the_same_word_in_a_shell(name):
    assert quoted(name).isprintable()
    asked = ["bash", "-c", f"printf %s {quoted(name)}"]
    assert subprocess.run(asked, capture_output=True, check=True).stdout == os.fsencode(name)
