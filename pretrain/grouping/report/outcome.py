"""What became of an election, on its page: validation loss before and after pruning, and what to do next.

These two sections change after the vote, when heads are pruned and when the pruned run trains. They are replaced in the page.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from configs.durable import write_text
from configs.errors import UserError
from configs.schema import Config
from data_pipeline.read.sets import UNNAMED, validation_sets
from pretrain.engines import engine
from pretrain.grouping.origin import PRUNED
from pretrain.report.records import read_metrics

REPORT = "gha/report.html"  # in a run's folder
LOSS, BITS, SAMPLES = "validation/loss", "validation/bits_per_byte", "validation/samples"


def validation_of(run: Path, first: int, last: int | None = None) -> dict[str, Any] | None:
    """The newest validation of a run from step `first` to `last`; None if there is none."""
    lines = [line for line in read_metrics(run) if LOSS in line and first <= line["step"]]
    return next((line for line in reversed(lines) if last is None or line["step"] <= last), None)


def sections(run: Path, step: int, config: Config, pruned: Path | None) -> dict[str, str]:
    """Both sections by name: `run` voted at `step`; `config` is the run's, or that of `pruned`, the run with the heads left."""
    contents = {"losses": _losses(run, step, config, pruned), "next": _next(run, step, config, pruned)}
    return {name: f"{_opening(name, step)}\n{content}\n</section>" for name, content in contents.items()}


def update_report(run: Path, step: int, config: Config) -> Path | None:
    """Bring the page of the vote at `step` up to date; `config` is the pruned run's. Returns the page's path.

    Returns None where there is no page of that vote, and, with a warning, where it cannot be written or what it shows cannot
    be read: it is another run's, and no training ends because of it.
    """
    path = run / REPORT
    try:
        page = path.read_text(encoding="utf-8") if path.exists() else ""
        if not all(_opening(name, step) in page for name in ("losses", "next")):
            return None
        for name, section in sections(run, step, config, Path(config.run.folder)).items():
            begin = page.index(_opening(name, step))
            end = page.index("</section>", begin) + len("</section>")
            page = page[:begin] + section + page[end:]
        write_text(path, page)
    except (OSError, UserError, ValueError, TypeError, ArithmeticError) as error:  # the last three: of what metrics hold
        reason = getattr(error, "strerror", None) or error
        print(f"warning: {path}: cannot be brought up to date ({reason})", file=sys.stderr, flush=True)
        return None
    return path


def _opening(name: str, step: int) -> str:
    return f'<section id="{name}" data-step="{step}">'


def _losses(run: Path, step: int, config: Config, pruned: Path | None) -> str:
    """A table of validation losses: of all heads, of those that stay, and after further training."""
    steps = config.training.steps
    before, after, last = validation_of(run, step, step), None, None
    if pruned is not None:
        after, last = validation_of(pruned, step, step), validation_of(pruned, step + 1)
    rows = {
        f"Before pruning, step {step:,}": before,
        f"Directly after pruning, step {step:,}": after,
        _last_row(last, step, steps): last,
    }
    head = "".join(
        f'<th scope="col">{name}</th>' for name in ("Model", "Samples", "Loss (nats per token)", "Change", "Bits per byte")
    )
    body = "".join(f"<tr><td>{name}</td>{''.join(_cells(line, before))}</tr>" for name, line in rows.items())
    text = (
        "of each validation set, as their mean"
        if UNNAMED not in validation_sets(config.data, config.validation)
        else "of the validation split"
    )
    note = f"Measured on the first samples {text}; a change is shown between losses of as many samples."
    if after is None:
        note += " The pruned run measures its own loss when it starts."
    return f"<h2>Validation loss</h2>\n<table><tr>{head}</tr>{body}</table>\n<p>{note}</p>"


def _last_row(last: dict[str, Any] | None, step: int, steps: int) -> str:
    """The name of the row of further training; `steps` is its end if the configuration asks for steps after the vote."""
    if last is not None:
        return f"{'So far' if last['step'] < steps else 'At the end of training'}, step {last['step']:,}"
    return f"At the end of training, step {steps:,}" if steps > step else "At the end of training"


def _cells(line: dict[str, Any] | None, before: dict[str, Any] | None) -> Iterator[str]:
    """Samples, loss, its difference from the one before pruning, bits per byte; what is not known is a dash."""
    samples, loss, bits = (None if line is None else line.get(name) for name in (SAMPLES, LOSS, BITS))
    base = None if before is None or line is before or samples is None or samples != before.get(SAMPLES) else before[LOSS]
    change = None if loss is None or base is None else loss - base
    for value, form in ((samples, ",d"), (loss, ".4f"), (change, "+.4f"), (bits, ".4f")):
        yield f"<td>{'–' if value is None else format(value, form).replace('-', '−')}</td>"


def _next(run: Path, step: int, config: Config, pruned: Path | None) -> str:
    """What to do, for the state in which the run is."""
    text, commands = _advice(run, config, pruned, all_done=step >= config.training.steps)
    return f"<h2>Next</h2>\n<p>{escape(text)}</p>\n<pre><code>{escape(commands)}</code></pre>"


def _advice(run: Path, config: Config, pruned: Path | None, all_done: bool) -> tuple[str, str]:
    """A text and commands. `all_done`: the configuration asks for no step after the vote."""
    steps, smaller = config.training.steps, run / PRUNED if pruned is None else pruned

    def resume(folder: Path) -> str:
        path = shlex.quote(str(folder / "config.yaml"))
        return f"{engine(config.backend).launcher} launch/pretrain.py --config {path} --resume=auto"

    if pruned is None and config.gha.stage == "schedule":
        text = f"The run prunes the heads itself and continues in {smaller}. If it was interrupted, resume it."
        return text, resume(run)
    if pruned is not None and not all_done and _trained(pruned) >= steps:
        folder = shlex.quote(str(pruned))
        text = "The smaller model is trained. Evaluate it on text that it has not seen, and export it for other software."
        return text, f"python launch/evaluate.py {folder} --split test\npython launch/export.py {folder} exported"
    train = resume(smaller) + (" --training.steps=N" if all_done else "")
    note = f" The {steps:,} steps of the configuration are done; N is the new last step." if all_done else ""
    if pruned is not None:
        return f"The heads are pruned. Continue training the smaller model; a schedule does so itself.{note}", train
    text = f"The first command prunes the checkpoint. The second continues training the smaller model.{note}"
    return text, f"python launch/prune.py {shlex.quote(str(run))}\n{train}"


def _trained(run: Path) -> int:
    """The last step that a run has taken."""
    return max((line["step"] for line in read_metrics(run) if "loss" in line), default=0)
