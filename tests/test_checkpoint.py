import concurrent.futures
import functools
import resource
import shutil
import tempfile
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from buckets import Objects
from helpers import UNIT_STATS, assert_trees_equal, random_batch, tiny_resnet

from flax_resnet import distributed, seals
from flax_resnet.checkpoint import CheckpointConfig, Checkpoints
from flax_resnet.errors import UserError
from flax_resnet.optim import Adam
from flax_resnet.step import create_state, train_step


def tree(value):
    return {"a": jnp.full((3, 4), float(value)), "b": {"step": jnp.int32(value)}, "none": None}


@pytest.fixture
def checkpoints(tmp_path):
    opened = Checkpoints(tmp_path / "c", CheckpointConfig(keep_last=2, keep_best=1))
    yield opened
    opened.close()


def test_newest_and_best_are_kept(checkpoints):
    for step, top1 in ((0, 0.9), (1, 0.5), (2, 0.9), (3, None), (4, 0.7), (5, 0.6)):
        checkpoints.save(step, tree(step), {"step": step}, top1 and {"top1": top1})
    checkpoints.wait()
    assert (checkpoints.latest_step(), checkpoints.best_step()) == (5, 2)
    for which, step in (("latest", 5), ("best", 2), (4, 4)):
        state, meta = checkpoints.restore(tree(0), which)
        assert meta == {"step": step}
        assert_trees_equal(state, tree(step))
    with pytest.raises(UserError, match=r"no checkpoint 3 in .* it holds steps \[2, 4, 5\]"):
        checkpoints.restore(tree(0), 3)


def test_a_state_may_be_donated_as_soon_as_save_returns(checkpoints):
    step = jax.jit(lambda t: jax.tree.map(lambda x: x * 0 - 1, t), donate_argnums=0)
    for i in range(5):
        state = {"w": jnp.arange(250_000.0) + i}
        checkpoints.save(i, state, {}, None)
        step(state)
    checkpoints.wait()
    got, _ = checkpoints.restore({"w": jnp.zeros(250_000)})
    np.testing.assert_array_equal(got["w"], np.arange(250_000.0) + 4)


def test_a_save_is_sealed_though_no_thread_can_be_started(checkpoints, monkeypatch):
    start = threading.Thread.start

    def refused(thread):
        if thread.name.startswith("checkpoint "):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refused)
    for step in (1, 2):  # the second would wait for the first for ever
        checkpoints.save(step, tree(step), {}, None)
        assert checkpoints.latest_step() == step


def test_a_save_that_was_cut_off_is_no_checkpoint(checkpoints, tmp_path):
    checkpoints.save(1, tree(1), {}, None)
    checkpoints.wait()
    partial = tmp_path / "c" / "2.orbax-checkpoint-tmp"
    partial.mkdir()
    (partial / "state").mkdir()
    again = Checkpoints(tmp_path / "c", CheckpointConfig(), resumed_from=1)
    assert again.latest_step() == 1
    assert not partial.exists()
    again.close()


def test_other_shapes_dtypes_and_names_are_refused(checkpoints):
    checkpoints.save(1, tree(1), {}, None)
    checkpoints.wait()
    wrong = [
        ({**tree(0), "a": jnp.zeros((4, 3))}, r"a is \(\(3, 4\), .* and \(\(4, 3\)"),
        ({**tree(0), "a": jnp.zeros((3, 4), jnp.bfloat16)}, "'float32'.* there .*'bfloat16'"),
        ({**tree(0), "c": jnp.zeros(2)}, "c is missing there"),
        ({"a": tree(0)["a"]}, "b/step is .* there and absent in this run"),
    ]
    for template, message in wrong:
        with pytest.raises(UserError, match=message):
            checkpoints.restore(template)


def test_reading_creates_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    reader = Checkpoints(tmp_path / "empty")
    with pytest.raises(UserError, match=r"no checkpoint 'latest' in .*empty: it holds steps \[\]"):
        reader.restore(tree(0))
    reader.close()
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.fixture
def two(checkpoints, tmp_path):
    """Two sealed steps, 3 and 7; their directory."""
    for step, top1 in ((3, 0.9), (7, 0.5)):
        checkpoints.save(step, tree(step), {"step": step}, {"top1": top1})
    checkpoints.wait()
    return tmp_path / "c"


