import concurrent.futures
import pathlib
import resource
import shutil
import tarfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import assert_trees_equal

from flax_resnet.checkpoints import seals
from flax_resnet.checkpoints.checkpoints import CheckpointConfig, Checkpoints
from flax_resnet.errors import UserError

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def tree(value):
    return {"a": jnp.full((3, 4), float(value)), "b": {"step": jnp.int32(value)}, "none": None}


@pytest.fixture
def checkpoints(tmp_path):
    opened = Checkpoints(tmp_path / "c", CheckpointConfig(keep_last=2, keep_best=1))
    yield opened
    opened.close()


@pytest.fixture
def two(checkpoints, tmp_path):
    """The directory of two checkpoints, of steps 3 and 7."""
    for step, top1 in ((3, 0.9), (7, 0.5)):
        checkpoints.save(step, tree(step), {"step": step}, {"top1": top1})
    checkpoints.wait()
    return tmp_path / "c"


@pytest.fixture
def read(two):
    """(which) -> (step that was read, lines about those passed over); checks every value."""

    def read(which="latest"):
        lines = []
        reader = Checkpoints(two, say=lines.append)
        try:
            state, meta = reader.restore(tree(0), which)
        finally:
            reader.close()
        assert_trees_equal(state, tree(meta["step"]))
        return meta["step"], lines

    return read


def test_newest_and_best_are_kept(checkpoints, tmp_path):
    for step, top1 in ((0, 0.9), (1, 0.5), (2, 0.9), (3, None), (4, 0.7), (5, 0.6)):
        checkpoints.save(step, tree(step), {"step": step}, top1 and {"top1": top1})
    checkpoints.wait()
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["2", "4", "5"]
    for which, step in (("latest", 5), ("best", 2), (4, 4)):
        state, meta = checkpoints.restore(tree(0), which)
        assert meta == checkpoints.meta(which) == {"step": step}
        assert_trees_equal(state, tree(step))
        assert_trees_equal(checkpoints.read(which)[0]["a"], np.full((3, 4), step, np.float32))
    with pytest.raises(UserError, match=r"no checkpoint 3 in .* it holds steps \[2, 4, 5\]"):
        checkpoints.restore(tree(0), 3)


def test_an_evaluation_may_come_after_its_checkpoint(two, read):
    opened = Checkpoints(two, CheckpointConfig(keep_last=1), resumed_from=7)
    assert read("best") == (3, [])
    opened.rate(7, {"top1": 0.95})
    assert read("best") == (7, [])
    opened.save(9, tree(9), {"step": 9}, None)
    opened.close()
    assert sorted(path.name for path in two.iterdir()) == ["7", "9"]


def test_a_state_may_be_donated_as_soon_as_save_returns(checkpoints):
    step = jax.jit(lambda t: jax.tree.map(lambda x: x * 0 - 1, t), donate_argnums=0)
    for i in range(5):
        state = {"w": jnp.arange(250_000.0) + i}
        checkpoints.save(i, state, {}, None)
        step(state)
    checkpoints.wait()
    got, _ = checkpoints.restore({"w": jnp.zeros(250_000)}, "best")  # none was rated
    np.testing.assert_array_equal(got["w"], np.arange(250_000.0) + 4)


def test_other_shapes_dtypes_and_names_are_refused(two):
    reader = Checkpoints(two)
    wrong = [
        ({**tree(0), "a": jnp.zeros((4, 3))}, r"a is \(\(3, 4\), .* and \(\(4, 3\)"),
        ({**tree(0), "a": jnp.zeros((3, 4), jnp.bfloat16)}, "'float32'.* there .*'bfloat16'"),
        ({**tree(0), "c": jnp.zeros(2)}, "c is missing there"),
        ({"a": tree(0)["a"]}, "b/step is .* there and absent in this run"),
    ]
    for template, message in wrong:
        with pytest.raises(UserError, match=message):
            reader.restore(template)
    reader.close()


