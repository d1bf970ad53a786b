"""Export to the native Hugging Face format: logits of the training code, and folders that load again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from configs.schema import ModelConfig
from model.decoder import DecoderLM
from model.huggingface.configuration_manyheads import ManyheadsConfig
from model.huggingface.modeling_manyheads import (
    ManyheadsForCausalLM,
    ManyheadsForSequenceClassification,
    ManyheadsModel,
)
from model.huggingface.native import CODE_FILES, native_config, register
from model.huggingface.stock import Shape
from tests.unit.model.huggingface.native_models import (
    BEFORE,
    CASES,
    FEW,
    LENGTH,
    LLAMA,
    ROWS,
    SHAPE,
    VOCABULARY,
    each,
    greedy,
    model_config,
    named,
    pair,
    tokens,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@each
def test_logits_are_those_of_the_training_code(case: dict[str, Any]) -> None:
    ours, theirs = pair(case)
    ids = tokens(3, 11)
    with torch.no_grad():
        logits = ours.logits(ids)[..., :VOCABULARY]
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 3e-5)):
            for kernel in ("sdpa", "eager"):
                theirs.config._attn_implementation = kernel
                found = theirs.to(dtype)(ids).logits.double()
                torch.testing.assert_close(found, logits, rtol=0, atol=tolerance * float(logits.abs().max()))


@each
def test_parameters_are_those_of_the_training_code(case: dict[str, Any]) -> None:
    ours = DecoderLM(model_config(case))
    theirs = ManyheadsForCausalLM(native_config(ours.config, Shape(ROWS, LENGTH, 1, 1)))
    without_output = {name: value for name, value in ours.state_dict().items() if name != "output.weight"}
    theirs.model.load_state_dict(without_output, strict=True)
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
    assert not list(theirs.buffers())  # from_pretrained would leave them uninitialised


def test_every_field_of_a_model_is_exported_or_has_no_effect_there() -> None:
    """A new field of the schema must be added to the native configuration, or here with a reason."""
    renamed = {
        "kind": "decoders only",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "ffn_hidden_size": "intermediate_size",
        "activation": "hidden_act",
        "init_std": "initializer_range",
        "tie_embeddings": "tie_word_embeddings",
        "attention_kernel": "transformers chooses its own",
        "head_embedding_std": "initial weights only",
        "attention_output_init_scale": "initial weights only",
        "vocab_multiple": "vocab_size",
        "sliding_window": "attention_window",
        "linformer_length": "for models that are not causal",
        "linformer_tokens": "likewise",
    }
    assert {name for name in ModelConfig.model_fields if name not in vars(ManyheadsConfig())} == set(renamed)


def test_rows_that_only_pad_the_vocabulary_are_dropped() -> None:
    ours, theirs = pair({"attention": "mhe_add", "tie_embeddings": False})
    assert theirs.lm_head.weight.shape == theirs.model.token_embedding.weight.shape == (VOCABULARY, 24)
    assert torch.equal(theirs.lm_head.weight, ours.output.weight[:VOCABULARY])


def test_new_models_start_with_equal_heads() -> None:
    torch.manual_seed(0)
    settings = native_config(model_config({"attention": "mhe_add", "hidden_size": 192, "init_std": 0.05}), SHAPE)
    parameters = dict(ManyheadsForCausalLM(settings).named_parameters())
    attention = "model.blocks.1.attention."
    assert all(parameters[f"{attention}{name}_embedding"].count_nonzero() == 0 for name in ("query", "key", "value"))
    assert abs(float(parameters[f"{attention}qkv.weight"].detach().std()) / 0.05 - 1) < 0.1
    assert parameters["model.final_norm.weight"].eq(1).all()
    assert parameters["model.blocks.0.mlp.up.bias"].eq(0).all()


@pytest.mark.parametrize("case", [FEW[1], FEW[2], CASES[-3], {"attention": "mha", **LLAMA}], ids=named)
def test_saved_and_loaded_again_it_is_the_same_to_the_bit(case: dict[str, Any], tmp_path: Path) -> None:
    _, theirs = pair(case, torch.float32)
    theirs.save_pretrained(tmp_path)
    register()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is ManyheadsForCausalLM
    for name, parameter in theirs.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], parameter)
    ids = tokens(2, 9)
    assert torch.equal(loaded(ids).logits, theirs(ids).logits)
    assert loaded.config.to_diff_dict() == ManyheadsConfig.from_pretrained(tmp_path).to_diff_dict()


REMOTE = """
import importlib.util, sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
assert importlib.util.find_spec("configs") is None and importlib.util.find_spec("model") is None
ids = torch.load("ids.pt")
kept = {}
for folder in ("exported", "again"):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    kept[folder] = model(ids).logits
    kept[folder + " generated"] = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    model.save_pretrained("again")
assert type(model).__module__.startswith("transformers_modules.")
base = AutoModel.from_pretrained("exported", trust_remote_code=True)
kept["hidden"] = base(ids).last_hidden_state
classifier = AutoModelForSequenceClassification.from_pretrained("exported", trust_remote_code=True, num_labels=3)
classifier.save_pretrained("classifier")
kept["classes"] = classifier(ids[:1]).logits
reloaded = AutoModelForSequenceClassification.from_pretrained("classifier", trust_remote_code=True)
kept["classes again"] = reloaded(ids[:1]).logits
torch.save(kept, "kept.pt")
"""


def test_a_folder_with_its_code_loads_without_our_packages(tmp_path: Path) -> None:
    _, theirs = pair({"attention": "mhe_mul", **BEFORE}, torch.float32)
    theirs.save_pretrained(tmp_path / "exported")
    for file in CODE_FILES:
        shutil.copy(file, tmp_path / "exported")
    ids = tokens(2, 9)
    torch.save(ids, tmp_path / "ids.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", REMOTE]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    kept = torch.load(tmp_path / "kept.pt")
    with torch.no_grad():
        logits, hidden = theirs(ids).logits, theirs.model(ids).last_hidden_state
    for folder in ("exported", "again"):
        assert torch.equal(kept[folder], logits)
        assert torch.equal(kept[f"{folder} generated"][:, 9:], greedy(theirs, ids, 4))
    assert torch.equal(kept["hidden"], hidden)
    assert kept["classes"].shape == (1, 3)
    assert torch.equal(kept["classes"], kept["classes again"])


def test_registered_classes_load_without_trust(tmp_path: Path) -> None:
    register()
    _, theirs = pair({"attention": "mhe_add"}, torch.float32)
    theirs.save_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert type(classifier) is ManyheadsForSequenceClassification
    assert type(classifier.model) is ManyheadsModel
    assert torch.equal(classifier.model.token_embedding.weight, theirs.model.token_embedding.weight)