def damaged(path, how):
    data = path.read_bytes()
    half = len(data) // 2
    return {
        "truncated": data[:half],
        "emptied": b"",
        "flipped": data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :],
        "lengthened": data + b"x",
    }[how]


@pytest.mark.parametrize("how", ["truncated", "emptied", "flipped", "lengthened"])
def test_damage_to_any_file_is_found_and_the_step_before_is_read(two, how):
    files = [path for path in sorted((two / "7").rglob("*")) if path.is_file()]
    assert len(files) >= 8
    changed = 0
    for path in files:
        whole = path.read_bytes()
        bad = damaged(path, how) if whole or how == "lengthened" else whole
        if bad == whole:
            continue  # an empty file cannot be emptied
        changed += 1
        path.write_bytes(bad)
        said = []
        reader = Checkpoints(two, say=said.append)
        state, meta = reader.restore(tree(0))
        assert_trees_equal(state, tree(3))
        assert meta == {"step": 3}
        assert len(said) == 1
        assert f"checkpoint 7 in {two} is damaged ({path.relative_to(two / '7')} " in said[0]
        with pytest.raises(UserError, match=r"checkpoint 7 in .* is damaged: put back a copy"):
            reader.restore(tree(0), 7)
        reader.close()
        path.write_bytes(whole)
    assert changed >= 6
    reader = Checkpoints(two)
    assert (reader.latest_step(), reader.best_step()) == (7, 3)
    reader.close()


@pytest.mark.parametrize("what", ["missing", "strange"])
def test_files_too_few_or_too_many_are_damage(two, what):
    (two / "7/meta/metadata").unlink() if what == "missing" else (two / "7/x").write_text("x")
    said = []
    reader = Checkpoints(two, say=said.append)
    assert reader.latest_step() == reader.step("latest") == 3
    assert len(said) == 1
    assert ("meta/metadata is missing" if what == "missing" else "x is not one of") in said[0]
    reader.close()


def test_the_best_is_passed_over_too(two):
    (two / "3/meta/metadata").write_text("{}")
    said = []
    reader = Checkpoints(two, say=said.append)
    assert reader.best_step() == reader.evaluated_step() == 7
    assert "checkpoint 3" in said[0]
    reader.close()


def test_nothing_good_left_is_one_line_and_no_fresh_start(two):
    for step in (3, 7):
        (two / f"{step}/meta/metadata").write_text("{}")
    reader = Checkpoints(two, say=lambda line: None)
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged: put back a copy, or"):
        reader.restore(tree(0))
    reader.close()


def test_a_step_without_a_seal_was_never_finished(two):
    (two / "7" / seals.SEAL).unlink()
    said = []
    reader = Checkpoints(two, say=said.append)
    assert reader.latest_step() == 3
    assert f"checkpoint 7 in {two} is unfinished (SEALED.json is not there)" in said[0]
    reader.close()
    (two / "3" / seals.SEAL).unlink()
    reader = Checkpoints(two, say=said.append)
    assert reader.latest_step() is None  # so the run begins anew
    reader.close()


def test_who_goes_on_sets_the_damaged_aside_and_removes_the_unfinished(two):
    (two / "7/meta/metadata").write_text("{}")
    shutil.copytree(two / "3", two / "5")
    (two / "5" / seals.SEAL).unlink()
    (two / "9.orbax-checkpoint-tmp").mkdir()
    opened = Checkpoints(two, CheckpointConfig(), resumed_from=3)
    assert sorted(path.name for path in two.iterdir()) == ["3", "7.damaged"]
    opened.save(7, tree(8), {"step": 7}, None)
    opened.wait()
    assert opened.latest_step() == 7
    assert_trees_equal(opened.restore(tree(0))[0], tree(8))
    opened.close()


