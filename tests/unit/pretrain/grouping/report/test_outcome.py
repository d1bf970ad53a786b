"""The sections of the page that change after the vote: losses before and after pruning, and what to do next."""

from __future__ import annotations

import json
from html import unescape
from pathlib import Path
from re import findall, sub

import pytest

from configs.errors import UserError
from configs.schema import Config
from pretrain.grouping.report.outcome import sections, update_report
from pretrain.grouping.report.page import write_report
from tests.unit.pretrain.grouping.report.elections import config, voted

PYTHON, DEEPSPEED = "python launch", "deepspeed --log_level warning launch/pretrain.py --config"


def write_metrics(run: Path, *lines: tuple[int, float | None]) -> None:
    """Lines of steps; with a validation loss, one of a validation."""
    run.mkdir(parents=True, exist_ok=True)
    entries = [
        {"step": step, **({"loss": 1.0} if loss is None else {"validation/loss": loss, "validation/bits_per_byte": loss / 4})}
        for step, loss in lines
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def pruned_config(run: Path) -> Config:
    settings = config(stage="off")
    return settings.model_copy(update={"run": settings.run.model_copy(update={"folder": str(run / "pruned")})})


def rows(section: str) -> list[list[str]]:
    """The cells of a section's table, without its head."""
    return [findall("<td>(.*?)</td>", row) for row in findall("<tr>(<td>.*?)</tr>", section)]


def losses_of(run: Path, pruned: bool) -> list[list[str]]:
    settings = pruned_config(run) if pruned else config(stage="vote")
    return rows(sections(run, 7, settings, run / "pruned" if pruned else None)["losses"])


def test_losses_appear_as_they_are_measured(tmp_path: Path) -> None:
    unknown = ["–"] * 3
    after, end = "Directly after pruning, step 7", "At the end of training, step 10"
    assert losses_of(tmp_path, pruned=False) == [["Before pruning, step 7", *unknown], [after, *unknown], [end, *unknown]]
    write_metrics(tmp_path, (5, 4.0), (7, None), (7, 3.5), (8, 9.0))  # trained on after the vote
    before = ["Before pruning, step 7", "3.5000", "–", "0.8750"]
    assert losses_of(tmp_path, pruned=False) == [before, [after, *unknown], [end, *unknown]]
    assert losses_of(tmp_path, pruned=True) == [before, [after, *unknown], [end, *unknown]]
    write_metrics(tmp_path / "pruned", (7, 3.75), (8, None))
    known = [after, "3.7500", "+0.2500", "0.9375"]
    assert losses_of(tmp_path, pruned=True) == [before, known, [end, *unknown]]
    write_metrics(tmp_path / "pruned", (7, 3.75), (8, None), (8, 3.5), (9, 3.25))
    assert losses_of(tmp_path, pruned=True) == [before, known, ["So far, step 9", "3.2500", "−0.2500", "0.8125"]]
    write_metrics(tmp_path / "pruned", (7, 3.75), (8, 3.5), (10, 3.0))
    assert losses_of(tmp_path, pruned=True)[2] == [end, "3.0000", "−0.5000", "0.7500"]
    page = sections(tmp_path, 10, config(stage="vote"), None)["losses"]  # all steps of the configuration are done
    assert rows(page)[2] == ["At the end of training", *unknown]


def commands(section: str) -> list[str]:
    return unescape(section[section.index("<code>") + 6 : section.index("</code>")]).splitlines()


def test_the_next_step_is_that_of_the_state(tmp_path: Path) -> None:
    resume = f"{DEEPSPEED} {tmp_path}/pruned/config.yaml --resume=auto"

    def found(settings: Config, pruned: Path | None, step: int = 7) -> list[str]:
        return commands(sections(tmp_path, step, settings, pruned)["next"])

    schedule = config(stage="schedule", vote_at_step=7)
    assert found(schedule, None) == [f"{DEEPSPEED} {tmp_path}/config.yaml --resume=auto"]
    assert found(config(stage="vote"), None) == [f"{PYTHON}/prune.py {tmp_path}", resume]
    pruned, settings = tmp_path / "pruned", pruned_config(tmp_path)
    assert found(settings, pruned) == [resume]
    write_metrics(pruned, (7, 3.0), (8, None), (9, None))
    assert found(settings, pruned) == [resume]
    write_metrics(pruned, (7, 3.0), (9, None), (10, None))
    assert found(settings, pruned) == [f"{PYTHON}/evaluate.py {pruned} --split test", f"{PYTHON}/export.py {pruned} exported"]
    (pruned / "metrics.jsonl").unlink()
    assert found(settings, pruned, step=10) == [f"{resume} --training.steps=N"]  # the vote came after the last step


def test_a_page_is_brought_up_to_date_and_nothing_else_in_it_changes(tmp_path: Path) -> None:
    election, G_LNN = voted(2, 8, 2)
    path = write_report(tmp_path, election, G_LNN, config(stage="vote"))
    before = path.read_text()
    write_metrics(tmp_path, (7, 3.5))
    write_metrics(tmp_path / "pruned", (7, 3.75), (10, None), (10, 3.0))
    assert update_report(tmp_path, 7, pruned_config(tmp_path)) == path
    after = path.read_text()
    known = [row[1] for row in rows(after) if row[0].startswith(("Before", "Directly", "At the end"))]
    assert known == ["3.5000", "3.7500", "3.0000"]
    assert "launch/evaluate.py" in after
    assert "launch/prune.py" not in after
    rest = '(?s)<section id="(losses|next)".*?</section>'
    assert sub(rest, "", before) == sub(rest, "", after)
    assert update_report(tmp_path, 7, pruned_config(tmp_path)) == path
    assert path.read_text() == after


def test_pages_of_other_votes_and_missing_ones_are_left_alone(tmp_path: Path) -> None:
    assert update_report(tmp_path, 7, pruned_config(tmp_path)) is None
    election, G_LNN = voted(2, 8, 2)
    path = write_report(tmp_path, election, G_LNN, config(stage="vote"))
    before = path.read_text()
    assert update_report(tmp_path, 8, pruned_config(tmp_path)) is None
    assert path.read_text() == before


@pytest.mark.parametrize("damage", ["page", "metrics", "folder"])
def test_files_that_cannot_be_used_are_named(tmp_path: Path, damage: str) -> None:
    election, G_LNN = voted(2, 8, 2)
    path = write_report(tmp_path, election, G_LNN, config(stage="vote"))
    message = r"gha/report.html: cannot be brought up to date \(.*\); delete it or move it away"
    if damage == "metrics":
        (tmp_path / "metrics.jsonl").write_bytes(b"\x89PNG\n")
        message = r"metrics.jsonl: is damaged \(line 1 is no JSON object with a step\); mend it or move it away"
    elif damage == "page":
        path.write_bytes(b"\xff\xfe")
    else:
        path.unlink()
        path.mkdir()
    with pytest.raises(UserError, match=f"^{tmp_path}/{message}$"):
        update_report(tmp_path, 7, pruned_config(tmp_path))
