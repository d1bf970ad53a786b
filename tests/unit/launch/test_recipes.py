"""The recipes for clusters: what they start, with what arguments, and that the page about them names what exists."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from deepspeed.launcher.runner import parse_args as deepspeed_arguments
from ruamel.yaml import YAML
from torch.distributed.run import get_args_parser

from tests.helpers import BIN, ROOT, environment, wait_until, write_run

SCRIPTS = sorted((ROOT / "launch/slurm").glob("*.sbatch"))
TRAINING = ["--config", "configs/quickstart_cpu.yaml", "--run.folder=runs/a name with spaces"]
# `srun` as a task of the second of two nodes sees it: a program that says what it was started as, then ends or waits.
SRUN = """#!/bin/bash
shift
[ "$4" = rank ] && set -- "${{@:1:4}}" python "${{@:6}}"  # a study names its interpreter by its path
echo $$ > {folder}/pid
export SLURM_NODEID=1 SLURM_PROCID=3 SLURM_LOCALID=1 SLURM_NTASKS=4 SLURM_NTASKS_PER_NODE=2 SLURMD_NODENAME=node2
PATH={folder}/programs:$PATH exec "$@"
"""
PROGRAM = """#!/bin/bash
trap 'sleep 0.3; echo saved >> {folder}/calls; exit 130' TERM
python3 -c 'import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))' "${{0##*/}}" "$@" > {folder}/task.new
mv {folder}/task.new {folder}/task
while [ -e {folder}/wait ]; do sleep 0.05; done
exit "$(cat {folder}/status)"
"""


class Slurm:
    """A folder in which a batch script runs, with Slurm's commands and the programs it starts replaced by such as write down
    how they were called."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder = folder
        write_command(folder / "commands/srun", SRUN.format(folder=folder))
        note = f'#!/bin/sh\necho "${{0##*/}}" "$@" >> {folder}/calls\n'
        write_command(folder / "commands/scontrol", note + 'printf "node1\\nnode2\\n"\n')
        write_command(folder / "commands/scancel", note + f'kill -TERM "$(cat {folder}/pid)"\n')
        for program in ("torchrun", "python"):
            write_command(folder / "programs" / program, PROGRAM.format(folder=folder))
        (folder / ".venv").symlink_to(BIN.parent)
        (folder / "launch").symlink_to(ROOT / "launch")
        (folder / "status").write_text("0")
        base, parts = write_run(folder, data), "{p: {grid: {run.seed: [0, 7]}}}"
        study = f"name: s\nfolder: {folder / 'study'}\nbase: {base}\nprocesses: 4\nparts: {parts}\n"
        (folder / "study.yaml").write_text(study)
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, script: Path) -> subprocess.Popen[str]:
        """A run; of the study's script its second child."""
        study = self.folder / "study.yaml"
        variables = {"SLURM_JOB_ID": "81234", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
        variables |= {"SLURM_GPUS_ON_NODE": "2", "SLURM_NTASKS": "4", "SLURM_ARRAY_TASK_ID": "2"}
        variables |= {"PATH": f"{self.folder}/commands{os.pathsep}{environment()['PATH']}"}
        process = subprocess.Popen(
            ["bash", str(script), *([str(study)] if script.name == "study.sbatch" else TRAINING)],
            cwd=self.folder,
            env=environment() | variables,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def end(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    def task(self) -> tuple[list[str], dict[str, str]]:
        """Command line and environment of the task."""
        arguments, variables = json.loads((self.folder / "task").read_text())
        return arguments, variables

    def calls(self) -> list[str]:
        """What happened after the nodes were listed: Slurm's commands with their arguments, and `saved`."""
        first, *others = (self.folder / "calls").read_text().splitlines()
        assert first == "scontrol show hostnames node[1-2]"
        return others


@pytest.fixture
def slurm(tmp_path: Path, prepared: Path) -> Iterator[Slurm]:
    made = Slurm(tmp_path, prepared)
    yield made
    made.end()


def write_command(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def torchrun_arguments(arguments: list[str]) -> Namespace:
    """What torchrun understands, by its own parser; that exits when it does not."""
    return get_args_parser().parse_args(arguments)


def finished(process: subprocess.Popen[str]) -> int:
    _, errors = process.communicate(timeout=30)
    assert errors == ""
    return process.returncode


@pytest.mark.parametrize("path", [*SCRIPTS, *(ROOT / "launch/slurm").glob("*.sh")], ids=lambda path: path.name)
def test_scripts_parse(path: Path) -> None:
    result = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_torchrun_script_starts_every_node_of_the_job(slurm: Slurm) -> None:
    assert finished(slurm.start(ROOT / "launch/slurm/torchrun.sbatch")) == 0
    (program, *arguments), _ = slurm.task()
    assert program == "torchrun"
    known = torchrun_arguments(arguments)
    assert (known.nnodes, known.nproc_per_node) == ("2", "2")
    assert (known.rdzv_backend, known.rdzv_endpoint, known.rdzv_id) == ("c10d", "node1:21234", "81234.0")
    assert (known.rdzv_conf, known.local_addr) == ("is_host=0", "node2")
    assert known.training_script == "launch/pretrain.py"
    assert known.training_script_args == ["--resume=auto", *TRAINING]
    assert known.shutdown_timeout < seconds_before_the_limit("torchrun.sbatch")
    assert slurm.calls() == []


def test_srun_script_gives_each_task_its_rank(slurm: Slurm) -> None:
    assert finished(slurm.start(ROOT / "launch/slurm/srun.sbatch")) == 0
    arguments, variables = slurm.task()
    assert arguments == ["python", "launch/pretrain.py", "--resume=auto", *TRAINING]
    expected = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    expected |= {"MASTER_ADDR": "node1", "MASTER_PORT": "21234"}
    assert {name: variables[name] for name in expected} == expected


def test_study_script_trains_the_child_of_its_number(slurm: Slurm) -> None:
    assert finished(slurm.start(ROOT / "launch/slurm/study.sbatch")) == 0
    arguments, variables = slurm.task()
    folder = slurm.folder / "study/p/7"
    assert arguments[:2] == ["python", str(ROOT / "launch/pretrain.py")]
    assert arguments[2:] == [
        "--config",
        str(slurm.folder / "run.yaml"),
        "--run.seed=7",
        f"--run.folder={folder}",
        "--resume=auto",
    ]
    expected = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    expected |= {"MASTER_ADDR": "node1", "MASTER_PORT": "21234"}
    assert {name: variables[name] for name in expected} == expected
    assert json.loads((folder / "outcome.json").read_text())["status"] == "stopped"  # it has not come to its end


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_failed_training_fails_the_job(slurm: Slurm, script: Path) -> None:
    (slurm.folder / "status").write_text("7")
    process = slurm.start(script)
    if script.name == "study.sbatch":
        assert process.communicate(timeout=30)[1].endswith("  p/7: exit status 7\n")
        assert process.returncode == 1
    else:
        assert finished(process) == 7
    assert slurm.calls() == []  # no requeue: it would fail again


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_job_near_its_time_limit_saves_and_goes_back_into_the_queue(slurm: Slurm, script: Path) -> None:
    (slurm.folder / "wait").touch()
    process = slurm.start(script)
    wait_until((slurm.folder / "task").exists, seconds=20)
    process.send_signal(signal.SIGUSR1)  # as --signal=B:USR1@… does
    assert (finished(process) == 0) == (script.name == "study.sbatch")
    assert slurm.calls() == ["scancel --signal=TERM 81234", "saved", "scontrol requeue 81234"]
    assert seconds_before_the_limit(script.name) >= 120


def seconds_before_the_limit(script: str) -> int:
    """When Slurm sends the batch script its signal."""
    text = (ROOT / "launch/slurm" / script).read_text()
    assert "#SBATCH --requeue\n" in text
    found = re.search(r"^#SBATCH --signal=B:USR1@(\d+)$", text, re.MULTILINE)
    assert found
    return int(found[1])


def test_kubernetes_job_starts_what_exists() -> None:
    job: dict[str, Any] = YAML(typ="safe").load((ROOT / "launch/kubernetes/pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert "elasticPolicy" not in job["spec"]
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"}
    for replica in replicas.values():
        assert replica["restartPolicy"] == "OnFailure"
        pod = replica["template"]["spec"]
        (container,) = pod["containers"]
        assert container["name"] == "pytorch"
        program, *arguments = container["command"] + container["args"]
        assert program == "torchrun"
        known = torchrun_arguments(arguments)
        assert known.shutdown_timeout < pod["terminationGracePeriodSeconds"]
        assert (ROOT / known.training_script).is_file()
        options = dict(argument.removeprefix("--").split("=") for argument in known.training_script_args)
        assert (ROOT / options["config"]).is_file()
        assert options["resume"] == "auto"
        assert container["resources"]["limits"]["nvidia.com/gpu"] == int(job["spec"]["nprocPerNode"])
        mounts, volumes = ({entry["name"] for entry in entries} for entries in (container["volumeMounts"], pod["volumes"]))
        assert mounts == volumes


def commands_of_the_page(program: str) -> list[list[str]]:
    """Arguments of each command of docs/clusters.md that starts with `program`, continued lines joined."""
    text = (ROOT / "docs/clusters.md").read_text(encoding="utf-8").replace("\\\n", " ")
    return [shlex.split(line, comments=True)[1:] for line in text.splitlines() if line.startswith(f"{program} ")]


def test_commands_of_the_page_are_understood() -> None:
    ours = [torchrun_arguments(arguments) for arguments in commands_of_the_page("torchrun")]
    ours += [deepspeed_arguments(arguments) for arguments in commands_of_the_page("deepspeed")]
    assert len(ours) >= 4
    for known in ours:
        script = known.training_script if hasattr(known, "training_script") else known.user_script
        assert (ROOT / script).is_file()
    batch_scripts = [argument for line in commands_of_the_page("sbatch") for argument in line if argument.endswith(".sbatch")]
    assert {ROOT / script for script in batch_scripts} == set(SCRIPTS)


def test_files_that_the_page_names_exist() -> None:
    text = (ROOT / "docs/clusters.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:launch|configs|tests|docs)/[\w./]+\.(?:py|sbatch|sh|yaml|md)\b", text))
    assert {f"launch/slurm/{path.name}" for path in SCRIPTS} | {"launch/kubernetes/pytorchjob.yaml"} <= named
    assert [name for name in named if not (ROOT / name).is_file()] == []