def test_reading_creates_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "nowhere"):
        reader = Checkpoints(place)
        assert reader.latest_step() is None
        with pytest.raises(UserError, match=r"no checkpoint 'best' in .*: it holds steps \[\]"):
            reader.restore(tree(0), "best")
        reader.close()
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


DAMAGES = {
    "truncated": lambda data: data[: len(data) // 2],
    "flipped": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "lengthened": lambda data: data + b"x",
    "missing": None,
}


@pytest.mark.parametrize("how", DAMAGES)
def test_damage_to_any_file_falls_back_a_step_and_never_gives_a_wrong_value(two, read, how):
    files = [path for path in sorted((two / "7").rglob("*")) if path.is_file()]
    assert len(files) >= 8
    for path in files:
        whole, name = path.read_bytes(), path.relative_to(two / "7")
        if how == "missing":
            path.unlink()
        elif whole:
            path.write_bytes(DAMAGES[how](whole))
        else:
            continue
        step, lines = read("latest")
        assert step == 3
        if (str(name), how) == (seals.SEAL, "missing"):  # it was never finished
            assert lines == []
        else:
            assert len(lines) == 1
            assert f"checkpoint 7 in {two} is damaged ({name} is not as it was" in lines[0]
            with pytest.raises(UserError, match=r"no whole checkpoint 7 in .*: put back a copy"):
                read(7)
        path.write_bytes(whole)
    assert read("latest") == (7, [])
    (two / "3/meta/metadata").write_text("{}")
    assert read("best")[0] == 7  # 3 was better
    (two / "7/state/x").write_text("x")  # a file too many
    for which in ("latest", "best"):
        with pytest.raises(UserError, match=rf"no whole checkpoint '{which}' in .* \[3, 7\]: put"):
            read(which)


def test_who_goes_on_sets_the_damaged_aside_and_removes_the_unfinished(two, read):
    (two / "7/meta/metadata").write_text("{}")
    shutil.copytree(two / "3", two / "5")
    (two / "5" / seals.SEAL).unlink()
    (two / "9.orbax-checkpoint-tmp/state").mkdir(parents=True)
    (two / "note").write_text("mine")
    lines = []
    opened = Checkpoints(two, CheckpointConfig(), resumed_from=3, say=lines.append)
    assert sorted(path.name for path in two.iterdir()) == ["3", "7.damaged", "note"]
    assert lines == [
        f"checkpoint {name} in {two} was not finished: removed"
        for name in ("5", "9.orbax-checkpoint-tmp")
    ]
    opened.save(7, tree(7), {"step": 7}, None)
    opened.close()
    assert read() == (7, [])


def test_a_save_that_fails_is_one_line_and_leaves_the_others(two, read):
    opened = Checkpoints(two, CheckpointConfig(keep_last=1, keep_best=0), resumed_from=7)
    big = {**tree(9), "a": np.random.default_rng(0).normal(size=(100, 1000))}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
        try:
            opened.save(9, big, {}, None)
            opened.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    with pytest.raises(UserError, match=r"checkpoint 9 could .* \(File too large.* \[3, 7\]:"):
        save()
    assert read() == (7, [])
    opened.save(9, big, {}, None)  # there is room again
    opened.close()
    assert [path.name for path in two.iterdir()] == ["9"]


def test_saves_of_runs_side_by_side_are_written_in_turn(tmp_path, monkeypatch):
    orbax, under_way = ocp.AsyncCheckpointer, []
    save, finish = orbax.save, orbax.wait_until_finished

    def spy_save(self, directory, *args, **kwargs):
        under_way.append(directory)
        assert len(under_way) == 1
        save(self, directory, *args, **kwargs)

    def spy_finish(self):
        finish(self)
        time.sleep(0.05)  # time for the others to come
        under_way.clear()

    monkeypatch.setattr(orbax, "save", spy_save)
    monkeypatch.setattr(orbax, "wait_until_finished", spy_finish)

    def run(number):
        opened = Checkpoints(tmp_path / str(number), CheckpointConfig(keep_last=3))
        for step in (1, 2, 3):
            opened.save(step, tree(10 * number + step), {"run": number}, None)
        opened.close()

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        list(pool.map(run, range(3)))
    for number in range(3):
        state, meta = Checkpoints(tmp_path / str(number)).restore(tree(0))
        assert meta == {"run": number}
        assert_trees_equal(state, tree(10 * number + 3))


@pytest.mark.parametrize("before", [True, False])
def test_a_step_that_is_removed_while_it_is_read_is_not_used(two, read, monkeypatch, before):
    restored = Checkpoints._restored

    def removed(self, path, template):
        if path.name == "7" and before:
            seals.remove(path)
        result = restored(self, path, template)
        if path.name == "7":  # all was read, but who knows what
            seals.remove(path)
        return result

    shutil.copytree(two / "7", two.parent / "7")
    monkeypatch.setattr(Checkpoints, "_restored", removed)
    assert read() == (3, [])
    shutil.copytree(two.parent / "7", two / "7")
    with pytest.raises(UserError, match=r"no checkpoint 7 in .* it holds steps \[3\]"):
        read(7)


@pytest.mark.parametrize(
    "name", ["[lr=0.1]", "a**b?", "{x}", "~ $HOME %41 #1", "new\nline", "caf\udce9", "雪 \\ 'q\""]
)
def test_any_name_of_a_directory_is_only_a_name(tmp_path, monkeypatch, name):
    (tmp_path / "links").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "links"))
    saver = Checkpoints(tmp_path / name / "c", CheckpointConfig(keep_last=2))
    for step in (1, 2, 3):
        saver.save(step, tree(step), {"step": step}, {"top1": step})
    saver.close()
    reader = Checkpoints(tmp_path / name / "c")
    assert sorted(seals.steps(reader.directory)) == [2, 3]
    assert_trees_equal(reader.restore(tree(0), 2)[0], tree(2))
    reader.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, "links"])
    assert list((tmp_path / "links").iterdir()) == []


