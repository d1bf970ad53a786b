"""The benchmark of quality: models of equal size, tables, and a run of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.quality import Row, read, settings, size, table, write
from configs.errors import UserError
from tests.helpers import run, write_run


@pytest.mark.parametrize("variant", ["mqa", "mhe_add", "mhe_mul", "mhe_add:num_seeds=4", "gqa"])
def test_models_of_equal_parameters(tmp_path: Path, prepared: Path, variant: str) -> None:
    path = str(write_run(tmp_path, prepared))
    mha, wide = (size(path, settings(path, [], (name, "width", 0))) for name in ("mha", variant))
    equal = size(path, settings(path, [], (variant, "parameters", 0)))
    assert wide < 0.95 * mha
    assert equal == pytest.approx(mha, rel=5e-3)


def test_a_table_of_means() -> None:
    rows = [Row("mha", "width", seed, 1_500_000, 9, loss, 1000.0) for seed, loss in enumerate((3.0, 4.0, 5.0))]
    rows.append(Row("mqa", "parameters", 0, 1_500_001, 9, 3.25, 2000.0))
    _, mha, mqa = table(rows, ("mha", "mqa"))
    assert mha.split() == ["mha", "width", "1.50", "M", "4.000", "±", "1.000", "1,000", "3"]
    assert mqa.split() == ["mqa", "parameters", "1.50", "M", "3.250", "2,000", "1"]


def test_rows_are_kept_and_foreign_files_named(tmp_path: Path) -> None:
    rows = [Row("mha", "width", 0, 10, 9, 3.0, 5.0)]
    write(tmp_path / "rows.json", rows)
    assert read(tmp_path / "rows.json") == rows
    assert read(tmp_path / "none.json") == []
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(UserError, match=r"other\.json: holds no rows of this benchmark"):
        read(tmp_path / "other.json")


def test_runs_go_on_from_the_rows_that_are_there(tmp_path: Path, prepared: Path) -> None:
    path, rows = write_run(tmp_path, prepared), tmp_path / "rows.json"
    done = [Row("mha", "width", 0, 10, 9, 3.0, 5.0), Row("mhe_add", "parameters", 0, 10, 9, 2.0, 5.0)]
    write(rows, done)
    small = ["--training.steps=3", "--schedule.warmup_steps=1", "--model.num_heads=4", "--validation.samples=4"]
    arguments = ["--config", str(path), "--variants", "mha,mhe_add", "--seeds", "1", "--jobs", "1", "--json", str(rows), *small]
    result = run(["benchmarks/quality.py", *arguments])
    assert result.returncode == 0, result.stderr
    found = [Row(**row) for row in json.loads(rows.read_text())]
    assert found[:2] == done
    (new,) = found[2:]
    assert (new.variant, new.sizes, new.seed, new.steps) == ("mhe_add", "width", 0, 3)
    assert 3 < new.loss < 7
    assert result.stdout.splitlines()[-3:] == list(table(found, ["mha", "mhe_add"]))[1:]
