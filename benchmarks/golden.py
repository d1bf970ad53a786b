"""Does a change of the code change a number? Losses and gradient norms of many layouts, recorded and compared to the bit.

    python benchmarks/golden.py record before.json
    …                                               change the code
    python benchmarks/golden.py record after.json
    python benchmarks/golden.py compare before.json after.json

A layout is a tiny run of 20 optimizer steps: ZeRO, FSDP, tensor and pipeline parallelism, attention variants, positions,
grouped heads, dropout, documents, precisions, resumed runs. A record holds what each step wrote to metrics.jsonl, with all
digits, and the final validation loss; speed and memory are left out. Runs are started with launch/prepare.py and
launch/pretrain.py, as a user would, on CPUs with one thread each. Nothing of the project is imported here, so that versions of
it with different internals can be compared.

A recording writes OUT.json after each layout; an interrupted one resumes from there. Layouts that were recorded with other code
are recorded again. `compare` names the first step and figure that differ in each layout; exit status 1 if any does. Expect
equal figures only on the same machine with the same libraries.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

LONGEST = 300  # seconds for one run
STEPS = 20
NO_NUMBERS = (
    "time",
    "tokens",
    "seconds",
    "tokens_per_second",
    "mfu",
    "memory_gib",
)  # figures of metrics.jsonl that differ from run to run
NOT_RUN = ("tests", "benchmarks", "examples", "docs")  # folders of the project that no run reads
SETTINGS = """
data: {{path: {data}, sequence_length: 64}}
run: {{folder: {folder}}}
model: {{attention: mha, hidden_size: 64, num_layers: 2, num_heads: 8}}
training: {{steps: 20, global_batch_size: 8, micro_batch_size: 2, gradient_clipping: 0.5}}
optimizer: {{lr: 1e-3}}
schedule: {{warmup_steps: 2}}
validation: {{every_steps: 0, samples: 7}}
checkpoint: {{every_steps: 0}}
logging: {{every_steps: 10, tensorboard: false}}
"""


@dataclass(frozen=True)
class Layout:
    """A run on `processes` processes. `settings` are overrides, without leading dashes; `ends` are the steps at which its parts
    end: each part but the first resumes from the previous one's checkpoint."""

    processes: int
    settings: tuple[str, ...]
    ends: tuple[int, ...] = (STEPS,)
    launcher: str = "torchrun"


def _zero(stage: int, *settings: str, processes: int = 2, **options: Any) -> Layout:
    return Layout(processes, (f"parallel.zero_stage={stage}", *settings), **options)


def _fsdp(*settings: str, processes: int = 2, **options: Any) -> Layout:
    return Layout(processes, ("backend=fsdp", *settings), **options)


def _attention(name: str, position: str, *others: str) -> tuple[str, ...]:
    return (f"model.attention={name}", f"model.position={position}", *others)


def _grouped(feature_map: str, *others: str) -> tuple[str, ...]:
    return ("gha.stage=constrain", f"gha.feature_map={feature_map}", "gha.alpha=0.3", "gha.beta=0.1", *others)