def test_an_evaluation_may_come_after_its_checkpoint(two):
    opened = Checkpoints(two, CheckpointConfig(), resumed_from=7)
    opened.rate(7, {"top1": 0.95})
    assert opened.best_step() == 7
    opened.close()


def test_a_save_that_fails_is_one_line_and_leaves_the_others(two):
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

    with pytest.raises(UserError, match=r"checkpoint 9 could .* \(File too large.* step 7:"):
        save()
    assert opened.latest_step() == 7
    assert sorted(path.name for path in two.iterdir()) == ["3", "7"]  # room comes back
    opened.save(9, big, {}, None)  # there is room again
    opened.close()
    assert Checkpoints(two).latest_step() == 9


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


def test_a_seal_that_cannot_be_written_is_a_failed_save(two, monkeypatch):
    opened = Checkpoints(two, CheckpointConfig(), resumed_from=7)

    def full(directory, seal):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(seals, "write", full)
    opened.save(9, tree(9), {}, None)
    with pytest.raises(UserError, match=r"checkpoint 9 could .* \(No space left .* step 7:"):
        opened.wait()
    with pytest.raises(UserError, match="checkpoint 7 could not be written"):
        opened.rate(7, {"top1": 1.0})
    opened.close()
    assert sorted(path.name for path in two.iterdir()) == ["3", "7"]
    assert seals.read(two / "7").scores == {"top1": 0.5}


def test_a_reader_takes_the_next_where_a_step_is_removed_while_it_reads(two, monkeypatch):
    reader = Checkpoints(two)
    for step in (7, 3):
        shutil.copytree(two / str(step), two.parent / str(step))
    restored = Checkpoints._restored

    def removed(self, path, template):
        found = restored(self, path, template)
        if path.name == "7":  # all was read, but who knows what
            seals.remove(path)
        return found

    monkeypatch.setattr(Checkpoints, "_restored", removed)
    assert reader.read("latest")[1] == {"step": 3}
    reader.close()

    shutil.copytree(two.parent / "7", two / "7")

    def removed_before(self, path, template):
        seals.remove(path)
        return restored(self, path, template)

    monkeypatch.setattr(Checkpoints, "_restored", removed_before)
    reader = Checkpoints(two)
    with pytest.raises(UserError, match=r"no checkpoint 'latest' in .* it holds steps \[\]"):
        reader.read("latest")
    shutil.copytree(two.parent / "7", two / "7")
    with pytest.raises(UserError, match="no checkpoint 7 in"):
        reader.read(7)
    reader.close()


# A read whose files vanish leaves callbacks of tensorstore's to a loop that orbax has closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_two_readers_beside_a_run_that_goes_on(tmp_path):
    writer = Checkpoints(tmp_path / "c", CheckpointConfig(keep_last=1, keep_best=0))
    writer.save(0, tree(0), {"step": 0}, None)
    writer.wait()
    over, said, read = threading.Event(), [], []

    def reads():
        reader = Checkpoints(tmp_path / "c", say=said.append)
        while not over.is_set():
            state, meta = reader.read()
            np.testing.assert_array_equal(state["a"], np.full((3, 4), meta["step"]))
            read.append(meta["step"])
        reader.close()

    with concurrent.futures.ThreadPoolExecutor() as pool:
        readers = [pool.submit(reads) for _ in range(2)]
        try:
            for step in range(1, 12):
                writer.save(step, tree(step), {"step": step}, None)
                writer.wait()
                now = len(read)
                while len(read) < now + 2 and not any(one.done() for one in readers):
                    time.sleep(0.01)  # or a busy machine's readers would never keep up
        finally:
            writer.close()
            over.set()
        for one in readers:
            one.result()
    assert len(set(read)) > 2
    assert not [line for line in said if "damaged" in line]


