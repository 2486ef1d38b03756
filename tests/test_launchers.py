"""The launchers of clusters, as far as a machine without one can try them: stubs and schemas."""

import copy
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys

import jsonschema
import pytest
import yaml

from experiments import imagenet_resnet
from flax_resnet import main
from flax_resnet.clusters import Cluster
from flax_resnet.errors import UserError
from flax_resnet.hosts import Hosts, find
from flax_resnet.preemption import EXIT_PREEMPTED

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "experiments" / "launch"
SBATCH, TPU = LAUNCH / "slurm.sbatch", LAUNCH / "tpu.sh"
JOBSET = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
SKY = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
SCHEMA = json.loads(pathlib.Path(__file__).with_name("jobset_schema.json").read_text())
HOST = JOBSET["spec"]["replicatedJobs"][0]
JOB = HOST["template"]["spec"]
POD = JOB["template"]["spec"]
TRAIN = POD["containers"][0]
COMMAND = ["-m", "experiments.digits", "--workdir", "a run's b", "*", ""]
LONG_SLEEP = "exec -a sleeper sleep 60"
EXIT_BAD_INPUT = UserError.status


class Machine:
    """Commands in place of a cluster's own, which note how they are called."""

    def __init__(self, path):
        self.path = path
        (path / "bin").mkdir()
        self.environ = {
            "PATH": f"{path / 'bin'}:{os.environ['PATH']}", "HOME": str(path), "T": str(path),
            "PYTHON": "python",
        }  # fmt: skip

    def stub(self, name, body):
        file = self.path / "bin" / name
        note = f"printf '%s\\0' {name} \"$@\" >>$T/calls\nprintf '\\n\\0' >>$T/calls"
        file.write_text(f"#!/usr/bin/env bash\n{note}\n{body}\n")
        file.chmod(0o755)

    def calls(self):
        calls = (self.path / "calls").read_text().split("\n\0")[:-1]
        return [call.split("\0")[:-1] for call in calls]

    def run(self, *words, **environ):
        return subprocess.run(
            ["bash", *map(str, words)], env=self.environ | environ, cwd=self.path,
            capture_output=True, text=True, timeout=180, check=False,
        )  # fmt: skip


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def flags_of(words):
    """Checks what follows Python's -u: a module, and flags that are its own."""
    assert words[:2] == ["-m", "experiments.imagenet_resnet"]
    return main.chosen_by(imagenet_resnet.get_config, "runs", words[2:])


@pytest.mark.parametrize("script", [SBATCH, TPU])
def test_scripts_parse_and_know_the_statuses(script):
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    assert f"EXIT_PREEMPTED={EXIT_PREEMPTED} " in text
    example = re.search(r"-m experiments\.imagenet_resnet(?:[^\n]*\\\n#)*[^\n]*", text)[0]
    flags_of(shlex.split(example.replace("\\\n#", " ")))


# Slurm


@pytest.fixture
def slurm(machine):
    machine.stub("srun", "exit ${SRUN_STATUS:-0}")
    machine.stub("scontrol", "exit ${SCONTROL_STATUS:-0}")
    machine.environ |= {"SLURM_JOB_ID": "77", "SLURM_CPUS_PER_TASK": "8"}
    return machine


@pytest.mark.parametrize(
    ("status", "requeued"), [(0, False), (1, False), (2, False), (75, True), (137, False)]
)
def test_slurm_queues_again_what_was_preempted(slurm, status, requeued):
    ran = slurm.run(SBATCH, *COMMAND, SRUN_STATUS=str(status))
    assert (ran.returncode, ran.stderr) == (status, "")
    first, *rest = slurm.calls()
    options, command = first[1 : first.index("python")], first[first.index("python") :]
    assert options == ["--kill-on-bad-exit=0", "--wait=60", "--cpus-per-task=8"]
    assert command == ["python", "-u", *COMMAND]
    assert rest == ([["scontrol", "requeue", "77"]] if requeued else [])
    assert ("queued again" in ran.stdout) == requeued


def test_slurm_says_when_it_cannot_queue_again(slurm):
    assert slurm.run(SBATCH, *COMMAND, SRUN_STATUS="75", SCONTROL_STATUS="4").returncode == 4


