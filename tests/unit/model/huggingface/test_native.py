"""The native Hugging Face format against the training code: logits, generation, files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from configs.schema import ModelConfig
from model.attention.registry import attention_faults, attention_names
from model.decoder import DecoderLM
from model.generation import generate
from model.huggingface.configuration_manyheads import ManyheadsConfig
from model.huggingface.hosts import Shape
from model.huggingface.modeling_manyheads import (
    ManyheadsForCausalLM,
    ManyheadsForSequenceClassification,
    ManyheadsModel,
    with_alibi,
)
from model.huggingface.native import CODE_FILES, native_config, native_tensors, register

VOCABULARY, ROWS, LENGTH, END = 37, 40, 24, 5  # ROWS pads the vocabulary, as training does
SHAPE = Shape(VOCABULARY, LENGTH, 1, 1)
POSITIONS = ("learned", "rope", "alibi", "none")
BEFORE: dict[str, Any] = {"position": "rope", "embedding_position": "before"}
LLAMA: dict[str, Any] = {"norm": "rmsnorm", "activation": "swiglu", "bias": False, "tie_embeddings": False}
APART: dict[str, Any] = {"attend_across_documents": False, "end_of_document": END}
CASES: list[dict[str, Any]] = [
    *({"attention": attention, "position": position} for attention in attention_names() for position in POSITIONS),
    *({"attention": attention, **BEFORE} for attention in ("mhe_add", "mhe_mul")),
    *({"attention": attention, **BEFORE, **LLAMA, "key_embedding": False} for attention in ("mhe_add", "mhe_mul")),
    *({"attention": attention, **BEFORE, **LLAMA, **APART} for attention in ("mhe_add", "mhe_mul")),
    *({"attention": attention, "position": "rope", "key_embedding": False} for attention in ("mhe_add", "mhe_mul")),
    {"attention": "mhe_add", "bias": False, "key_embedding": False},
    {"attention": "mhe_mul", "tie_embeddings": False, "norm": "rmsnorm"},
    {"attention": "mhe_mul", "position": "alibi", **APART},
    {"attention": "mha", "activation": "swiglu", **APART},
    {"attention": "gqa", "position": "rope", **LLAMA},
]
SPREAD = {"token_embedding": 0.1, "position_embedding": 0.1, "final_norm": 0.1}
FEW: list[dict[str, Any]] = [
    {"attention": "mhe_add"},
    {"attention": "mhe_mul", "position": "alibi", **APART},
    {"attention": "mhe_add", **BEFORE},
    {"attention": "mhe_mul", **BEFORE, **LLAMA},
    {"attention": "mhe_mul", "position": "rope"},
    {"attention": "mhe_add", "position": "none", **APART},
    {"attention": "skv", "position": "rope"},
    {"attention": "sha", "position": "alibi"},
    {"attention": "gqa", "position": "rope", **APART},
]


def named(case: dict[str, Any]) -> str:
    return "-".join(f"{value}" if isinstance(value, str) else f"{key}={value}" for key, value in case.items())


each = pytest.mark.parametrize("case", CASES, ids=named)
some = pytest.mark.parametrize("case", FEW, ids=named)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model_config(case: dict[str, Any]) -> ModelConfig:
    fields: dict[str, Any] = {"hidden_size": 24, "num_layers": 2, "num_heads": 6, "head_dim": 4, "vocab_size": ROWS}
    fields |= {"num_kv_heads": 3} if case["attention"] == "gqa" else {}
    fields |= {"max_position_embeddings": LENGTH} if case.get("position", "learned") == "learned" else {}
    config = ModelConfig(**fields | case)
    assert not attention_faults({"model": config})
    return config


def pair(case: dict[str, Any], dtype: torch.dtype = torch.float64, kernel: str = "sdpa") -> tuple[DecoderLM, Any]:
    """A model of ours with large random parameters, and the same in the native format."""
    config = model_config(case)
    ours = DecoderLM(config).to(dtype).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            # Small embeddings: otherwise a token is likely to be followed by itself, whatever came before.
            noise = torch.randn(parameter.shape, generator=draw)
            parameter.copy_(1 + 0.2 * noise if name.endswith("norm.weight") else noise * SPREAD.get(name.split(".")[-2], 0.5))
    return ours, native(ours, kernel)


def native(ours: DecoderLM, kernel: str = "sdpa") -> Any:
    settings = native_config(ours.config, SHAPE)
    settings._attn_implementation = kernel
    theirs: Any = ManyheadsForCausalLM(settings)
    theirs = theirs.to(next(ours.parameters()).dtype).eval()
    parameters = ours.state_dict()
    tensors = {name: make() for name, make in native_tensors(ours.config, parameters.__getitem__, SHAPE)}
    found = theirs.load_state_dict(tensors, strict=False)
    tied = ["lm_head.weight"] if ours.config.tie_embeddings else []
    assert (found.missing_keys, found.unexpected_keys) == (tied, [])
    theirs.tie_weights()
    return theirs


def tokens(rows: int, length: int, seed: int = 1) -> Tensor:
    """Random ids; each row has an end of a document in it."""
    drawn = torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    drawn[torch.arange(rows), torch.arange(rows) % (length - 2) + 1] = END
    return drawn


def padded(prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Prompts (S,) side by side with padding on the left, which is written as `END`, and the mask."""
    length = max(len(prompt) for prompt in prompts)
    rows = [F.pad(prompt, (length - len(prompt), 0), value=END) for prompt in prompts]
    masks = [F.pad(torch.ones_like(prompt), (length - len(prompt), 0)) for prompt in prompts]
    return torch.stack(rows), torch.stack(masks)


