"""Fine-tune on GLUE, SuperGLUE or SQuAD: `python examples/finetune_classification.py MODEL --task sst2 --data DIR --output O`.

`--data` is a folder with train and validation files (.jsonl, .csv, .tsv or .parquet) that have the columns of the data set on
the Hugging Face hub, or `hub` to load it from there. `--task docs` needs neither: it predicts the package of a docstring of
Python's standard library. Writes the model, its tokenizer and `results.json`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository

import argparse
import random
from collections import Counter
from typing import Any

import numpy as np

from configs.errors import UserError
from examples.common import (
    add_shared_arguments,
    check_folders,
    chosen_length,
    load_tokenizer,
    load_with_head,
    save_code,
    standard_docstrings,
    training_arguments,
    write_results,
)
from examples.recipes import TASKS, Recipe, Rows, score
from examples.spans import answer_positions, best_answers, make_windows, span_class, squad_scores
from launch.common import run_command, whole_number

BUILDERS = {".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
PACKAGES = 6  # classes of --task docs
Splits = dict[str, Rows]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_shared_arguments(parser, learning_rate=5e-5, batch_size=16)
    add = parser.add_argument
    add("--task", required=True, choices=[*TASKS, "docs"], metavar="TASK", help=f"one of {', '.join([*TASKS, 'docs'])}")
    add("--data", metavar="FOLDER", help="where the data set is, or hub; not for --task docs")
    add("--max-length", type=whole_number(16), metavar="N", help="tokens of an input; by default 512 or what the model takes")
    add("--limit", type=whole_number(1), metavar="N", help="use at most N rows of each part, drawn by --seed")
    arguments = parser.parse_args()
    if (arguments.data is None) != (arguments.task == "docs"):
        parser.error("--data is needed, except for --task docs, which has its own")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    check_folders(arguments.model, arguments.output, arguments.trust_remote_code)
    recipe, splits = docs_task() if arguments.task == "docs" else (TASKS[arguments.task], None)
    splits = splits or read_splits(recipe, arguments.data)
    splits = {name: some_rows(list(rows), arguments) for name, rows in splits.items()}
    check_rows(recipe, splits, arguments.task)

    from transformers import set_seed

    set_seed(arguments.seed)
    tokenizer = load_tokenizer(arguments.model, arguments.trust_remote_code)
    learn = learn_spans if arguments.task == "squad" else learn_labels
    results = learn(arguments, recipe, splits, tokenizer)
    tokenizer.save_pretrained(arguments.output)
    rows = {f"{name}_rows": len(part) for name, part in splits.items()}
    write_results(arguments.output, {"task": arguments.task, **rows, **results})


def some_rows(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """At most --limit rows, sampled by the seed, since files are often sorted by label."""
    if arguments.limit is None or arguments.limit >= len(rows):
        return rows
    return random.Random(arguments.seed).sample(rows, arguments.limit)


def learn_labels(arguments: argparse.Namespace, recipe: Recipe, splits: Splits, tokenizer: Any) -> dict[str, Any]:
    """Train and save; return the metrics of each validation part, and those of always predicting the most frequent label."""
    model = classifier(arguments, recipe, tokenizer)
    length = chosen_length(model.config, arguments.max_length, "--max-length")
    tokenizer.truncation_side = "left"  # keeps the last column and the last token, which is classified
    train = [sample(recipe, row, tokenizer, length) for row in splits["train"]]
    trainer = fit(arguments, model, tokenizer, train, ["labels"])
    results: dict[str, Any] = {}
    for part in recipe.validation:
        rows = splits[part]
        logits_BC = predict(trainer, [sample(recipe, row, tokenizer, length) for row in rows])
        true_B = np.array([label_of(recipe, row) for row in rows])
        predicted_B = logits_BC.argmax(-1) if recipe.labels else logits_BC.reshape(-1)
        results |= {f"{part}_{name}": value for name, value in score(recipe, predicted_B, true_B, rows).items()}
        if recipe.labels:
            frequent = Counter(label_of(recipe, row) for row in splits["train"]).most_common(1)[0][0]
            results[f"{part}_majority_accuracy"] = float((true_B == frequent).mean())
    return results


def learn_spans(arguments: argparse.Namespace, recipe: Recipe, splits: Splits, tokenizer: Any) -> dict[str, Any]:
    """Like learn_labels, for SQuAD."""
    head = span_class(arguments.model, arguments.trust_remote_code)
    model = load_with_head(arguments.model, head.from_pretrained, arguments.trust_remote_code)
    length = chosen_length(model.config, arguments.max_length, "--max-length")
    train = []
    for window in make_windows(tokenizer, splits["train"], length):
        first, last = answer_positions(window, splits["train"][window.row]["answers"])
        train.append({"input_ids": window.ids, "start_positions": first, "end_positions": last})
    trainer = fit(arguments, model, tokenizer, train, ["start_positions", "end_positions"])
    rows = splits["validation"]
    windows = make_windows(tokenizer, rows, length)
    start_WS, end_WS = predict(trainer, [{"input_ids": window.ids} for window in windows])
    return {
        f"validation_{name}": value for name, value in squad_scores(best_answers(windows, start_WS, end_WS, rows), rows).items()
    }


def sample(recipe: Recipe, row: dict[str, Any], tokenizer: Any, length: int) -> dict[str, Any]:
    """A row as one text, with each column's name before it, and its label."""
    text = str(row[recipe.columns[0]])
    if len(recipe.columns) > 1:
        text = "\n".join(f"{column}: {row[column]}" for column in recipe.columns)
    return {"input_ids": tokenizer(text, truncation=True, max_length=length)["input_ids"], "labels": label_of(recipe, row)}