def test_slurm_without_a_command(slurm):
    ran = slurm.run(SBATCH)
    assert (ran.returncode, ran.stdout) == (EXIT_BAD_INPUT, "")
    assert "error: no command" in ran.stderr
    assert not (slurm.path / "calls").exists()


def test_a_slurm_job_that_is_cancelled_stays_so(slurm):
    """Slurm's SIGTERM to the script itself, as scancel --full sends it: it ends, for good."""
    slurm.stub("srun", f"echo started; {LONG_SLEEP}")
    job = subprocess.Popen(
        ["bash", SBATCH, *COMMAND], env=slurm.environ, cwd=slurm.path, stdout=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    try:
        assert job.stdout.readline() == b"started\n"
        job.terminate()
        assert job.wait(10) == -signal.SIGTERM
    finally:
        os.killpg(job.pid, signal.SIGKILL)
        job.stdout.close()
    assert [call[0] for call in slurm.calls()] == ["srun"]


def test_slurms_options():
    options = re.findall(r"^#SBATCH (\S+)$", SBATCH.read_text(), re.MULTILINE)
    # Not B:, which tells the script alone; one task a node.
    assert {"--signal=TERM@120", "--requeue", "--ntasks-per-node=1", "--open-mode=append"} <= {
        *options
    }
    lines = SBATCH.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not [line for line in lines[first:] if line.startswith("#SBATCH")]  # Slurm stops there


# srun's part: two tasks of one node. The first time all processes of the step get SIGTERM, as
# Slurm sends it before the time limit.
SRUN = """
import os, signal, subprocess, sys, time
command = sys.argv[4:]  # after srun's three options
step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_NODEID": "0",
        "SLURM_STEP_TASKS_PER_NODE": "2"}
tasks = []
for i in range(2):
    own = {**os.environ, **step, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}
    tasks.append(subprocess.Popen(command, env=own, start_new_session=True))
metrics = "w/metrics.jsonl"
if not os.path.exists(metrics):
    end = time.monotonic() + 120
    while time.monotonic() < end and not (os.path.exists(metrics) and os.path.getsize(metrics)):
        time.sleep(0.05)
    for task in tasks:
        os.killpg(task.pid, signal.SIGTERM)
sys.exit(max(task.wait() % 256 for task in tasks))
"""


@pytest.mark.slow
def test_a_run_is_stopped_by_slurm_and_goes_on(slurm, digits_dir, clean_environment):
    (slurm.path / "srun.py").write_text(SRUN)
    slurm.stub("srun", f'exec {sys.executable} $T/srun.py "$@"')
    words = [
        "-m", "experiments.digits", "--workdir", "w", "--num-steps", "150", "--batch-size", "32",
        "--model.stage-sizes", "1", "--model.num-filters", "4", "--log-every-steps", "5",
        "--data.resident-mb", "0", "--data.num-workers", "1",
    ]  # fmt: skip
    environ = clean_environment | slurm.environ | {
        "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "TFDS_DATA_DIR": digits_dir,
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    first = slurm.run(SBATCH, *words, **environ)
    assert first.returncode == EXIT_PREEMPTED, first.stderr
    assert slurm.calls()[-1] == ["scontrol", "requeue", "77"]
    step = re.search(r"stopped at step (\d+) of 150", first.stderr + first.stdout)[1]
    second = slurm.run(SBATCH, *words, **environ)
    assert second.returncode == 0, second.stderr
    assert f"on 2 x cpu; resumes at step {step}" in second.stdout
    assert json.loads((slurm.path / "w" / "result.json").read_text())["step"] == 150


# Kubernetes


def errors(manifest):
    return [e.json_path for e in jsonschema.Draft202012Validator(SCHEMA).iter_errors(manifest)]


def test_the_jobset_is_one():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert errors(JOBSET) == []


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        ("$.spec.failurePolicy", "maxRestart", 3),
        ("$.spec.failurePolicy.rules[0]", "action", "Restart"),
        ("$.spec.replicatedJobs[0].template.spec", "completions", "4"),
        ("$.spec.replicatedJobs[0].template.spec.template.spec", "restartPolicy", "Always"),
        ("$.spec.replicatedJobs[0].template.spec.template.spec.containers[0]", "envs", []),
        ("$.spec.replicatedJobs[0].template.spec.template.spec.containers[0].env[1]", "value", 4),
    ],
)
def test_the_schema_finds_mistakes(where, name, value):
    changed = copy.deepcopy(JOBSET)
    place = changed
    for key in re.findall(r"\.(\w+)|\[(\d+)\]", where):
        place = place[key[0] or int(key[1])]
    place[name] = value
    assert errors(changed)[0].startswith(where)