def test_a_bucket_holds_what_a_directory_would(bucket, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    opened = Checkpoints("s3://bucket/x", CheckpointConfig(keep_last=2, keep_best=1))
    assert opened.latest_step() is None
    reader = Checkpoints("s3://bucket/x")
    for step, top1 in ((1, 0.9), (2, 0.5), (3, None), (4, 0.6)):
        opened.save(step, tree(step), {"step": step}, top1 and {"top1": top1})
        opened.wait()
        state, meta = reader.restore(tree(0))
        assert meta == {"step": step}
        assert_trees_equal(state, tree(step))
    assert sorted(path.name for path in opened.directory.iterdir()) == ["1", "3", "4"]
    opened.rate(3, {"top1": 0.95})
    assert (reader.latest_step(), reader.best_step(), reader.evaluated_step()) == (4, 3, 3)
    assert_trees_equal(reader.read("evaluated")[0]["a"], tree(3)["a"])
    opened.close()
    reader.close()
    assert list(tmp_path.iterdir()) == []  # what was on this machine of it

    for key in sorted(Objects.held):
        if not key.startswith("bucket/x/4/"):
            continue
        whole, said = Objects.held.pop(key), []
        for bad in (None, whole[:-1], whole[:-1] + b"~", whole + b"x"):
            Objects.held |= {} if bad is None else {key: bad}
            again = Checkpoints("s3://bucket/x", say=said.append)
            assert again.restore(tree(0))[1] == {"step": 3}
            again.close()
        Objects.held[key] = whole
        assert len(said) == 4
        assert "checkpoint 4 in s3://bucket/x is " in said[0]

    Objects.held["bucket/x/4/meta/metadata"] += b"x"
    Objects.held["bucket/x/5/state/cut-off"] = b"x"
    again = Checkpoints("s3://bucket/x", CheckpointConfig(), 3, staging=tmp_path / "staging")
    assert sorted(path.name for path in again.directory.iterdir()) == ["1", "3", "4.damaged"]
    again.save(4, tree(40), {"step": 4}, None)
    again.wait()
    assert_trees_equal(again.restore(tree(0))[0], tree(40))
    again.close()
    assert list(tmp_path.iterdir()) == []


def test_a_bucket_that_fails_while_it_is_written(bucket, monkeypatch):
    opened = Checkpoints("s3://bucket/x", CheckpointConfig())
    opened.save(1, tree(1), {}, None)
    opened.wait()
    write = seals.write

    def fails(directory, seal):
        raise PermissionError("Forbidden")

    monkeypatch.setattr(seals, "write", fails)
    opened.save(2, tree(2), {}, None)
    with pytest.raises(
        UserError, match=r"checkpoint 2 .* to s3://bucket/x \(Forbidden\); .* step 1:"
    ):
        opened.wait()
    assert not [key for key in Objects.held if key.startswith("bucket/x/2")]
    monkeypatch.setattr(seals, "write", write)
    opened.save(2, tree(2), {}, None)
    opened.wait()
    assert opened.latest_step() == 2
    bucket("forbids")
    with pytest.raises(UserError, match=r"s3://bucket/x cannot be used \(PermissionError"):
        opened.latest_step()
    opened.close()


def test_a_state_resumed_on_other_devices_is_bit_equal(checkpoints, meshes, rng):
    tx, _ = Adam().build(10, 5)
    state = create_state(tiny_resnet(), tx, 0, (8, 8, 3), UNIT_STATS, ema=True)
    state, _ = jax.jit(functools.partial(train_step, ema_decay=0.9))(state, random_batch(rng))
    checkpoints.save(1, distributed.put_replicated(meshes[1], state).arrays(), {}, None)
    checkpoints.wait()
    for mesh in meshes:
        template = distributed.put_replicated(mesh, jax.tree.map(jnp.zeros_like, state))
        restored, _ = checkpoints.restore(template.arrays())
        assert_trees_equal(restored, state.arrays())
        assert {len(x.sharding.device_set) for x in jax.tree.leaves(restored)} == {mesh.size}


@pytest.mark.parametrize(
    "fields", [{"keep_last": 0}, {"keep_best": -1}, {"every_steps": 0}, {"every_evals": 0}]
)
def test_bad_fields(fields):
    with pytest.raises(UserError, match=f"checkpoint.{next(iter(fields))}="):
        CheckpointConfig(**fields)
