"""`--match`: a run whose model costs what another configuration's does, and resumes as such."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from configs.errors import UserError
from configs.load import load_config
from configs.schema import Config
from launch.common import ConfigArguments
from model.costs.flops import flops_per_token
from model.costs.parameters import parameters
from tests.helpers import run, write_run


@pytest.fixture
def pair(tmp_path: Path, prepared: Path) -> tuple[Path, Path]:
    """A run, and the configuration of another with more parameters, of which neither the data nor the processes are here."""
    other = write_run(tmp_path, tmp_path / "nowhere", "other")
    other.write_text(other.read_text().replace("mhe_add", "mha") + "parallel: {tensor: 4}\nbackend: fsdp\n")
    return write_run(tmp_path, prepared), other


def parsed(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> Config:
    monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
    return ConfigArguments("a test").parse()[1]


def test_parameters_of_another_configuration(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, other = pair
    config = parsed(monkeypatch, "--config", path, "--match=parameters", "--to", other)
    own, mha = (one.resolved(300).model for one in (config, load_config(other, world_size=4)))
    assert own.ffn_width > 64
    assert sum(parameters(own).values()) == pytest.approx(sum(parameters(mha).values()), rel=0.005)
    before = {"model": config.model.model_copy(update={"ffn_hidden_size": None})}
    assert config.model_copy(update=before) == load_config(path)
    changed = rf"model\.ffn_hidden_size 64 → {own.ffn_width}; [\d,]+ vs [\d,]+ \(.*%\)"
    assert re.fullmatch(rf"matched parameters of {other}: {changed}, vocabulary 320\n", capsys.readouterr().out)


def test_flops_are_those_in_sequences_of_the_run(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path, other = pair
    found = [
        parsed(
            monkeypatch,
            "--config",
            path,
            "--match=flops",
            "--to",
            other,
            f"--data.sequence_length={length}",
            "--model.position=rope",
        )
        for length in (8, 16)
    ]
    mha = load_config(other, world_size=4).resolved(300).model
    for config, length in zip(found, (8, 16), strict=True):
        assert flops_per_token(config.resolved(300).model, length) == pytest.approx(flops_per_token(mha, length), rel=0.005)


def test_the_cache_and_depth(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, other = pair
    arguments = ("--config", path, "--to", other)
    assert parsed(monkeypatch, *arguments, "--match=kv_bytes").model.num_seeds == 8
    assert (
        capsys.readouterr().out == f"matched kv_bytes of {other}: model.num_seeds 1 → 8; 256 vs 256 bytes a token (+0.00 %)\n"
    )
    assert parsed(monkeypatch, *arguments, "--match=kv_bytes", "--match-by=layers").model.num_layers == 16


def test_heads_keep_their_width(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path, other = pair
    overrides = ("--model.head_dim=null", "--match=parameters", "--match-by=heads")
    model = parsed(monkeypatch, "--config", path, "--to", other, *overrides).model
    assert model.num_heads > 8
    assert model.head_dim == 2


def test_only_one_rank_speaks(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, other = pair
    alone = parsed(monkeypatch, "--config", path, "--match=parameters", "--to", other)
    assert capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert parsed(monkeypatch, "--config", path, "--match=parameters", "--to", other) == alone
    assert not capsys.readouterr().out


def test_the_result_can_be_sharded_over_the_ranks(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path, other = pair
    monkeypatch.setenv("WORLD_SIZE", "3")
    layout = ("--model.num_heads=9", "--model.ffn_hidden_size=96", "--parallel.tensor=3")
    config = parsed(monkeypatch, "--config", path, "--match=parameters", "--to", other, *layout)
    assert config.model.ffn_width != 96
    assert config.model.ffn_width % 3 == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--match=parameters"], "--match: needs --to CONFIG, the configuration to match"),
        (["--to=x.yaml"], "--to: only with --match parameters|flops|kv_bytes"),
        (["--match-by=ffn"], "--match-by: only with --match parameters|flops|kv_bytes"),
        (["--match=size", "--to=x.yaml"], "argument --match: invalid choice: 'size'"),
    ],
)
def test_options_that_lack_each_other(
    pair: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit) as error:
        parsed(monkeypatch, "--config", pair[0], *words)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_mistakes(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, other = pair
    arguments = ("--config", path, "--match=parameters", "--to")
    with pytest.raises(UserError, match=r"nowhere\.yaml: 1 fault\n  cannot be read: No such file"):
        parsed(monkeypatch, *arguments, tmp_path / "nowhere.yaml")
    with pytest.raises(UserError, match=r"^--match parameters --to .*: with an MLP of width 1 the model has .*, more than "):
        parsed(monkeypatch, *arguments, other, "--model.num_layers=30")
    with pytest.raises(UserError, match=r"--model\.attention=mhx: known: "):  # what is wrong with the run itself comes first
        parsed(monkeypatch, *arguments, tmp_path / "nowhere.yaml", "--model.attention=mhx")
    other.write_text(other.read_text().replace("head_dim: 4", "head_dim: 4, vocab_size: 512"))
    with pytest.raises(UserError, match=r"other\.yaml: model\.vocab_size = 512: the run's vocabulary has 320; .* or null$"):
        parsed(monkeypatch, *arguments, other)
    assert parsed(monkeypatch, *arguments, other, "--model.vocab_size=512").model.ffn_width > 64
    other.write_text(other.read_text().replace("mha", "mhx"))
    with pytest.raises(UserError, match=r"other\.yaml: 1 fault\n  model\.attention = 'mhx': known: "):
        parsed(monkeypatch, *arguments, other)


def test_a_run_that_resumes_has_the_same_model(pair: tuple[Path, Path], tmp_path: Path) -> None:
    path, other = pair
    matching = ["--config", str(path), "--match", "parameters", "--to", str(other)]
    first = run(["launch/pretrain.py", *matching, "--training.steps=3"])
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("matched parameters of ")
    saved = load_config(tmp_path / "run/config.yaml").model
    assert saved.ffn_hidden_size is not None
    assert saved.ffn_hidden_size > 64
    own = ["--config", str(tmp_path / "run/config.yaml")]
    for steps, words in ((4, matching), (5, own), (6, [*own, *matching[2:]])):
        again = run(["launch/pretrain.py", *words, "--resume=auto", f"--training.steps={steps}"])
        assert again.returncode == 0, again.stderr
        assert f"resume  {tmp_path}/run/checkpoints/step_{steps - 1:08d} at step {steps - 1}" in again.stdout
        assert "changed model." not in again.stdout
        assert load_config(tmp_path / "run/config.yaml").model == saved
    assert "nothing to change" in again.stdout