@pytest.mark.parametrize("index", range(JOB["completions"]))
def test_each_pod_finds_its_place(index):
    said = {one["name"]: one["value"] for one in TRAIN["env"]}
    # What Kubernetes adds to a pod of an indexed Job.
    said |= {"JOB_COMPLETION_INDEX": str(index), "KUBERNETES_SERVICE_HOST": "10.96.0.1"}
    count, network = JOB["completions"], JOBSET["spec"]["network"]
    pod = f"{JOBSET['metadata']['name']}-{HOST['name']}-0-0.{network['subdomain']}"
    port = TRAIN["ports"][0]["containerPort"]
    assert find(Hosts(), said) == Cluster("Kubernetes", f"{pod}:{port}", count, index)


def test_the_jobset_agrees_with_itself():
    assert JOB["completionMode"] == "Indexed"
    assert JOB["parallelism"] == JOB["completions"]
    assert HOST["replicas"] == 1
    assert JOBSET["spec"]["network"]["enableDNSHostnames"]
    assert {one["name"] for one in TRAIN["volumeMounts"]} == {one["name"] for one in POD["volumes"]}
    assert TRAIN["command"][:2] == ["python", "-u"]
    chosen = flags_of(TRAIN["command"][2:])
    mounts = [one["mountPath"] for one in TRAIN["volumeMounts"] if not one.get("readOnly")]
    assert str(pathlib.Path(chosen.workdir).parent) in mounts


