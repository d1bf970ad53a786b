"""What several tests need: small prepared text, a small run's overrides, and commands started as a user starts them."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.multiprocessing.spawn import spawn

from tests.ranks import Ranks, run_forked, run_script

if TYPE_CHECKING:
    from configs.schema import Config, ParallelConfig
    from pretrain.distributed.layout import Layout

    Opener = Callable[[ParallelConfig], AbstractContextManager[Layout]]

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
TIMEOUT = timedelta(minutes=1)  # of one collective

TINY_RUN = """
model: {attention: mhe_add, hidden_size: 16, num_layers: 2, num_heads: 8, head_dim: 4}
training: {steps: 6, global_batch_size: 8, micro_batch_size: 2}
optimizer: {lr: 1e-2}
schedule: {warmup_steps: 2}
validation: {every_steps: 3, samples: 5}
checkpoint: {every_steps: 0}
logging: {every_steps: 1, tensorboard: false}
"""


def write_text_files(folder: Path, documents: int = 60, seed: int = 0) -> Path:
    """A folder of .txt files with words of a small vocabulary in a learnable order."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    words = [
        "the",
        "cat",
        "sat",
        "on",
        "a",
        "mat",
        "and",
        "many",
        "heads",
        "attend",
        "to",
        "one",
        "key",
        "while",
        "dogs",
        "ran",
        "home",
    ]
    for number in range(documents):
        start = draw.randrange(len(words))
        text = " ".join(words[(start + i * draw.choice((1, 1, 2))) % len(words)] for i in range(draw.randrange(60, 120)))
        (folder / f"{number:03d}.txt").write_text(text + "\n", encoding="utf-8")
    return folder


def with_special_tokens(folder: Path, output: Path, names: Sequence[str]) -> Path:
    """The texts of `write_text_files(folder)` prepared with a tokenizer that has these special tokens, too."""
    import tokenizers

    from data_pipeline.prepare.prepare import PrepareOptions, prepare
    from data_pipeline.prepare.tokenizer import train

    texts = write_text_files(folder)
    made = tokenizers.Tokenizer.from_str(train([file.read_text() for file in sorted(texts.iterdir())], 300))
    made.add_special_tokens(list(names))
    made.save(str(folder.with_suffix(".json")))
    prepare(PrepareOptions((str(texts),), output, tokenizer=folder.with_suffix(".json"), split=(70, 20, 10)))
    return output


def shipped_configurations(for_a_cluster: bool) -> list[Path]:
    """The YAML files of configs/, those for a cluster or the others: every file is one of the two."""
    files = sorted(path for path in (ROOT / "configs").rglob("*") if path.suffix in (".yaml", ".yml"))
    return [path for path in files if (cluster_processes(path) is not None) == for_a_cluster]


def cluster_processes(path: Path) -> int | None:
    """N of a configuration whose first line is `# Processes: N`: it is for a cluster of so many, too large to train here."""
    found = re.fullmatch(r"# Processes: ([1-9]\d*)", path.read_text(encoding="utf-8").partition("\n")[0])
    return int(found[1]) if found else None


def write_run(folder: Path, data: Path, name: str = "run") -> Path:
    """A tiny run's YAML; its outputs go to folder / name."""
    path = folder / f"{name}.yaml"
    path.write_text(
        f"run: {{folder: {folder / name}}}\ndata: {{path: {data}, sequence_length: 16}}\n{TINY_RUN}", encoding="utf-8"
    )
    return path


def resolved(path: Path, overrides: Sequence[str] = (), world_size: int | None = None) -> Config:
    """A run's configuration as `pretrain` has it, with the run's folder made."""
    from configs.load import load_config
    from data_pipeline.read.manifest import read_manifest

    config = load_config(path, overrides, world_size=world_size)
    Path(config.run.folder).mkdir(parents=True, exist_ok=True)
    manifest = read_manifest(config.data.parts[0].path)
    return config.resolved(manifest.vocab_size, manifest.end_of_document)