MODERN = ("model.norm=rmsnorm", "model.activation=swiglu", "model.bias=false")
UNTIED, DROPOUT, BF16 = "model.tie_embeddings=false", "model.dropout=0.1", "training.precision=bf16"
TP2, SEQUENCE, PP2 = "parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2"
SEPARATE, RECOMPUTE, OFFLOAD = (
    "model.attend_across_documents=false",
    "training.recompute_activations=true",
    "parallel.cpu_offload=true",
)
FOUR_LAYERS, WHOLE_BATCH = "model.num_layers=4", "training.micro_batch_size=4"
HALVES = (STEPS // 2, STEPS)

LAYOUTS = {
    "one": _zero(0, *_attention("mha", "learned"), processes=1, launcher="python"),
    "one_zero1": _zero(1, *_attention("mhe_add", "none", "model.attention_kernel=math"), processes=1, launcher="python"),
    "one_fsdp": _fsdp(*_attention("mhe_mul", "alibi", FOUR_LAYERS, DROPOUT), processes=1, launcher="python"),
    "zero0": _zero(0, *_attention("sha", "alibi")),
    "zero1": _zero(1, *_attention("mhe_add", "rope", "model.attention_kernel=shared_scores")),
    "zero1_whole_batch": _zero(1, *_attention("mha", "learned"), WHOLE_BATCH),
    "zero2": _zero(2, *_attention("gqa", "alibi", "model.num_kv_heads=2"), launcher="deepspeed"),
    "zero3": _zero(3, *_attention("mqa", "rope", UNTIED, *MODERN)),
    "zero2_offload": _zero(2, *_attention("skv", "none"), OFFLOAD),
    "zero3_dropout": _zero(3, *_attention("mhe_add", "learned", UNTIED, DROPOUT)),
    "zero3_offload": _zero(3, *_attention("mhe_add", "learned"), OFFLOAD, RECOMPUTE),
    "zero1_bf16": _zero(1, *_attention("mhe_mul", "learned"), BF16),
    "zero3_bf16": _zero(3, *_attention("mha", "rope"), BF16),
    "fsdp": _fsdp(*_attention("el", "alibi", FOUR_LAYERS)),
    "fsdp_whole_batch": _fsdp(*_attention("mhe_mul", "rope", "model.key_embedding=false", *MODERN), WHOLE_BATCH),
    "fsdp_bf16": _fsdp(*_attention("mhe_add", "none"), BF16),
    "fsdp_offload": _fsdp(*_attention("gqa", "rope", "model.num_kv_heads=4"), OFFLOAD),
    "fsdp_hybrid": _fsdp(
        *_attention("mhe_mul", "rope", "model.embedding_position=before"), "parallel.replicate=2", processes=4
    ),
    "fsdp_tp2": _fsdp(*_attention("sha", "rope", UNTIED), TP2, SEQUENCE, processes=4),
    "tp2": _zero(1, *_attention("mha", "alibi", FOUR_LAYERS), TP2),
    "tp2_sp": _zero(1, *_attention("mhe_add", "learned"), TP2, SEQUENCE),
    "tp2_gather_weights": _zero(1, *_attention("mhe_mul", "none"), TP2, SEQUENCE, "parallel.mhe_gather=weights"),
    "tp2_gather_activations": _zero(0, *_attention("mhe_add", "rope"), TP2, "parallel.mhe_gather=activations"),
    "tp2_zero1": _zero(1, *_attention("gqa", "rope", "model.num_kv_heads=2"), TP2, processes=4),
    "tp2_zero3_sp": _zero(3, *_attention("mqa", "learned", UNTIED), TP2, SEQUENCE, processes=4),
    "tp2_sp_dropout": _zero(1, *_attention("skv", "learned", DROPOUT), TP2, SEQUENCE),
    "pp2": _zero(1, *_attention("mhe_add", "alibi", UNTIED, FOUR_LAYERS), PP2),
    "pp2_tied": _zero(0, *_attention("mha", "learned", FOUR_LAYERS), PP2, launcher="deepspeed"),
    "pp2_zero1": _zero(1, *_attention("el", "rope", DROPOUT), PP2, processes=4),
    "pp2_bf16": _zero(1, *_attention("mhe_mul", "learned"), PP2, BF16),
    "pp2_tp2": _zero(1, *_attention("mhe_mul", "rope", UNTIED, *MODERN), PP2, TP2, SEQUENCE, processes=4),
    "gha_value": _zero(1, *_attention("mhe_add", "learned"), *_grouped("value", "gha.max_groups=5", "gha.warmup_steps=4")),
    "gha_output_tp2": _zero(1, *_attention("mhe_mul", "rope"), *_grouped("output", "gha.groups=4"), TP2, SEQUENCE),
    "gha_attention_fsdp": _fsdp(
        *_attention("mha", "alibi"), *_grouped("attention", "gha.groups=3", "gha.loss=categorical", "gha.regroup_every=3")
    ),
    "gha_value_pp2": _zero(1, *_attention("skv", "none"), *_grouped("value", "gha.groups=4", "gha.gram_decay=0.5"), PP2),
    "gha_schedule": _zero(
        1,
        *_attention("mhe_add", "rope"),
        *_grouped("value", "gha.groups=4", "gha.stage=schedule", "gha.vote_at_step=10", "gha.vote_batches=4"),
    ),
    "documents": _zero(1, *_attention("mhe_add", "rope", SEPARATE)),
    "documents_fsdp": _fsdp(*_attention("mha", "learned", SEPARATE), RECOMPUTE),
    "documents_pp2": _zero(1, *_attention("mqa", "alibi", SEPARATE), PP2),
    "recompute": _zero(1, *_attention("mhe_mul", "rope", DROPOUT), RECOMPUTE, "schedule.kind=wsd"),
    "recompute_tp2_sp": _zero(1, *_attention("mhe_add", "alibi"), RECOMPUTE, TP2, SEQUENCE),
    "dropout": _zero(2, *_attention("mha", "rope", DROPOUT)),
    "resume_zero2": _zero(2, *_attention("mhe_add", "learned", DROPOUT), ends=HALVES),
    "resume_fsdp": _fsdp(
        *_attention("mhe_mul", "rope", DROPOUT), *_grouped("output", "gha.groups=4", "gha.gram_decay=0.5"), ends=HALVES
    ),
    "resume_pp2": _zero(1, *_attention("mha", "alibi", FOUR_LAYERS, DROPOUT), PP2, ends=HALVES),
    "resume_tp2": _zero(3, *_attention("gqa", "rope", "model.num_kv_heads=2"), TP2, SEQUENCE, processes=4, ends=HALVES),
}


class CommandError(Exception):
    """A failed command, with the end of its output."""


@dataclass(frozen=True)
class Difference:
    """The first figure of a layout that differs, and in how many of its steps any figure differs."""

    layout: str
    where: str
    figure: str
    before: str
    after: str
    steps: int


def write_text(folder: Path) -> Path:
    """A file of paragraphs of made-up words with uneven frequencies, each often followed by the same word; always the same
    text."""
    draw = random.Random(0)
    words = ["".join(draw.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(draw.randint(2, 7))) for _ in range(200)]
    paragraphs = []
    for _ in range(600):
        at, chosen = 0, []
        for _ in range(draw.randint(10, 80)):
            at = (at * 7 + 1) % len(words) if draw.random() < 0.5 else min(int(draw.expovariate(0.03)), len(words) - 1)
            chosen.append(words[at])
        paragraphs.append(" ".join(chosen))
    path = folder / "text.txt"
    path.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
    return path


def prepare(project: Path, folder: Path) -> Path:
    """Token files of the text."""
    data = folder / "data"
    options = ["--document", "paragraph", "--vocab-size", "512", "--split", "90,5,5"]
    execute([sys.executable, "launch/prepare.py", "--input", str(write_text(folder)), "--output", str(data), *options], project)
    return data


def launch(layout: Layout) -> list[str]:
    """The beginning of a command line: the launcher and its options."""
    programs, processes = Path(sys.executable).parent, str(layout.processes)
    if layout.launcher == "torchrun":
        return [str(programs / "torchrun"), "--standalone", "--nproc-per-node", processes]
    if layout.launcher == "deepspeed":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        options = ["--log_level", "warning", "--num_accelerators", processes, "--master_port", port]
        return [str(programs / "deepspeed"), *options]
    return [sys.executable]


def execute(command: Sequence[str], project: Path) -> None:
    """Run a command in the project's folder to completion, on CPUs with one thread per process."""
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK", "WORLD_SIZE")}
    fixed = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PATH": programs}
    process = subprocess.Popen(
        command,
        cwd=project,
        env={**inherited, **fixed},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=LONGEST)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        raise CommandError(f"not finished after {LONGEST} s: {' '.join(command)}\n{tail(output)}") from None
    if process.returncode:
        raise CommandError(f"exit status {process.returncode}: {' '.join(command)}\n{tail(output)}")


def tail(output: str) -> str:
    return "\n".join(output.splitlines()[-100:])


def train(layout: Layout, project: Path, data: Path, folder: Path) -> list[dict[str, Any]]:
    """What a layout's steps wrote, in order: the file, the step and the figures."""
    run, config = folder / "run", folder / "golden.yaml"
    config.write_text(SETTINGS.format(data=json.dumps(str(data)), folder=json.dumps(str(run))), encoding="utf-8")
    for number, end in enumerate(layout.ends):
        overrides = [f"--{text}" for text in (*layout.settings, f"training.steps={end}")]
        resume = ["--resume=auto"] if number else []
        execute([*launch(layout), "launch/pretrain.py", "--config", str(config), *overrides, *resume], project)
    files = sorted(run.rglob("metrics.jsonl"), key=lambda path: (len(path.parts), path))  # a pruned run is in a subfolder
    lines = []
    for path in files:
        for text in path.read_text(encoding="utf-8").splitlines():
            figures = {name: value for name, value in json.loads(text).items() if name not in NO_NUMBERS}
            lines.append({"file": str(path.relative_to(run)), **figures})
    return lines


def code_of(project: Path) -> str:
    """A digest of the sources that a run may read."""
    digest = hashlib.sha256()
    for path in sorted(project.glob("*/**/*.py")):
        place = path.relative_to(project)
        if place.parts[0] not in NOT_RUN and not place.parts[0].startswith("."):
            digest.update(f"{place}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of a record by layout."""
    try:
        return {row["layout"]: row for row in json.loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"error: {path}: not a record of this command ({error})") from None


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a record atomically: a line for each layout."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")
    partial.replace(path)


def record(out: Path, names: Sequence[str], project: Path) -> int:
    """Record the layouts that `out` does not have for this code; returns the number that failed."""
    rows, code, failed, started = read(out) if out.exists() else {}, code_of(project), 0, perf_counter()
    with tempfile.TemporaryDirectory(prefix="golden_") as scratch:
        data = None
        for name in names:
            layout = LAYOUTS[name]
            settings = json.loads(json.dumps({**asdict(layout), "common": SETTINGS, "code": code}))
            if {key: rows.get(name, {}).get(key) for key in settings} == settings:
                print(f"{name:<24} kept", flush=True)
                continue
            data = data or prepare(project, Path(scratch))
            folder, begun = Path(scratch, name), perf_counter()
            folder.mkdir()
            try:
                lines = train(layout, project, data, folder)
            except CommandError as error:
                failed += 1
                print(f"{name:<24} FAILED, {error}", flush=True)
                continue
            finally:
                shutil.rmtree(folder)
            seconds = round(perf_counter() - begun, 1)
            rows[name] = {"layout": name, **settings, "seconds": seconds, "lines": lines}
            write(out, rows.values())
            losses = [line["loss"] for line in lines if "loss" in line]
            print(f"{name:<24} {len(losses):>3} steps  loss {losses[0]!r} → {losses[-1]!r}  {seconds:.1f} s", flush=True)
    print(
        f"{len(names) - failed} layouts in {out}, {perf_counter() - started:.0f} s" + (f"; {failed} FAILED" if failed else "")
    )
    return failed


def by_step(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The figures of each step of each file; a step may have written several lines."""
    steps: dict[str, dict[str, Any]] = {}
    for line in row["lines"]:
        figures = {name: value for name, value in line.items() if name not in ("file", "step")}
        place = line["file"].removesuffix("metrics.jsonl")
        steps.setdefault(f"{place}{line['step']}", {}).update(figures)
    return steps


def difference(name: str, before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> Difference | None:
    """The first difference of a layout's figures by step; None if they are equal to the bit."""
    first, steps = None, set()
    for place in dict.fromkeys([*before, *after]):
        old, new = before.get(place, {}), after.get(place, {})
        for figure in dict.fromkeys([*old, *new]):
            was, became = (repr(figures[figure]) if figure in figures else "missing" for figures in (old, new))
            if was != became:
                first = first or (place, figure, was, became)
                steps.add(place)
    return Difference(name, *first, len(steps)) if first else None


def settings_of(row: dict[str, Any]) -> list[Any]:
    """The settings of a layout's run, apart from the code."""
    return [row.get(name) for name in ("processes", "settings", "ends", "common")]


def compare(before: Path, after: Path, names: Sequence[str] | None) -> int:
    """Print how two records differ; returns the number of layouts that differ or that only one of them has."""
    old, new = read(before), read(after)
    wanted = list(dict.fromkeys([*old, *new])) if names is None else names
    missing, others, differences = [], [], []
    for name in wanted:
        if name not in old or name not in new:
            missing.append(name)
        elif settings_of(old[name]) != settings_of(new[name]):
            others.append(name)
        elif found := difference(name, by_step(old[name]), by_step(new[name])):
            differences.append(found)
    if differences:
        print(f"{'layout':<24} {'step':>10} {'figure':<24} {'before':>24} {'after':>24}  steps that differ")
    for row in differences:
        print(f"{row.layout:<24} {row.where:>10} {row.figure:<24} {row.before:>24} {row.after:>24}  {row.steps}")
    for name in missing:
        print(f"{name:<24} not in {', '.join(str(path) for path, rows in ((before, old), (after, new)) if name not in rows)}")
    for name in others:
        print(f"{name:<24} recorded with other settings; record it again")
    equal = len(wanted) - len(missing) - len(others) - len(differences)
    steps = sum(len(by_step(old[name])) for name in wanted if name in old)
    if equal == len(wanted):
        print(f"equal to the bit: {equal} layouts, {steps} steps")
    else:
        print(f"{equal} of {len(wanted)} layouts are equal")
    return len(wanted) - equal


def project_folder(text: str) -> Path:
    """An argparse type: a checkout of the project."""
    path = Path(text).resolve()
    if not (path / "launch" / "pretrain.py").is_file():
        raise argparse.ArgumentTypeError(f"{text}: has no launch/pretrain.py")
    return path


def record_file(text: str) -> Path:
    """An argparse type: a .json in a folder that exists."""
    path = Path(text)
    if path.suffix != ".json" or not path.resolve().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: must end in .json, in a folder that exists")
    return path


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    recording = actions.add_parser("record", help="run the layouts and write what they report")
    recording.add_argument("out", type=record_file, metavar="OUT.json", help="created, or completed")
    here = Path(__file__).resolve().parent.parent
    recording.add_argument(
        "--project", type=project_folder, default=here, metavar="PATH", help="the checkout to run; default: %(default)s"
    )
    comparing = actions.add_parser("compare", help="say where two records differ")
    comparing.add_argument("before", type=record_file, metavar="BEFORE.json")
    comparing.add_argument("after", type=record_file, metavar="AFTER.json")
    for action in (recording, comparing):
        only_help = f"these layouts; default: all: {', '.join(LAYOUTS)}"
        action.add_argument("--only", nargs="+", choices=list(LAYOUTS), metavar="NAME", help=only_help)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the running layout's processes as Ctrl-C does
    if arguments.action == "record":
        unequal = record(arguments.out, arguments.only or list(LAYOUTS), arguments.project)
    else:
        unequal = compare(arguments.before, arguments.after, arguments.only)
    sys.exit(1 if unequal else 0)


if __name__ == "__main__":
    main()