def ends_with(status=None, condition=None):
    """What JobSet does when a pod ends so: the Job's rules, then the JobSet's, in order."""
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(JOB["podFailurePolicy"]["rules"]):
        codes = rule.get("onExitCodes", {})
        if status is not None and status in codes.get("values", []):
            assert (codes["operator"], codes["containerName"]) == ("In", TRAIN["name"])
            what = f"Container {TRAIN['name']} for pod n/p failed with exit code {status}"
        elif {"type": condition, "status": "True"} in rule.get("onPodConditions", []):
            what = f"Pod n/p has condition {condition}"
        else:
            continue
        reason = "PodFailurePolicy"
        message = f"{what} matching {rule['action']} rule at index {index}"
        break
    for rule in JOBSET["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(p, message) for p in patterns):
            return rule["action"]
    return "RestartJobSet"


def test_what_a_jobset_does_when_a_pod_ends():
    assert JOB["backoffLimit"] == 0
    assert ends_with(EXIT_BAD_INPUT) == "FailJobSet"
    assert ends_with(EXIT_PREEMPTED) == "RestartJobSetAndIgnoreMaxRestarts"
    assert ends_with(143, "DisruptionTarget") == "RestartJobSetAndIgnoreMaxRestarts"
    assert ends_with(1) == ends_with(137) == "RestartJobSet"


# Cloud TPU

GCLOUD = """
case "$*" in
  *"queued-resources describe"*)
    [[ -s $T/states ]] || exit 1
    head -n 1 $T/states
    (($(wc -l <$T/states) == 1)) || sed -i 1d $T/states ;;
  *"queued-resources create"*) printf 'PROVISIONING\\nACTIVE\\n' >$T/states ;;
  *"queued-resources delete"*) rm $T/states ;;
  *"--command=cd flax_resnet"*)
    end=$(head -n 1 $T/ends)
    sed -i 1d $T/ends
    for word in $end; do
      case $word in
        lost) lost=1 ;;
        preempted) echo SUSPENDED >$T/states ;;
        *) echo "step 1"; echo "flax_resnet ended with status $word" ;;
      esac
    done
    exit ${lost:-0} ;;
esac"""


@pytest.fixture
def tpu(machine):
    machine.stub("gcloud", GCLOUD)
    machine.stub("git", "")
    machine.environ |= {
        "NAME": "n", "ZONE": "z", "TYPE": "v6e-16", "VERSION": "v", "POLL_SECONDS": "0",
        "PID_FILE": str(machine.path / "pid"),
    }  # fmt: skip
    return machine


def actions(machine):
    """What was asked of gcloud, in short; without questions about the state."""
    kinds = {"create": "create", "delete": "delete", "scp": "copy", "--command=set": "install",
             "--command=cd": "run"}  # fmt: skip
    calls = [call for call in machine.calls() if call[0] == "gcloud" and "describe" not in call]
    firsts = [[word.split(" ")[0] for word in call] for call in calls]
    return [next(kinds[word] for word in words if word in kinds) for words in firsts]


START = ["create", "copy", "install", "run"]


@pytest.mark.parametrize(
    ("ends", "status", "expected"),
    [
        (["0 0"], 0, START),
        (["75 75", "0 0"], 0, [*START, "run"]),
        (["2 1"], 2, START),
        (["2 lost"], 2, START),
        (["1 1"], 1, START),
        (["1 137"], 137, START),
        (["1 75"], 1, START),
        (["75 lost", "0 0"], 0, [*START, "run"]),
        (["preempted lost", "0 0"], 0, [*START, "delete", *START]),
        (["preempted 1 1", "75 75", "0 0"], 0, [*START, "delete", *START, "run"]),
        (["75 75"] * 3, 75, [*START, "run", "run"]),
    ],
)
def test_a_tpu_run_is_kept_going(tpu, ends, status, expected):
    (tpu.path / "ends").write_text("".join(f"{end}\n" for end in ends))
    ran = tpu.run(TPU, "keep", *COMMAND, RESTARTS="2")
    assert (ran.returncode, ran.stderr) == (status, "")
    assert actions(tpu) == expected


def test_a_tpu_slice_is_asked_for_and_given_back(tpu):
    where = ["gcloud", "compute", "tpus", "queued-resources"]
    assert tpu.run(TPU, "create").returncode == 0
    assert tpu.run(TPU, "create").returncode == 0  # it is there
    assert tpu.run(TPU, "delete").returncode == 0
    assert tpu.run(TPU, "create", SPOT="").returncode == 0
    first, gone, second = [call for call in tpu.calls() if "describe" not in call]
    flags = ["--zone=z", "--node-id=n", "--accelerator-type=v6e-16", "--runtime-version=v"]
    assert first == [*where, "create", "n", *flags, "--spot"]
    assert gone == [*where, "delete", "n", "--zone=z", "--force", "--quiet"]
    assert second == first[:-1]


def test_a_tpu_slice_that_is_not_to_be_had(tpu):
    tpu.stub("gcloud", GCLOUD.replace("PROVISIONING\\nACTIVE", "FAILED"))
    assert tpu.run(TPU, "create").returncode == 1
    ran = tpu.run(TPU, "keep", *COMMAND, RESTARTS="1")
    assert ran.returncode == 255
    assert actions(tpu) == ["create", "delete", "create", "delete", "create"]


def test_all_hosts_of_a_tpu_slice_run_the_command(tpu):
    """gcloud's part is played by a shell for each of two hosts."""
    hosts = 'for i in 0 1; do (cd $T/$i && PID_FILE=$T/$i/pid bash -c "${@: -1:1}"); done'
    tpu.stub("gcloud", f'set -- "${{@#--command=}}"\n{hosts}')
    for i in range(2):
        (tpu.path / str(i)).mkdir()
        (tpu.path / str(i) / "flax_resnet").symlink_to(ROOT)
    tpu.stub("python", "[[ $PID_FILE == */1/pid ]] || exit 75")
    ran = tpu.run(TPU, "run", *COMMAND)
    assert ran.returncode == EXIT_PREEMPTED
    assert ran.stdout.splitlines() == [f"flax_resnet ended with status {n}" for n in (75, 0)]
    assert tpu.calls()[1:] == [["python", "-u", *COMMAND]] * 2
    assert not (tpu.path / "0" / "pid").exists()


def test_what_a_lost_connection_left_on_a_host_is_ended_first(tpu):
    left = subprocess.Popen(["sleep", "60"])
    try:
        (tpu.path / "pid").write_text(f"{left.pid}\n")
        tpu.stub("python", f"kill -0 {left.pid} 2>/dev/null && exit 9; exit 75")
        command = ["bash", TPU, "worker", *COMMAND]
        worker = subprocess.Popen(command, env=tpu.environ, stdout=subprocess.PIPE, text=True)
        assert left.wait(10) == -signal.SIGTERM
        assert worker.communicate(timeout=20)[0] == "flax_resnet ended with status 75\n"
    finally:
        left.kill()


def test_stopping_a_tpu_run(tpu):
    tpu.stub("gcloud", 'set -- "${@#--command=}"\nbash -c "${@: -1:1}"')
    running = subprocess.Popen(["sleep", "60"])
    try:
        (tpu.path / "pid").write_text(f"{running.pid}\n")
        assert tpu.run(TPU, "stop").returncode == 0
        assert running.wait(10) == -signal.SIGTERM
    finally:
        running.kill()


def test_what_is_installed_on_a_tpu_slice(tpu):
    ran = tpu.run(TPU, "install")
    assert (ran.returncode, ran.stderr) == (0, "")
    archive, copy_, install = tpu.calls()
    assert pathlib.Path(archive[2]).resolve() == ROOT
    tar = archive[4].removeprefix("--output=")
    assert copy_[4:] == ["scp", tar, "n:", "--zone=z", "--worker=all"]
    assert "-e flax_resnet" in install[-1]
    assert not pathlib.Path(tar).parent.exists()
    tpu.stub("git", "exit 7")
    assert tpu.run(TPU, "install").returncode == 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected keep, create"),
        (["strat"], "strat: expected keep, create"),
        (["keep"], "keep: no command"),
        (["run", "-m", "x"], "$ZONE is not set"),
    ],
)
def test_tpu_bad_input_is_one_line(tpu, words, message):
    ran = tpu.run(TPU, *words, ZONE="")
    assert (ran.returncode, ran.stdout) == (EXIT_BAD_INPUT, "")
    assert re.fullmatch(rf"error: {re.escape(message)}.*\n", ran.stderr)