def generated(model: Any, ids: Tensor, count: int = 8, **options: Any) -> Any:
    """What transformers says of the `count` likeliest ids after the prompt."""
    options = {"do_sample": False, "attention_mask": torch.ones_like(ids), "return_dict_in_generate": True} | options
    return model.generate(ids, max_new_tokens=count, min_new_tokens=count, pad_token_id=END, **options)


def greedy(model: Any, ids: Tensor, count: int = 8, **options: Any) -> Tensor:
    """The `count` likeliest ids after the prompt."""
    return generated(model, ids, count, **options).sequences[:, ids.shape[1] :]


@each
def test_logits_are_those_of_the_training_code(case: dict[str, Any]) -> None:
    ours, theirs = pair(case)
    ids = tokens(3, 11)
    with torch.no_grad():
        logits = ours(ids)[..., :VOCABULARY]
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
    assert not list(theirs.buffers())  # from_pretrained would leave them without values


def test_rows_that_only_pad_the_vocabulary_are_cut() -> None:
    ours, theirs = pair({"attention": "mhe_add", "tie_embeddings": False})
    assert theirs.lm_head.weight.shape == theirs.model.token_embedding.weight.shape == (VOCABULARY, 24)
    assert torch.equal(theirs.lm_head.weight, ours.output.weight[:VOCABULARY])


@some
def test_cached_generation_is_that_of_the_training_code(case: dict[str, Any]) -> None:
    ours, theirs = pair(case)
    prompt = tokens(2, 6)
    expected = torch.stack(list(generate(ours, prompt, 8, temperature=0, vocab_size=VOCABULARY)), dim=1)
    with torch.no_grad():
        logits = ours(torch.cat([prompt, expected], dim=1))[:, 5:-1, :VOCABULARY]
    for kernel in ("sdpa", "eager"):
        out = generated(native(ours, kernel), prompt, output_logits=True)
        assert torch.equal(out.sequences[:, 6:], expected)
        torch.testing.assert_close(torch.stack(out.logits, dim=1).double(), logits, rtol=0, atol=1e-5)
    assert torch.equal(greedy(theirs, prompt, use_cache=False), expected)


@some
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_padding_on_the_left_changes_nothing(case: dict[str, Any], kernel: str) -> None:
    _, theirs = pair(case, kernel=kernel)
    prompts = [tokens(1, 8, seed=2)[0], tokens(1, 4, seed=3)[0]]
    ids, mask = padded(prompts)
    with torch.no_grad():
        together = theirs(ids, attention_mask=mask).logits
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            alone = theirs(prompt[None]).logits[0]
        torch.testing.assert_close(together[row, -len(prompt) :], alone, rtol=0, atol=1e-10)
    continued = greedy(theirs, ids, attention_mask=mask)
    for row, prompt in enumerate(prompts):
        assert torch.equal(continued[row], greedy(theirs, prompt[None])[0])


@some
def test_beams_are_the_same_with_and_without_a_cache(case: dict[str, Any]) -> None:
    _, theirs = pair(case)
    ids, mask = padded([tokens(1, 7, seed=2)[0], tokens(1, 5, seed=3)[0]])
    cached, anew = (
        generated(theirs, ids, attention_mask=mask, num_beams=3, output_scores=True, use_cache=cache) for cache in (True, False)
    )
    assert torch.equal(cached.sequences, anew.sequences)
    torch.testing.assert_close(cached.sequences_scores, anew.sequences_scores)


