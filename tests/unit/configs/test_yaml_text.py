"""Texts of absurd size or shape end in one short line, at once."""

from pathlib import Path

import pytest

from configs.load import ConfigError, load_config
from tests.unit.configs.good import GOOD, faults_of


def test_a_text_of_aliases_that_grows_is_refused_at_once(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    (tmp_path / "loop.yaml").write_text("run: &a [*a]")
    for name in ("bomb", "loop"):
        with pytest.raises(ConfigError, match="is not valid YAML: its aliases stand for more than 10,000 values") as caught:
            load_config(tmp_path / f"{name}.yaml")
        assert len(str(caught.value)) < 300


def test_a_zero_byte_in_a_path_is_one_line() -> None:
    with pytest.raises(ConfigError, match="cannot be read: embedded null"):
        load_config("a\0b")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a: [1", "is not valid YAML"),
        ("- 1", "must hold a mapping of sections"),
        ("", "must hold a mapping of sections"),
        ("run: {folder: a}\nrun: {folder: b}", "duplicate key"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (GOOD + "1: 2", "1 = 2: unknown key"),
        (GOOD + "null: 2", "None = 2: unknown key"),
        (GOOD + "a: " + "[" * 5000, "is not valid YAML"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_files_that_hold_no_configuration(tmp_path: Path, content: str | bytes | None, expected: str) -> None:
    path = tmp_path / "bad.yaml"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    (fault,) = faults_of(path)
    assert expected in fault
