"""The launchers of clusters, as far as a machine without one can try them: they parse and agree."""

import pathlib
import re
import shlex
import subprocess

import pytest
import yaml

from experiments import imagenet_resnet
from flax_resnet.cli import experiment
from flax_resnet.distributed.hosts import Hosts, find
from flax_resnet.distributed.preemption import EXIT_PREEMPTED
from flax_resnet.errors import UserError

LAUNCH = pathlib.Path(__file__).parents[2] / "experiments" / "launch"
SBATCH, TPU = LAUNCH / "slurm.sbatch", LAUNCH / "tpu.sh"
JOBSET = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
SKY = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
HOST = JOBSET["spec"]["replicatedJobs"][0]
JOB = HOST["template"]["spec"]
POD = JOB["template"]["spec"]
TRAIN = POD["containers"][0]
EXIT_BAD_INPUT = UserError.status


def flags_of(words):
    """What a command line from -m on asks for; its flags are parsed."""
    assert words[:2] == ["-m", "experiments.imagenet_resnet"]
    return experiment.chosen_by(imagenet_resnet.get_config, "runs", words[2:])


@pytest.mark.parametrize("script", [SBATCH, TPU])
def test_scripts_parse_and_know_the_statuses(script):
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    assert f"EXIT_PREEMPTED={EXIT_PREEMPTED} " in text
    example = re.search(r"-m experiments\.imagenet_resnet(?:[^\n]*\\\n#)*[^\n]*", text)[0]
    flags_of(shlex.split(example.replace("\\\n#", " ")))


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        (SBATCH, [], "no command"),
        (TPU, [], "expected keep, create"),
        (TPU, ["strat"], "strat: expected keep, create"),
        (TPU, ["keep"], "keep: no command"),
        (TPU, ["run", "-m", "x"], "$NAME is not set"),
    ],
)
def test_bad_input_is_one_line(script, words, message, clean_environment):
    ran = subprocess.run(
        ["bash", script, *words], env=clean_environment, capture_output=True, text=True
    )
    assert (ran.returncode, ran.stdout) == (EXIT_BAD_INPUT, "")
    assert re.fullmatch(rf"error: {re.escape(message)}.*\n", ran.stderr)


@pytest.mark.parametrize("index", range(JOB["completions"]))
def test_each_pod_of_a_jobset_finds_its_place(index):
    environ = {variable["name"]: variable["value"] for variable in TRAIN["env"]}
    environ |= {"JOB_COMPLETION_INDEX": str(index)}  # Kubernetes adds it in an indexed Job
    name, network = JOBSET["metadata"]["name"], JOBSET["spec"]["network"]
    pod = f"{name}-{HOST['name']}-0-0.{network['subdomain']}"
    port = TRAIN["ports"][0]["containerPort"]
    assert find(Hosts(), environ) == (f"{pod}:{port}", JOB["completions"], index, ())


def test_the_jobset_agrees_with_itself():
    assert (JOB["completionMode"], JOB["backoffLimit"], HOST["replicas"]) == ("Indexed", 0, 1)
    assert JOB["parallelism"] == JOB["completions"]
    assert JOBSET["spec"]["network"]["enableDNSHostnames"]
    exit_codes = JOB["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert (exit_codes["containerName"], exit_codes["values"]) == (
        TRAIN["name"],
        [EXIT_BAD_INPUT, EXIT_PREEMPTED],
    )
    assert {one["name"] for one in TRAIN["volumeMounts"]} == {one["name"] for one in POD["volumes"]}
    assert TRAIN["command"][:2] == ["python", "-u"]
    chosen = flags_of(TRAIN["command"][2:])
    mounts = [one["mountPath"] for one in TRAIN["volumeMounts"] if not one.get("readOnly")]
    assert str(pathlib.Path(chosen.workdir).parent) in mounts


@pytest.mark.parametrize("rank", range(2))
def test_each_machine_of_skypilot_finds_its_place(rank, clean_environment):
    variables, command = SKY["run"].split("exec .venv/bin/python -u ")
    sky = {"SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.9", "SKYPILOT_NUM_NODES": "2"}
    environ = clean_environment | sky | {"SKYPILOT_NODE_RANK": str(rank)}
    words = ["bash", "-c", f"{variables}env -0"]
    ran = subprocess.run(words, env=environ, stdout=subprocess.PIPE, text=True, check=True)
    environ = dict(one.split("=", 1) for one in ran.stdout.split("\0")[:-1])
    assert find(Hosts(), environ) == ("10.0.0.4:8476", 2, rank, ())
    chosen = flags_of(shlex.split(command.replace("\\\n", " ")))
    assert {chosen.config.data.data_dir, str(pathlib.Path(chosen.workdir).parent)} == {
        *SKY["file_mounts"]
    }


def test_the_skypilot_task():
    assert SKY["resources"]["job_recovery"]["recover_on_exit_codes"] == [EXIT_PREEMPTED]
    assert SKY["num_nodes"] >= 2
    subprocess.run(["bash", "-n", "-c", SKY["setup"]], check=True)


def test_the_launchers_are_listed():
    listed = re.findall(r"^\| `([\w.]+)` \|", (LAUNCH / "README.md").read_text(), re.MULTILINE)
    files = {path.name for path in LAUNCH.iterdir() if path.is_file()}
    assert {*listed} == files - {"README.md", "__init__.py"}