def train_here(opened: Opener, config: Config, resume: Path | None = None) -> None:
    """Train to the end in a rank of a launched group; a run that resumes first saves the step at which it stands."""
    from pretrain.build import build_trainer, make_resumer
    from pretrain.loop.hooks import Checkpoints

    with opened(config.parallel) as layout:
        start = None if resume is None else make_resumer(config, layout).find(str(resume))
        trainer = build_trainer(config, layout, start)
        trainer.progress.speaks = False
        if resume is not None:
            trainer.hook(Checkpoints).save_now(trainer)
        trainer.run()
        trainer.loader.close()


def command(arguments: Sequence[str], launcher: str = "python", processes: int = 1) -> list[str]:
    """`launch/…` and its arguments as started by python, torchrun or deepspeed."""
    if launcher == "torchrun":
        prefix = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", str(processes)]
    elif launcher == "deepspeed":
        port = str(random.SystemRandom().randrange(20000, 30000))
        prefix = [str(BIN / "deepspeed"), "--log_level", "warning", "--num_accelerators", str(processes), "--master_port", port]
    else:
        assert processes == 1
        prefix = [sys.executable]
    return [*prefix, *arguments]


def environment() -> dict[str, str]:
    """This process's environment with one thread for each rank, the project's interpreter first, and no GPU.

    Tests with several ranks run on CPUs everywhere: a machine may have fewer GPUs than ranks. tests/gpu is for GPUs.
    """
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PATH": path}