@pytest.mark.parametrize("case", [*FEW[1:3], FEW[5], FEW[8]], ids=named)
def test_a_cache_may_be_reordered_repeated_and_cropped(case: dict[str, Any]) -> None:
    _, theirs = pair(case)
    ids, mask = padded([tokens(1, 8, seed=2)[0], tokens(1, 6, seed=3)[0]])
    rows = torch.tensor([1, 1, 0])
    with torch.no_grad():
        expected = theirs(ids[rows], attention_mask=mask[rows]).logits[:, 5:]
        cache = theirs(ids[:, :6], attention_mask=mask[:, :6]).past_key_values
        cache.crop(-1)
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([2, 3, 0]))
        continued = theirs(ids[rows, 5:], attention_mask=mask[rows], past_key_values=cache).logits
    torch.testing.assert_close(continued, expected, rtol=0, atol=1e-10)


def test_a_document_hides_what_was_cached_before_it() -> None:
    """Without positions a token sees the same whether its document stands alone or behind others."""
    _, theirs = pair({"attention": "mhe_mul", "position": "none", **APART})
    document = torch.tensor([[7, 11, 2, 9, 30]])
    with torch.no_grad():
        alone = theirs(document).logits
        cache = DynamicCache(config=theirs.config)
        theirs(torch.tensor([[3, 8, END]]), past_key_values=cache)
        parts = [theirs(part, past_key_values=cache).logits for part in document.split(2, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), alone, rtol=0, atol=1e-11)


def test_padding_in_the_middle_changes_nothing() -> None:
    """As when a batch was padded on the right and goes on: padding written as `END` ends no document, and has no position."""
    _, theirs = pair({"attention": "mhe_add", **APART})
    prompt, rest = torch.tensor([[7, 11, END, 2, 9]]), torch.tensor([[30, 4, 8]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 1, 1, 1]])
    with torch.no_grad():
        cache = theirs(F.pad(prompt, (0, 2), value=END), attention_mask=mask[:, :7]).past_key_values
        continued = theirs(rest, attention_mask=mask, past_key_values=cache).logits
        alone = theirs(torch.cat([prompt, rest], dim=1)).logits[:, -3:]
    torch.testing.assert_close(continued, alone, rtol=0, atol=1e-11)


def test_what_cannot_keep_documents_apart_is_refused() -> None:
    _, theirs = pair({"attention": "mhe_add", **APART})
    ids = tokens(1, 4)
    with pytest.raises(ValueError, match="DynamicCache, not a StaticCache"):
        greedy(theirs, ids, cache_implementation="static")
    with pytest.raises(ValueError, match="needs input_ids"):
        theirs(inputs_embeds=theirs.model.token_embedding(ids))
    with pytest.raises(ValueError, match="attention_mask of two dimensions"):
        theirs(ids, attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool))


@pytest.mark.parametrize("changes", [{"position": "alibi"}, APART])
def test_a_kernel_without_masks_is_refused(changes: dict[str, Any]) -> None:
    _, theirs = pair({"attention": "mhe_add", **changes})
    theirs.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"flash_attention_2.*needs sdpa or eager"):
        theirs(tokens(1, 4))


