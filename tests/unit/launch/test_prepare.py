"""What words of the command mean."""

from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from configs.load import load_config
from launch.prepare import parse_arguments, special_tokens


def test_special_tokens_are_those_that_objectives_look_for() -> None:
    config = load_config("configs/quickstart_cpu.yaml", world_size=1)
    sentinels = [config.training.spans.sentinel.format(number) for number in range(3)]
    assert special_tokens("mask,spans:3") == (config.training.masked.token, *sentinels)
    assert special_tokens("spans:3") == tuple(sentinels)
    for text in ("", "masks", "spans", "spans:0", "spans:x", "spans:10000", "mask,mask", "spans:1,spans:2"):
        with pytest.raises(ArgumentTypeError, match=r"is not mask, spans:N|names a part twice"):
            special_tokens(text)


def test_arguments_that_do_not_fit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--input", "stdlib", "--output", str(tmp_path / "out")]
    for more, message in (
        (
            ["--special-tokens", "spans:9", "--vocab-size", "260"],
            "260, but with these --special-tokens at least 266",
        ),
        (["--near-duplicates", "0.3"], "0.3 is not between 0.5 and 1"),
    ):
        with pytest.raises(SystemExit):
            parse_arguments([*words, *more])
        assert message in capsys.readouterr().err