# SkyPilot


@pytest.mark.parametrize("rank", range(2))
def test_each_machine_of_skypilot_finds_its_place(machine, rank):
    machine.stub("python", "env -0 >$T/env; exit 75")
    (machine.path / ".venv").mkdir()
    (machine.path / ".venv" / "bin").symlink_to(machine.path / "bin")
    said = {"SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.9", "SKYPILOT_NUM_NODES": "2"}
    ran = machine.run("-c", SKY["run"], SKYPILOT_NODE_RANK=str(rank), **said)
    assert (ran.returncode, ran.stderr) == (EXIT_PREEMPTED, "")
    environ = dict(one.split("=", 1) for one in (machine.path / "env").read_text().split("\0")[:-1])
    assert find(Hosts(), environ) == Cluster("the environment", "10.0.0.4:8476", 2, rank)
    name, unbuffered, *words = machine.calls()[0]
    assert (name, unbuffered) == ("python", "-u")
    chosen = flags_of(words)
    assert {chosen.config.data.data_dir, str(pathlib.Path(chosen.workdir).parent)} == {
        *SKY["file_mounts"]
    }


def test_the_skypilot_task():
    recovery = SKY["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [EXIT_PREEMPTED]
    assert SKY["num_nodes"] >= 2
    for script in (SKY["setup"], SKY["run"]):
        subprocess.run(["bash", "-n", "-c", script], check=True)


def test_the_launchers_are_listed():
    listed = re.findall(r"^\| `([\w.]+)` \|", (LAUNCH / "README.md").read_text(), re.MULTILINE)
    files = {path.name for path in LAUNCH.iterdir() if path.is_file()}
    assert {*listed} == files - {"README.md", "__init__.py"}