@pytest.mark.parametrize("case", [FEW[0], FEW[2], FEW[3]], ids=named)
def test_flash_kernels_get_queries_keys_and_values_of_one_width(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def flash(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        assert query.shape[-1] == key.shape[-1] == value.shape[-1]
        assert mask is None
        key, value = (head.expand(-1, query.shape[1], -1, -1) for head in (key, value))
        heads_BNSD = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=kwargs["scaling"])
        return heads_BNSD.transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash)
    _, theirs = pair(case)
    ids = tokens(2, 9)
    with torch.no_grad():
        expected = theirs(ids).logits
        theirs.config._attn_implementation = "flash_attention_2"
        torch.testing.assert_close(theirs(ids).logits, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("case", [{"attention": "mhe_add"}, {"attention": "mhe_mul", "position": "alibi"}, FEW[2]], ids=named)
def test_a_static_cache_gives_the_same_tokens(case: dict[str, Any]) -> None:
    _, theirs = pair(case)
    ids, mask = padded([tokens(1, 7, seed=2)[0], tokens(1, 5, seed=3)[0]])
    static = greedy(theirs, ids, attention_mask=mask, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, greedy(theirs, ids, attention_mask=mask))


def test_sampling_follows_the_seed() -> None:
    _, theirs = pair({"attention": "mhe_add"})
    prompt = tokens(2, 6)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(greedy(theirs, prompt, do_sample=True, temperature=2.0))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(("changes", "key_width"), [({}, 4), ({"position": "rope"}, 4), (BEFORE, 8)])
@pytest.mark.parametrize("attention", ["mhe_add", "mhe_mul"])
def test_the_cache_keeps_one_head(attention: str, changes: dict[str, Any], key_width: int) -> None:
    def layers(case: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
        cache = pair(case)[1](tokens(2, 9)).past_key_values
        return [(layer.keys, layer.values) for layer in cache.layers]

    kept = layers({"attention": attention, **changes})
    assert [(k.shape, v.shape) for k, v in kept] == 2 * [((2, 1, 9, key_width), (2, 1, 9, 4))]
    if key_width == 4:
        of_mha = layers({"attention": "mha", "position": changes.get("position", "learned")})
        assert 6 * sum(k.nbytes + v.nbytes for k, v in kept) == sum(k.nbytes + v.nbytes for k, v in of_mha)


@some
def test_gradients_are_the_same_with_checkpointing_and_in_the_training_code(case: dict[str, Any]) -> None:
    ours, theirs = pair(case)
    ids = tokens(2, 9)
    ours_loss = F.cross_entropy(ours(ids)[:, :-1, :VOCABULARY].flatten(0, 1), ids[:, 1:].flatten())
    ours_loss.backward()
    expected = {name: parameter.grad for name, parameter in ours.named_parameters()}
    passes: list[None] = []
    theirs.model.blocks[0].attention.register_forward_hook(lambda *_: passes.append(None))
    for checkpointing in (False, True):
        theirs.train()
        passes.clear()
        if checkpointing:
            theirs.activation_checkpointing_enable()
        theirs.zero_grad()
        loss = theirs(ids, labels=ids).loss
        loss.backward()
        assert len(passes) == 1 + checkpointing
        torch.testing.assert_close(loss.double(), ours_loss, rtol=1e-6, atol=0)
        for name, parameter in theirs.named_parameters():
            found, wanted = parameter.grad, expected["output.weight" if "lm_head" in name else name.removeprefix("model.")]
            assert found is not None
            assert wanted is not None
            # transformers computes the loss in float32.
            torch.testing.assert_close(found, wanted[: len(found)], rtol=0, atol=1e-6 * max(1.0, float(wanted.abs().max())))


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_bfloat16_with_padding_stays_near_float64(position: str, kernel: str) -> None:
    _, exact = pair({"attention": "mhe_mul", "position": position}, kernel=kernel)
    _, coarse = pair({"attention": "mhe_mul", "position": position}, torch.bfloat16, kernel)
    ids, mask = padded([tokens(1, 9, seed=2)[0], tokens(1, 6, seed=3)[0]])
    with torch.no_grad():
        wanted, found = (model(ids, attention_mask=mask).logits.double() for model in (exact, coarse))
    assert found.isfinite().all()
    error = ((found - wanted) * mask[..., None]).abs().max() / wanted.abs().max()
    assert error < 0.05


def test_biases_of_alibi_are_small_for_near_keys() -> None:
    """Softmax does not care what is added to all keys of a query, but bfloat16 does."""
    visible = torch.tensor([True, True, False, True])[None, None, None]
    bias = with_alibi(visible, num_heads=2, offset=3, dtype=torch.bfloat16)
    lowest = torch.finfo(torch.bfloat16).min
    rows = [[[-slope * 3, -slope * 2, lowest, 0]] for slope in (2.0**-4, 2.0**-8)]
    assert torch.equal(bias, torch.tensor([rows], dtype=torch.bfloat16))


def test_attention_weights_and_hidden_states_are_given_out() -> None:
    _, theirs = pair({"attention": "mhe_add"}, kernel="eager")
    with torch.no_grad():
        out = theirs(tokens(2, 9), output_attentions=True, output_hidden_states=True)
    assert [weights.shape for weights in out.attentions] == 2 * [(2, 6, 9, 9)]
    torch.testing.assert_close(out.attentions[0].sum(-1), torch.ones(2, 6, 9, dtype=torch.float64))
    assert len(out.hidden_states) == 3
    torch.testing.assert_close(theirs.lm_head(out.hidden_states[-1]), out.logits)


def test_logits_to_keep_gives_the_last_logits_only() -> None:
    _, theirs = pair({"attention": "mhe_add"})
    ids = tokens(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids, logits_to_keep=2).logits, theirs(ids).logits[:, -2:])


def test_more_tokens_than_learned_positions_are_refused() -> None:
    _, theirs = pair({"attention": "mhe_add"})
    theirs(tokens(1, LENGTH))
    with pytest.raises(ValueError, match=f"position {LENGTH}, but max_position_embeddings is {LENGTH}"):
        theirs(tokens(1, LENGTH + 1))
    ids, mask = padded([tokens(1, LENGTH)[0], tokens(1, 3)[0]])
    ids, mask = F.pad(ids, (2, 0)), F.pad(mask, (2, 0))
    assert theirs(ids, attention_mask=mask).logits.isfinite().all()  # padding needs no position


def test_new_models_start_with_heads_alike() -> None:
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


def test_a_classifier_reads_the_last_token_before_padding() -> None:
    torch.manual_seed(0)
    settings = native_config(model_config({"attention": "mhe_mul", **BEFORE}), SHAPE)
    settings.pad_token_id, settings.num_labels = 0, 3
    model = ManyheadsForSequenceClassification(settings).double().eval()
    short, long = torch.tensor([[4, 9, 1]]), torch.tensor([[8, 2, 5, 7, 3]])
    ids = torch.cat([F.pad(short, (0, 2)), long])
    with torch.no_grad():
        logits = model(ids, attention_mask=(ids != 0).long()).logits
        for row, prompt in enumerate((short, long)):
            expected = model.score(model.model(prompt).last_hidden_state[0, -1])
            torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-12)
    loss = model(ids, attention_mask=(ids != 0).long(), labels=torch.tensor([2, 0])).loss
    torch.testing.assert_close(loss.double(), F.cross_entropy(logits, torch.tensor([2, 0])), rtol=1e-6, atol=0)