def label_of(recipe: Recipe, row: dict[str, Any]) -> int | float:
    """The number of a label given as a number, a name or a boolean; the number itself if the recipe has no labels."""
    label = row["label"]
    if not recipe.labels and isinstance(label, (int, float)):
        return float(label)
    if isinstance(label, str) and label in recipe.labels:
        return recipe.labels.index(label)
    if isinstance(label, (bool, int)) and 0 <= label < len(recipe.labels):
        return int(label)
    allowed = ", ".join(f"{number} or {name}" for number, name in enumerate(recipe.labels))
    raise UserError(f"--data: label {label!r}: must be {allowed or 'a number'}")


def classifier(arguments: argparse.Namespace, recipe: Recipe, tokenizer: Any) -> Any:
    """The decoder under a linear layer that reads its last token."""
    from transformers import AutoModelForSequenceClassification

    settings: dict[str, Any] = {"num_labels": 1}
    if recipe.labels:
        settings = {"id2label": dict(enumerate(recipe.labels)), "label2id": {name: n for n, name in enumerate(recipe.labels)}}
    settings["pad_token_id"] = tokenizer.pad_token_id  # the model finds the last token by it
    return load_with_head(
        arguments.model, AutoModelForSequenceClassification.from_pretrained, arguments.trust_remote_code, **settings
    )


def fit(arguments: argparse.Namespace, model: Any, tokenizer: Any, train: list[dict[str, Any]], labels: list[str]) -> Any:
    """The Trainer after training; the model is saved."""
    from transformers import DataCollatorWithPadding, Trainer

    trainer = Trainer(
        model=model,
        args=training_arguments(arguments, remove_unused_columns=False, label_names=labels),
        train_dataset=train,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.train()
    trainer.save_model()
    save_code(arguments.model, arguments.output)
    return trainer


def predict(trainer: Any, samples: list[dict[str, Any]]) -> Any:
    """Logits [samples, …], or a tuple of them if there are several outputs."""
    return trainer.predict(samples, ignore_keys=["past_key_values", "hidden_states", "attentions"]).predictions


def read_splits(recipe: Recipe, data: str) -> Splits:
    """The rows of the training part and of each validation part."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    parts = ("train", *recipe.validation)
    try:
        if data == "hub":
            # Every data set has this branch of parquet files, by configuration and part; datasets no longer runs scripts.
            loaded = load_dataset(recipe.dataset, data_dir=recipe.name, revision="refs/convert/parquet")
            return {part: loaded[part] for part in parts}
        return {part: _read_file(load_dataset, find_file(Path(data), part)) for part in parts}
    except (DatasetsError, OSError, ValueError, KeyError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(f"--data {data}: cannot be read: {reason}") from error


def _read_file(load_dataset: Any, file: Path) -> Rows:
    if file.stat().st_size == 0:
        raise UserError(f"{file}: is empty")
    options = {"sep": "\t", "quoting": 3} if file.suffix == ".tsv" else {}  # 3: quotes are ordinary characters, as in GLUE
    return load_dataset(BUILDERS[file.suffix], data_files=str(file), split="train", **options)


def find_file(folder: Path, part: str) -> Path:
    if not folder.is_dir():
        raise UserError(f"--data {folder}: no such folder")
    found = [folder / f"{part}{suffix}" for suffix in BUILDERS if (folder / f"{part}{suffix}").is_file()]
    if len(found) != 1:
        raise UserError(
            f"--data {folder}: has {len(found)} files named {part} with one of {', '.join(BUILDERS)}; one is needed"
        )
    return found[0]


def check_rows(recipe: Recipe, splits: Splits, task: str) -> None:
    wanted = {*recipe.columns, "answers" if task == "squad" else "label"}
    for part, rows in splits.items():
        if not rows:
            raise UserError(f"--data: {part} has no rows")
        missing = sorted(wanted - rows[0].keys())
        if missing:
            raise UserError(
                f"--data: {part} has no column {', '.join(missing)}; --task {task} needs {', '.join(sorted(wanted))}"
            )
        for row in rows:
            check_answers(row["answers"]) if task == "squad" else label_of(recipe, row)


def check_answers(answers: Any) -> None:
    try:
        complete = len(answers["text"]) == len(answers["answer_start"]) > 0
    except (TypeError, KeyError):
        complete = False
    if not complete:
        raise UserError(f"--data: answers {answers!r}: SQuAD v1 has `text` and `answer_start`, with at least one answer")


def docs_task() -> tuple[Recipe, Splits]:
    """Docstrings of the packages with the most docstrings; every fifth is held out."""
    docstrings = standard_docstrings()
    packages = [name for name, _ in Counter(package for package, _ in docstrings).most_common(PACKAGES)]
    rows = [{"docstring": text, "label": package} for package, text in docstrings if package in packages]
    recipe = Recipe("", "", ("docstring",), tuple(sorted(packages)))
    return recipe, {"train": [row for n, row in enumerate(rows) if n % 5], "validation": rows[::5]}


if __name__ == "__main__":
    run_command(main, one_process=True)
