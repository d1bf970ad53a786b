"""Kinds of models: faults of configurations, and refusals of what a kind cannot do."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from configs.errors import UserError
from configs.load import ConfigError, load_config
from configs.schema import ModelConfig
from model import registry
from model.build import build_model
from model.faults import model_faults
from model.registry import model_class, model_kind, model_kinds
from model.row import RowModel
from pretrain.inference import generate_text, load_model
from pretrain.interop.export import read_source
from tests.helpers import write_run
from tests.random_checkpoint import random_checkpoint


def test_every_kind_has_a_class_with_what_its_entry_says() -> None:
    config = ModelConfig(hidden_size=8, num_layers=1, num_heads=2, vocab_size=5, position="none")
    for name in model_kinds():
        assert issubclass(model_class(name), RowModel)
        model = build_model(config.model_copy(update={"kind": name}))
        assert type(model) is model_class(name)
        assert hasattr(model, "new_cache") is model_kind(name).generates


def test_an_unknown_kind_is_reported_with_all_other_faults(tmp_path: Path) -> None:
    config = write_run(tmp_path, tmp_path / "data")
    overrides = ["--model.kind=decodr", "--training.steps=0"]
    with pytest.raises(ConfigError) as caught:
        load_config(config, overrides, checks=[model_faults], world_size=1)
    faults = [str(fault) for fault in caught.value.faults]
    assert "model.kind = 'decodr': known: decoder" in faults
    assert len(faults) == 2


def test_what_a_kind_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = random_checkpoint(tmp_path)
    monkeypatch.setitem(registry._KINDS, "other", model_kind("decoder"))
    mute = dataclasses.replace(model_kind("decoder"), generates=False, exports=False)
    monkeypatch.setitem(registry._KINDS, "decoder", mute)
    with pytest.raises(UserError, match=r"step_\d+: model.kind = 'decoder': cannot generate text; only other can"):
        list(generate_text(load_model(run), "the", max_new_tokens=1, temperature=0, top_k=None, top_p=None, seed=0))
    with pytest.raises(UserError, match=r"step_\d+: model.kind = 'decoder': cannot be exported; only other can"):
        read_source(run, "auto")