def run(
    arguments: Sequence[str], launcher: str = "forked", processes: int = 1, timeout: float = 100, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a script to its end; a hang is killed with all its processes and fails.

    By default in forked processes, which takes the options of `forked`. A `launcher` by name, "python", "torchrun" or
    "deepspeed", is there to be tested itself, and takes those of `subprocess.Popen`.
    """
    if launcher == "forked":
        return _run_forked(arguments, processes, timeout, **options)
    process = start(arguments, launcher, processes, **options)
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
        raise AssertionError(f"hung: {arguments}\n{output}\n{errors}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def _run_forked(
    arguments: Sequence[str], processes: int = 1, timeout: float = 100, **options: Any
) -> subprocess.CompletedProcess[str]:
    with forked(arguments, processes, **options) as ranks:
        try:
            failed = ranks.wait(timeout)
        except TimeoutError as error:
            raise AssertionError(f"hung: {arguments}\n{error}") from None
        ranks.terminate(seconds=5)
        output, errors = ("".join(map(read, range(processes))) for read in (ranks.output, ranks.errors))
        status = 0 if failed is None else ranks.statuses()[failed]
    return subprocess.CompletedProcess(list(arguments), status or 0, output, errors)


def forked(
    arguments: Sequence[str], processes: int = 1, folder: Path = ROOT, variables: Mapping[str, str] | None = None
) -> Ranks:
    """A script as a launcher starts it, in processes that have imported everything already (see tests/ranks.py).

    `folder` is where it runs, `variables` are added to its environment. For tests of what a command does: how python starts it,
    and what launchers do, needs `start`.
    """
    environments = [{**common, **(variables or {})} for common in launched_environments(processes)]
    return Ranks(run_script, environments, [(str(folder), *arguments)] * processes)


def launched_environments(processes: int) -> list[dict[str, str]]:
    """What a launcher gives each process of one machine; one process needs no launcher."""
    if processes == 1:
        return [environment()]
    common = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    places = ({**common, "RANK": rank, "LOCAL_RANK": rank} for rank in range(processes))
    return [{**environment(), **{name: str(value) for name, value in place.items()}} for place in places]


def start(arguments: Sequence[str], launcher: str = "python", processes: int = 1, **options: Any) -> subprocess.Popen[str]:
    """Start a command in a process group of its own, its output in pipes."""
    return subprocess.Popen(
        command(arguments, launcher, processes),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def run_ranks(work: Callable[..., None], ranks: int, *arguments: Any, seconds: float = 100, gpus: bool = False) -> None:
    """Run `work(rank, *arguments)` in so many processes to its end; what fails in one ends all and is raised here.

    The processes are forks without GPUs (see tests/ranks.py); with `gpus`, new interpreters.
    """
    variables = {**os.environ, "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    if not gpus:
        variables |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        run_forked(work, ranks, *arguments, environment=variables, seconds=seconds)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        context = spawn(_run, (work, *arguments), nprocs=ranks, join=False)
    assert context is not None
    deadline = time.monotonic() + seconds
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, f"{work.__module__}: ranks hang"
    finally:
        for process in context.processes:
            process.kill()


def _run(rank: int, work: Callable[..., None], *arguments: Any) -> None:
    work(rank, *arguments)
    sys.stdout.flush()
    os._exit(0)  # while the interpreter takes itself down, threads of process groups now and then abort the process


@contextmanager
def joined(rank: int, ranks: int, folder: Path, tensor: int = 1) -> Iterator[Layout]:
    """In a process of `run_ranks`: one thread, and for a `with` block an open layout, whose ranks find a file in `folder`."""
    from pretrain.distributed.layout import Layout

    torch.set_num_threads(1)
    layout = Layout(rank, ranks, rank, ranks, sizes={"tensor": tensor})
    with layout.opened(torch.distributed.FileStore(f"{folder}/rendezvous", ranks), TIMEOUT):
        yield layout


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


@contextmanager
def launched_as(rank: int, ranks: int, port: int) -> Iterator[Opener]:
    """In a process of `run_ranks`: as a launcher would have started it, with one thread.

    Yields a function that opens the layout of a configuration for a `with` block; every rank opens the same ones in turn.
    """
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in numbers.items()}, MASTER_ADDR="127.0.0.1")
    from pretrain.distributed.layout import Layout
    from pretrain.distributed.process import prepare_process
    from pretrain.distributed.rendezvous import wait_for_ranks

    alone = Layout.from_environment()
    prepare_process(alone, deterministic=True)
    torch.set_num_threads(1)
    store, openings = wait_for_ranks(alone, {}, timeout_minutes=1).store, itertools.count()

    @contextmanager
    def opened(parallel: ParallelConfig) -> Iterator[Layout]:
        own_store = torch.distributed.PrefixStore(f"layout {next(openings)}", store)
        with Layout.from_environment(parallel).opened(own_store, TIMEOUT) as layout:
            yield layout
            torch.distributed.barrier()

    yield opened


def train(
    config: Path, *overrides: str, launcher: str = "forked", processes: int = 1, **options: Any
) -> list[dict[str, float]]:
    """Run launch/pretrain.py, which must succeed; the lines of the run's metrics.jsonl.

    A `launcher` by name, "python", "torchrun" or "deepspeed", is there to be tested itself.
    """
    result = run(["launch/pretrain.py", "--config", str(config), *overrides], launcher, processes, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    folder = next((o.partition("=")[2] for o in overrides if o.startswith("--run.folder=")), str(config.with_suffix("")))
    return metrics(Path(folder))


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def numbers(lines: list[dict[str, float]], *names: str) -> list[tuple[float, ...]]:
    """The named values of every line that has them all."""
    return [tuple(line[name] for name in names) for line in lines if all(name in line for name in names)]


def losses_of(model: Any, tokens_BS: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
    """The cross-entropy of each label, (B, S), by a model that may be a tensor-parallel rank's."""
    losses_BS: torch.Tensor = model.layers.losses(model(tokens_BS), labels_BS)
    return losses_BS


def named(name: str) -> Callable[[str], str]:
    """For `msg` of torch.testing.assert_close: which of many tensors differs."""
    return lambda text: f"{name}: {text}"


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
