"""Checkpoints in gs:// and s3://, against emulators of both on this machine. Run by hand:

    python -m venv remote && remote/bin/pip install -e '.[remote]' 'moto[server]' \
        gcp-storage-emulator
    remote/bin/python tests/faults/remote_storage.py

It starts the emulators, does what a run does and what may go wrong, and prints what it has seen.
"""

import contextlib
import http.client
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time

MIB = 2**20


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def started(command: list[str], port: int):
    """A server, from when it answers."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        else:
            raise TimeoutError(" ".join(command))
        yield
    finally:
        process.terminate()
        process.wait(20)


def request(port: int, method: str, path: str, body: dict | None = None) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    text = None if body is None else json.dumps(body)
    connection.request(method, path, text, {"content-type": "application/json"} if body else {})
    answer = connection.getresponse()
    assert answer.status in (200, 201), (method, path, answer.status, answer.read())


def said_by(*parts):
    print(*parts, flush=True)


def check(place: str) -> None:
    """All that Checkpoints does, in one bucket."""
    import jax
    import numpy as np

    from flax_resnet import seals
    from flax_resnet.checkpoint import CheckpointConfig, Checkpoints
    from flax_resnet.errors import UserError

    rng = np.random.default_rng(0)
    base = rng.normal(size=(4 * MIB,)).astype(np.float32)  # 16 MiB

    def tree(step):
        return {"w": jax.numpy.asarray(base + step), "step": jax.numpy.int32(step)}

    def equal(state, step):
        np.testing.assert_array_equal(state["w"], base + np.float32(step))
        assert int(state["step"]) == step

    opened = Checkpoints(place, CheckpointConfig(keep_last=2, keep_best=1))
    assert opened.latest_step() is None
    times = []
    for step, top1 in ((1, 0.9), (2, 0.5), (3, None), (4, 0.6)):
        began = time.perf_counter()
        opened.save(step, tree(step), {"step": step}, top1 and {"top1": top1})
        blocked = time.perf_counter() - began
        opened.wait()
        times.append((blocked, time.perf_counter() - began))
    said_by(f"  save of 16 MiB: blocks {times[-1][0]:.2f} s, sealed after {times[-1][1]:.2f} s")
    assert (opened.latest_step(), opened.best_step()) == (4, 1)
    assert sorted(p.name for p in opened.directory.iterdir()) == ["1", "3", "4"]
    opened.rate(3, {"top1": 0.95})
    assert opened.best_step() == 3

    other = Checkpoints(place)  # another process's view
    began = time.perf_counter()
    state, meta = other.restore(tree(0))
    said_by(f"  restore, verified: {time.perf_counter() - began:.2f} s")
    equal(state, 4)
    assert meta == {"step": 4}
    assert other.best_step() == 3
    equal(other.read("evaluated")[0], 3)
    opened.save(5, tree(5), {"step": 5}, None)
    opened.wait()
    assert other.latest_step() == 5  # no stale listing
    assert sorted(p.name for p in opened.directory.iterdir()) == ["3", "4", "5"]
    other.close()
    opened.close()

    step5 = opened.directory / "5"
    names = sorted(seals.read(step5).files)
    found = 0
    for name in [*names, seals.SEAL]:
        whole = (step5 / name).read_bytes()
        for how, bad in (
            ("flipped", whole[: len(whole) // 2] + b"~" + whole[len(whole) // 2 + 1 :]),
            ("truncated", whole[: len(whole) // 2]),
            ("missing", None),
        ):
            if bad == whole:
                continue
            (step5 / name).unlink() if bad is None else (step5 / name).write_bytes(bad)
            said = []
            reader = Checkpoints(place, say=said.append)
            state, _ = reader.restore(tree(0))
            reader.close()
            equal(state, 4)
            kind = "unfinished" if (name, how) == (seals.SEAL, "missing") else "damaged"
            assert len(said) == 1, said
            assert f"checkpoint 5 in {place} is {kind}" in said[0], said
            found += 1
            (step5 / name).write_bytes(whole)
    said_by(f"  {found} damages to {len(names) + 1} objects: all found, step 4 read")

    (step5 / names[0]).write_bytes(b"damaged")
    (opened.directory / "6" / "meta").mkdir(parents=True, exist_ok=True)
    (opened.directory / "6" / "meta" / "x").write_text("cut off")
    said = []
    again = Checkpoints(place, CheckpointConfig(keep_last=3), 4, said.append)
    assert sorted(p.name for p in again.directory.iterdir()) == ["3", "4", "5.damaged"]
    again.save(5, tree(50), {}, None)
    again.wait()
    equal(again.restore(tree(0))[0], 50)
    again.close()
    said_by("  damaged set aside, unfinished removed, the step saved anew")

    missing = place.replace("/bucket/", "/no-such-bucket/")
    assert Checkpoints(missing).latest_step() is None
    began = time.perf_counter()
    try:
        Checkpoints(missing, CheckpointConfig())
    except UserError as error:
        said_by(f"  no such bucket, after {time.perf_counter() - began:.1f} s: {error}")
    else:
        raise AssertionError("a bucket that is not there was written to")


def train(directory: str, work: pathlib.Path) -> None:
    """A run that stops and goes on, against an unbroken one with local checkpoints."""
    import dataclasses

    import fault_worker
    import jax
    import numpy as np

    from flax_resnet import checkpoint, preemption, train

    config = dataclasses.replace(fault_worker.get_config(), num_steps=60)
    whole = dataclasses.replace(config, checkpoint=checkpoint.CheckpointConfig(every_steps=20))
    remote = dataclasses.replace(
        config, checkpoint=checkpoint.CheckpointConfig(every_steps=20, directory=directory)
    )
    train.train_and_evaluate(whole, work / "whole", quiet=True)
    asked = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) == 33

    try:
        train.train_and_evaluate(remote, work / "remote", quiet=True, stop=stop)
    except preemption.Preempted:
        said_by("  a run stopped at step", fault_steps(directory))
    else:
        raise AssertionError("it was not stopped")
    began = time.perf_counter()
    train.train_and_evaluate(remote, work / "remote", quiet=True)
    states = []
    for place in (work / "whole" / "checkpoints", directory):
        reader = checkpoint.Checkpoints(place)
        states.append(reader.read()[0])
        reader.close()
    jax.tree.map(np.testing.assert_array_equal, *states)
    said_by(f"  went on, {time.perf_counter() - began:.1f} s: the end is bit-identical; it holds",
            fault_steps(directory))  # fmt: skip
    assert not (work / "remote" / "checkpoints").exists()


def fault_steps(directory: str) -> list[int]:
    from etils import epath

    return sorted(int(path.name) for path in epath.Path(directory).iterdir())


def main() -> None:
    gcs, s3 = free_port(), free_port()
    environment = {
        "JAX_PLATFORMS": "cpu",
        "EPATH_USE_TF": "0",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # the emulator has no such buckets
        "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{gcs}",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3}",
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    os.environ.update(environment)
    here = pathlib.Path(sys.executable).parent
    work = pathlib.Path(tempfile.mkdtemp())
    os.environ["FAULTS_DATA"] = str(work / "data")
    sys.path.insert(0, str(pathlib.Path(__file__).parent))
    commands = {
        gcs: [str(here / "gcp-storage-emulator"), "start", "--host=127.0.0.1", f"--port={gcs}",
              "--in-memory"],
        s3: [str(here / "moto_server"), "-H", "127.0.0.1", "-p", str(s3)],
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, work)
        for port, command in commands.items():
            stack.enter_context(started(command, port))
        request(gcs, "POST", "/storage/v1/b?project=p", {"name": "bucket"})
        request(s3, "PUT", "/bucket")
        from flax_resnet.datasets import prepare

        prepare.prepare("sklearn_digits", os.environ["FAULTS_DATA"])
        for scheme in sys.argv[1:] or ("gs", "s3"):
            said_by(f"{scheme}://")
            check(f"{scheme}://bucket/deep/run")
            train(f"{scheme}://bucket/training/a run", work / scheme)


if __name__ == "__main__":
    main()