def test_registered_classes_load_without_trust(tmp_path: Path) -> None:
    register()
    _, theirs = pair({"attention": "mhe_add"}, torch.float32)
    theirs.save_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert type(classifier) is ManyheadsForSequenceClassification
    assert type(classifier.model) is ManyheadsModel
    assert torch.equal(classifier.model.token_embedding.weight, theirs.model.token_embedding.weight)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention": "mla"}, "attention 'mla': known are mha"),
        ({"position": "relative"}, "known are learned, rope, alibi, none"),
        ({"norm": "batchnorm"}, "known are layernorm, rmsnorm"),
        ({"hidden_act": "relu"}, "known are gelu, silu"),
        ({"embedding_position": "within"}, "known are before, after"),
        ({"embedding_position": "before"}, "only mhe_add and mhe_mul with rope"),
        ({"embedding_position": "before", "position": "rope", "attention": "mha"}, "only mhe_add and mhe_mul with rope"),
        ({"num_attention_heads": 7}, r"num_attention_heads \(7\) must divide hidden_size \(768\)"),
        ({"num_attention_heads": 0}, "num_attention_heads 0: must be a whole number above 0"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers 1.5"),
        ({"head_dim": -4}, "head_dim -4"),
        ({"head_dim": 5, "position": "rope"}, "must be even with rope"),
        ({"attention": "el", "head_dim": 32}, r"\(12 \* 32\) must be hidden_size \(768\)"),
        ({"attention": "gqa"}, "gqa needs num_key_value_heads"),
        ({"attention": "gqa", "num_key_value_heads": 5}, "must divide num_attention_heads"),
        ({"num_key_value_heads": 12}, "the cache of mhe_add keeps 1"),
        ({"attention": "mha", "num_key_value_heads": 1}, "the cache of mha keeps 12"),
        ({"dropout": 1.0}, "dropout"),
        ({"norm_epsilon": 0.0}, "norm_epsilon"),
        ({"rope_theta": 0.0}, "rope_theta"),
        ({"initializer_range": 0.0}, "initializer_range"),
        ({"end_of_document": 3}, "only attend_across_documents false"),
        ({"attend_across_documents": False}, "needs a token id below 32000"),
        ({"attend_across_documents": False, "end_of_document": 32000}, "needs a token id below 32000"),
    ],
)
def test_impossible_configurations_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ManyheadsConfig(**fields)
