"""What the examples share: loading an exported folder, text that every machine has, settings of the Trainer."""

from __future__ import annotations

import argparse
import ast
import json
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from configs.errors import UserError
from launch.common import number, whole_number

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainingArguments

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
HEADS = ("score.", "qa_outputs.")  # names of new layers
SHORTEST_DOCSTRING = 40  # characters; shorter ones say too little


class Docstring(NamedTuple):
    package: str  # e.g. "asyncio"
    text: str


def add_shared_arguments(parser: argparse.ArgumentParser, learning_rate: float, batch_size: int) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path, help="a folder written by launch/export.py")
    add("--output", required=True, metavar="DIR", type=Path, help="a new folder for everything that is written")
    add("--steps", type=whole_number(1), metavar="N", help="optimizer steps; by default as many as --epochs needs")
    add("--epochs", type=number(0.01, 1000), default=3.0, metavar="X", help="passes over the training data")
    add("--batch-size", type=whole_number(1), default=batch_size, metavar="N", help="sequences of one step")
    add("--learning-rate", type=number(0, 10), default=learning_rate, metavar="X", help="highest, after 3%% of warmup")
    add("--seed", type=whole_number(0), default=0, metavar="N", help="of new weights and the order of data")
    add("--bf16", action="store_true", help="compute in bfloat16; weights stay in float32")
    add("--trust-remote-code", action="store_true", help="run the model code of the folder, as the native format needs")


def check_folders(model: Path, output: Path, trust_remote_code: bool) -> None:
    """Check, before anything slow, that the model looks loadable and that nothing would be overwritten."""
    if not model.is_dir():
        raise UserError(f"{model}: no such folder; launch/export.py writes one")
    for name in ("config.json", "tokenizer.json"):
        if not (model / name).is_file():
            raise UserError(f"{model}: has no {name}, so it is not an exported folder")
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{model / 'config.json'}: is not JSON: {error}") from error
    if not trust_remote_code and "auto_map" in config:
        raise UserError(f"{model}: brings its own model code (auto_map); add --trust-remote-code to run it")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output}: exists already; name a new folder")


def load(folder: Path, loader: Callable[..., Any], **options: Any) -> Any:
    """Call `loader` on an exported folder; UserError if it cannot load it."""
    from safetensors import SafetensorError

    try:
        return loader(folder, local_files_only=True, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: transformers cannot load it: {str(error).splitlines()[0]}") from error


def load_with_head(folder: Path, loader: Callable[..., Any], trust_remote_code: bool, **settings: Any) -> Any:
    """Call `loader` on an exported folder, in float32, with a new head. UserError if the folder lacks other weights."""
    import torch

    model, loading = load(
        folder, loader, trust_remote_code=trust_remote_code, dtype=torch.float32, output_loading_info=True, **settings
    )
    lacking = sorted(key for key in loading["missing_keys"] if not key.startswith(HEADS))
    if lacking:
        raise UserError(f"{folder}: lacks {len(lacking)} tensors of {type(model).__name__}, e.g. {lacking[0]}")
    return model


def save_code(model: Path, output: Path) -> None:
    """Copy the native format's own code, which not every class of transformers saves with its weights."""
    for file in model.glob("*.py"):
        shutil.copy(file, output)


def load_tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Pads on the right: with causal attention, tokens before the padding do not see it, so models need no mask."""
    from transformers import AutoTokenizer

    tokenizer = load(folder, AutoTokenizer.from_pretrained, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: its tokenizer has no end of text (eos_token)")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def longest_input(config: Any) -> int:
    """Tokens that a model's configuration allows in one sequence."""
    return getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None) or 1024


def chosen_length(config: Any, asked: int | None, option: str) -> int:
    longest = longest_input(config)
    if asked is not None and asked > longest:
        raise UserError(f"{option} {asked}: the model takes at most {longest} tokens")
    return asked or min(512, longest)


def training_arguments(arguments: argparse.Namespace, **options: Any) -> TrainingArguments:
    """For the Trainer: on the GPU if there is one, without reporting to trackers and without intermediate checkpoints."""
    import torch
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(arguments.output),
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=arguments.batch_size,
        max_steps=arguments.steps or -1,
        num_train_epochs=arguments.epochs,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        logging_steps=0.05,
        save_strategy="no",
        report_to="none",
        seed=arguments.seed,
        bf16=arguments.bf16,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        **options,
    )


def write_results(output: Path, results: dict[str, Any]) -> None:
    """Write results.json and print one figure per line."""
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for name, value in results.items():
        print(f"{name:40} {value:.4f}" if isinstance(value, float) else f"{name:40} {value}")


def interpreter_topics() -> list[str]:
    """The language reference that comes with every Python: what `help("for")` shows."""
    from pydoc_data.topics import topics

    return [text.strip() for _, text in sorted(topics.items())]


def standard_docstrings() -> list[Docstring]:
    """Docstrings of the standard library's packages in a fixed order, each text once."""
    library = Path(sysconfig.get_path("stdlib"))
    found: dict[str, str] = {}
    for file in sorted(library.glob("*/**/*.py")):
        place = file.relative_to(library).parts
        if LEFT_OUT.isdisjoint(place):
            for text in _docstrings_of(file):
                found.setdefault(text, place[0])
    return [Docstring(package, text) for text, package in found.items()]


def _docstrings_of(file: Path) -> list[str]:
    try:
        tree = ast.parse(file.read_bytes())
    except SyntaxError:  # lib2to3 keeps files of Python 2
        return []
    with_docstring = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, with_docstring)]
    return [text for text in texts if len(text) >= SHORTEST_DOCSTRING]