def test_a_name_that_needs_a_link_where_none_can_be_made_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    with pytest.raises(UserError, match=r"checkpoints in .*/\[x\]: orbax needs a path of letters"):
        Checkpoints(tmp_path / "[x]")


def test_the_first_save_counts_once_it_was_read_back(tmp_path, monkeypatch):
    saver = Checkpoints(tmp_path / "c", CheckpointConfig())
    monkeypatch.setattr(saver, "_restored", lambda path, template: (tree(1)["b"], {}))
    saver.save(1, tree(1), {}, None)
    with pytest.raises(UserError, match=r"checkpoint 1 could not .* not what is read back"):
        saver.close()
    assert seals.steps(tmp_path / "c") == {}


def test_a_bucket_that_orbax_cannot_write_to_is_one_line():
    with pytest.raises(UserError, match="s3://b/c: expected a path or gs://BUCKET/PATH"):
        Checkpoints("s3://b/c")


@pytest.mark.parametrize("name", ["keep_last", "keep_best", "every_steps", "every_evals"])
def test_bad_fields(name):
    with pytest.raises(UserError, match=f"checkpoint.{name}=-1"):
        CheckpointConfig(**{name: -1})


@pytest.mark.parametrize("version", ["0.11.36", "0.12.8"])
def test_what_commit_c4826e5_wrote_with_either_orbax_is_read(tmp_path, version):
    """The steps 1 and 2, in which every element of "a" is the step."""
    with tarfile.open(GOLDEN / f"orbax-{version}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    template = {"a": jnp.zeros((300, 400)), "b": {"step": jnp.int32(0)}, "none": None}
    lines = []
    opened = Checkpoints(tmp_path / f"orbax-{version}", CheckpointConfig(), 2, lines.append)
    for which, step in (("latest", 2), ("best", 2), (1, 1)):
        state, meta = opened.restore(template, which)
        assert meta == {"step": step}
        np.testing.assert_array_equal(state["a"], np.full((300, 400), step, np.float32))
        assert state["b"]["step"] == step
    opened.save(3, template, {"step": 3}, None)
    opened.close()
    assert sorted(path.name for path in opened.directory.iterdir()) == ["2", "3"]
    assert lines == []
