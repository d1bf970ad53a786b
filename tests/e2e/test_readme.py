"""What the README and the shipped YAML files promise is run: their commands in order, in a copy of the project."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from configs.load import load_config
from configs.schema import Config
from model.costs.parameters import parameters
from tests.helpers import ROOT, command, environment, metrics, run, shipped_configurations

# The commands run as they stand, only shorter.
SHORT = "--training.steps={steps} --schedule.warmup_steps=1 --validation.samples=2 --logging.every_steps=1"
LARGEST = 50_000_000  # parameters of a configuration that trains here


def commands(page: str) -> list[str]:
    """The lines of all ```bash blocks of a page."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [
        line for block in blocks for line in block.splitlines() if line and not line.startswith(("#", ". "))
    ]  # execute() stands for the activation


def execute(line: str, folder: Path, timeout: float = 110) -> str:
    program = shutil.which(shlex.split(line)[0], path=environment()["PATH"])
    assert program, line
    arguments = [program, *shlex.split(line)[1:]]
    result = subprocess.run(arguments, cwd=folder, env=environment(), capture_output=True, text=True, timeout=timeout)
    assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project as a clone has it, with the text already prepared by the README's first command."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("configs", "data_pipeline", "examples/tasks", "launch", "model", "pretrain"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for task in (folder / "examples/tasks").glob("*.jsonl"):
        task.write_text("".join(task.read_text().splitlines(keepends=True)[:2]))
    shutil.copy(ROOT / "pyproject.toml", folder)
    assert "written to data/stdlib" in execute(commands("README.md")[0], folder)
    return folder


def execute_forked(line: str, folder: Path) -> str:
    """The same in forked processes, as many as its launcher would start, called as tests/dist/test_training.py calls it."""
    launcher, script, arguments = re.fullmatch(r"(.*?)(launch/\w+\.py)(.*)", line, re.DOTALL).groups()  # type: ignore[union-attr]
    named = re.search(r"--num_accelerators (\d+)", launcher)
    processes = int(named[1]) if named else 1
    *started, _, _ = command([], "deepspeed", processes)  # the port, which is its own there
    assert launcher.split() == ([Path(started[0]).name, *started[1:]] if named else ["python"]), line
    result = run([script, *shlex.split(arguments)], processes=processes, folder=folder)
    assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.mark.timeout(300)
def test_readme_commands_run_in_order(copy: Path) -> None:
    train, resume, evaluate, generate, export = commands("README.md")[1:]
    assert "done" in execute_forked(f"{train} {SHORT.format(steps=2)}", copy)
    assert "at step 2" in execute_forked(f"{resume} {SHORT.format(steps=3)}", copy)
    assert len(metrics(copy / "runs/quickstart_cpu")) == 3 + 2  # three steps, two validations
    output = execute_forked(evaluate, copy)
    assert all(name in output for name in ("loss", "perplexity", "bits_per_byte", "unigram_loss"))
    assert execute_forked(generate, copy).startswith("def read_")
    assert "written exported" in execute_forked(export, copy)
    # The short trial, which the page offers to those who have just done all this.
    (added,) = re.findall(r"For a short trial add `([^`]+)`", (ROOT / "README.md").read_text(encoding="utf-8"))
    short = "--validation.samples=2 --data.sequence_length=32"
    assert "done    runs/trial: 20 steps" in execute_forked(f"{train} {added} {short}", copy)


def test_getting_started_shows_the_readmes_commands() -> None:
    known = {" ".join(shlex.split(line)[:2]) for line in commands("README.md")}
    assert {" ".join(shlex.split(line)[:2]) for line in commands("docs/getting_started.md")} <= known
    assert commands("docs/getting_started.md")[:2] == commands("README.md")[:2]


@pytest.mark.parametrize("path", shipped_configurations(for_a_cluster=False), ids=lambda path: path.name)
def test_every_shipped_configuration_trains(copy: Path, path: Path) -> None:
    """Those for a cluster are built in tests/unit/configs/test_cluster_configs.py."""
    size = sum(parameters(load_config(path, world_size=1).resolved(tokenizer_size=4096).model).values())
    assert size < LARGEST, f"{path.name}: too large to train here; one for a cluster begins with the line `# Processes: N`"
    overrides = [f"--run.folder=runs/{path.stem}_short", *SHORT.format(steps=2).split()]
    config = load_config(path, world_size=1)
    if not config.data.streams:
        overrides.append("--data.path=data/stdlib")
    if config.validation.sets:  # of text that other commands prepare
        overrides.append(f"--validation.sets={{{', '.join(f'{name}: data/stdlib' for name in config.validation.sets)}}}")
    if config.gha.stage == "schedule":
        overrides += ["--gha.warmup_steps=0", "--gha.vote_at_step=1", "--gha.vote_batches=2"]
    arguments = [str(ROOT / "launch/pretrain.py"), "--config", str(path.relative_to(ROOT)), *overrides]
    result = run(arguments, folder=copy)
    assert result.returncode == 0, result.stderr
    assert "done" in result.stdout


def test_links_and_paths_of_the_pages_exist() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_pages_name_real_configuration_fields() -> None:
    sections = {name: info.annotation for name, info in Config.model_fields.items()}
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for section, field in re.findall(r"`-*(\w+)\.(\w+)[`=:]", page.read_text(encoding="utf-8")):
            if section in sections and field not in ("yaml", "pt", "safetensors", "gguf", "NAME"):  # of files and tensors
                assert field in getattr(sections[section], "model_fields", {}), f"{page.name}: {section}.{field}"
