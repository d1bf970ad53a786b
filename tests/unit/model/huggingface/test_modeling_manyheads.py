"""The native Hugging Face class: generation, caches, masks, kernels and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from model.generation import generate
from model.huggingface.modeling_manyheads import (
    ManyheadsForSequenceClassification,
    with_alibi,
)
from model.huggingface.native import native_config
from tests.unit.model.huggingface.native_models import (
    APART,
    BEFORE,
    END,
    FEW,
    LENGTH,
    SHAPE,
    VOCABULARY,
    generated,
    greedy,
    model_config,
    named,
    native,
    padded,
    pair,
    some,
    tokens,
)

LATENT: list[dict[str, Any]] = [{"attention": name, "position": "rope"} for name in ("mla", "gla", "gta")]
pytestmark = pytest.mark.usefixtures("one_thread")


@some
def test_cached_generation_is_that_of_the_training_code(case: dict[str, Any]) -> None:
    ours, theirs = pair(case)
    prompt = tokens(2, 6)
    expected = torch.stack(list(generate(ours, prompt, 8, temperature=0, vocab_size=VOCABULARY)), dim=1)
    with torch.no_grad():
        logits = ours.logits(torch.cat([prompt, expected], dim=1))[:, 5:-1, :VOCABULARY]
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
    cached, recomputed = (
        generated(theirs, ids, attention_mask=mask, num_beams=3, output_scores=True, use_cache=cache) for cache in (True, False)
    )
    assert torch.equal(cached.sequences, recomputed.sequences)
    torch.testing.assert_close(cached.sequences_scores, recomputed.sequences_scores)


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
    """Without positions a token sees the same whether its document is alone or follows others."""
    _, theirs = pair({"attention": "mhe_mul", "position": "none", **APART})
    document = torch.tensor([[7, 11, 2, 9, 30]])
    with torch.no_grad():
        alone = theirs(document).logits
        cache = DynamicCache(config=theirs.config)
        theirs(torch.tensor([[3, 8, END]]), past_key_values=cache)
        parts = [theirs(part, past_key_values=cache).logits for part in document.split(2, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), alone, rtol=0, atol=1e-11)


def test_padding_in_the_middle_changes_nothing() -> None:
    """As when a batch padded on the right is continued: padding written as `END` ends no document and has no position."""
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
    with pytest.raises(ValueError, match="a 2D attention_mask"):
        theirs(ids, attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool))


@pytest.mark.parametrize("changes", [{"position": "alibi"}, APART])
def test_a_kernel_without_masks_is_refused(changes: dict[str, Any]) -> None:
    _, theirs = pair({"attention": "mhe_add", **changes})
    theirs.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"flash_attention_2.*needs sdpa or eager"):
        theirs(tokens(1, 4))


@pytest.mark.parametrize("case", [FEW[0], FEW[2], FEW[3], *LATENT], ids=named)
def test_flash_kernels_get_queries_keys_and_values_of_one_width(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def flash(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        assert query.shape[-1] == key.shape[-1] == value.shape[-1]
        assert mask is None
        key, value = (head.repeat_interleave(query.shape[1] // head.shape[1], dim=1) for head in (key, value))
        heads_BNSD = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=kwargs["scaling"])
        return heads_BNSD.transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash)
    _, theirs = pair(case)
    ids = tokens(2, 9)
    with torch.no_grad():
        expected = theirs(ids).logits
        theirs.config._attn_implementation = "flash_attention_2"
        torch.testing.assert_close(theirs(ids).logits, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "case", [{"attention": "mhe_add"}, {"attention": "mhe_mul", "position": "alibi"}, FEW[2], *LATENT], ids=named
)
def test_a_static_cache_gives_the_same_tokens(case: dict[str, Any]) -> None:
    _, theirs = pair(case)
    ids, mask = padded([tokens(1, 7, seed=2)[0], tokens(1, 5, seed=3)[0]])
    static = greedy(theirs, ids, attention_mask=mask, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, greedy(theirs, ids, attention_mask=mask))


class Adapted(nn.Module):
    """A layer with what an adapter adds, whose own weight is not all that it computes."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.weight = layer, layer.weight

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.layer(x) + x.sum(-1, keepdim=True)
        return added


@pytest.mark.parametrize("case", LATENT[:2], ids=named)
def test_adapters_of_latent_attention_hold_with_a_cache(case: dict[str, Any]) -> None:
    _, theirs = pair(case)
    for block in theirs.model.blocks:
        block.attention.key_value = Adapted(block.attention.key_value)
    prompt = tokens(2, 6)
    assert torch.equal(greedy(theirs, prompt), greedy(theirs, prompt, use_cache=False))


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
    ours_loss = F.cross_entropy(ours.logits(ids)[:, :-1, :VOCABULARY].flatten(0, 1), ids[:, 1:].flatten())
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
    """Softmax is invariant to a bias on all keys of a query; bfloat16 is not."""
    visible = torch.tensor([True, True, False, True])[None, None, None]
    bias = with_alibi(visible, num_heads=2, offset=3, dtype=torch.bfloat16)
    lowest = torch.finfo(torch.bfloat16).min
    rows = [[[-slope * 3, -slope * 2, lowest, 0]] for slope in (2.0**-4, 2.0**-8)]
    assert torch.equal(bias, torch.tensor([rows], dtype=torch.bfloat16))


def test_attention_weights_and_hidden_states_are_returned() -> None:
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
