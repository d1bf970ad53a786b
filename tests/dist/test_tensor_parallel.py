"""Every variant cut over 1, 2 and 4 real ranks against the whole model on one: losses, gradients, parameters after training.

The ranks of one size run all their cases in one start, since importing takes longer than running; each case is then a test.
"""

from __future__ import annotations

import functools
import json
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.schema import ModelConfig
from model import registry
from model.decoder import DecoderLM
from model.initialization import init_weights
from model.parallel.sharding import counted_once, partition_specs
from pretrain.optim.clipping import clip_gradients
from tests.bidirectional import BIDIRECTIONAL, KIND
from tests.helpers import joined, losses_of, named, run_ranks
from tests.needs import causal_names, needs

STYLES: dict[str, dict[str, Any]] = {
    # The vocabulary divides by neither 2 nor 4.
    "learned": {"position": "learned", "max_position_embeddings": 16, "vocab_size": 37},
    "rope": {"position": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "tie_embeddings": False},
    "alibi": {"position": "alibi", "attend_across_documents": False, "end_of_document": 3},
}
SHARED = ("sha", "mhe_add", "mhe_mul", "mla", "gla", "gta", "mfa", "mhe_low_rank", "tpa")  # those that have something to gather
SWITCHED: tuple[tuple[str, Any], ...] = (
    *(("num_layers", 4), ("output_gate", "head"), ("no_position_every", 4), ("sliding_window", 5)),
    *(("full_attention_every", 3), ("attention_sinks", True), ("logit_softcap", 2.0)),
)
KINDS = ("mha", "mqa", "el", "mhe_add", "gla", "tpa")  # with each kind of projection
LEARNING_RATE, CLIP = 1e-2, 0.5


@dataclass(frozen=True)
class Case:
    attention: str | tuple[str, ...]
    style: str
    sequence: bool
    gather: str = "weights"
    changes: tuple[tuple[str, Any], ...] = ()
    recompute: bool = False

    def __str__(self) -> str:
        changes = "".join(f"-{key}={value}" for key, value in self.changes)
        options = "-sequence" * self.sequence + "-recompute" * self.recompute
        return f"{self.config.attention_words.replace(', ', '+')}-{self.style}-{self.gather}{options}{changes}"

    @property
    def config(self) -> ModelConfig:
        sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 8, "head_dim": 4, "vocab_size": 40, "ffn_hidden_size": 48}
        sizes |= {"head_dim": 8} if self.attention == "gta" else {}  # 4 ranks share the half of a key that all heads have
        fields = sizes | needs(self.attention) | STYLES[self.style] | dict(self.changes)
        return ModelConfig(attention=self.attention, **fields)


PRODUCT = [
    Case(name, style, sequence, gather)
    for name in causal_names()
    for style in STYLES
    for sequence in (False, True)
    for gather in (("weights", "activations") if name in SHARED else ("weights",))
]


def cases() -> list[Case]:
    special = [
        Case("gqa", "learned", sequence, changes=(("num_kv_heads", heads),))
        for sequence in (False, True)
        for heads in (1, 4, 8)
    ]
    for sequence in (False, True):
        special += [
            Case("mhe_add", "learned", sequence, changes=(("attention_kernel", "shared_scores"),)),
            Case("mhe_add", "alibi", sequence, changes=(("attention_kernel", "shared_scores"),)),
            Case("mhe_add", "learned", sequence, changes=(("key_embedding", False),)),
            Case("mhe_add", "rope", sequence, changes=(("embedding_position", "before"),)),
            Case("mhe_mul", "rope", sequence, changes=(("embedding_position", "before"),), recompute=True),
            Case("mhe_mul", "rope", sequence, changes=(("num_seeds", 4),)),
            Case("mhe_add", "alibi", sequence, changes=(("num_seeds", 4), ("attention_kernel", "shared_scores"))),
            Case("mhe_add", "learned", sequence, "activations", changes=(("num_seeds", 2),)),  # one seed for two of 4 ranks
            Case("mhe_mul", "learned", sequence, changes=(("num_seeds", 2), ("head_embeddings", False))),
            Case("mhe_low_rank", "rope", sequence, changes=(("num_seeds", 4), ("qk_norm", True))),
            Case("mha", "learned", sequence, recompute=True),
            Case(("gqa", "mhe_add"), "rope", sequence, "activations", changes=(("qk_norm", True), ("num_layers", 3))),
            Case("diff", "alibi", sequence, changes=(("num_kv_heads", 2), ("qk_norm", True))),
            Case("linformer", "rope", sequence, changes=(("kind", BIDIRECTIONAL), ("qk_norm", True))),
            Case("diff_v2", "rope", sequence, changes=(("num_kv_heads", 2),)),
            Case("mla", "rope", sequence, changes=(("query_rank", None),)),
            Case("gla", "learned", sequence, changes=(("num_latents", 4),)),
            Case("mqa", "learned", sequence, changes=(("vocab_size", 5),)),  # a rank without any word
            Case("mhe_mul", "learned", sequence, changes=(("attend_across_documents", False), ("end_of_document", 3))),
            Case(
                "mhe_mul", "rope", sequence, changes=(("rope_fraction", 0.5), ("no_position_every", 2), ("sliding_window", 5))
            ),
            Case("mhe_add", "rope", sequence, changes=(("attention_sinks", True),)),
            Case(("mla", "diff", "tpa", "mhe_low_rank"), "rope", sequence, changes=SWITCHED),
            Case(("gta", "diff_v2", "mfa", "gla"), "alibi", sequence, changes=SWITCHED),
            Case("mha", "alibi", sequence, changes=(("attention_sinks", True), ("logit_softcap", 2.0))),
            Case("gqa", "rope", sequence, changes=(("qk_norm", True), ("output_gate", "elementwise"))),
            Case("mhe_add", "learned", sequence, "activations", changes=(("qk_norm", True), ("output_gate", "head"))),
        ]
    return PRODUCT + special


def sharded_model(case: Case) -> DecoderLM:
    from megatron.core import parallel_state

    from model.parallel.tensor import TensorParallelLayers, parallel_config

    group = parallel_state.get_tensor_model_parallel_group()
    layers = TensorParallelLayers(parallel_config(group.size(), case.sequence), group, case.gather)  # type: ignore[arg-type]
    model = DecoderLM(case.config, layers, case.recompute)
    init_weights(model, seed=7)
    return model


def whole_model(case: Case) -> DecoderLM:
    model = DecoderLM(case.config)
    init_weights(model, seed=7)
    return model


def batch(config: ModelConfig, step: int = 0) -> tuple[Tensor, Tensor]:
    assert config.vocab_size is not None
    tokens = torch.randint(0, config.vocab_size, (3, 13), generator=torch.Generator().manual_seed(step))
    return tokens[:, :-1], tokens[:, 1:]


def gathered(model: DecoderLM, value: Callable[[nn.Parameter], Tensor | None]) -> dict[str, Tensor]:
    """`value` of every parameter, whole, from the shards of all ranks. Replicas must be equal to the bit."""
    specs, own = partition_specs(model), {}
    for name in specs:
        found = value(model.get_parameter(name))
        assert found is not None, name
        own[name] = found
    flat = torch.cat([tensor.flatten() for tensor in own.values()])  # one collective, which takes longer to start than to move
    of_ranks = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(of_ranks, flat)
    parts = zip(*(each.split([tensor.numel() for tensor in own.values()]) for each in of_ranks), strict=True)
    result = {}
    for (name, spec), of_name in zip(specs.items(), parts, strict=True):
        shards = [part.view_as(own[name]) for part in of_name]
        if spec.dim is None:
            assert all(torch.equal(shard, shards[0]) for shard in shards), f"replicas of {name} differ"
        result[name] = spec.unshard(shards)
    return result


def compare(
    found: dict[str, Tensor], model: DecoderLM, value: Callable[[nn.Parameter], Tensor | None], rtol: float, atol: float
) -> None:
    assert len(found) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        expected = value(parameter)
        torch.testing.assert_close(found[name], expected, rtol=rtol, atol=atol, msg=named(name))


def gradient(parameter: nn.Parameter) -> Tensor | None:
    return parameter.grad


def check_exact_gradients(case: Case) -> None:
    """In float64 and without Megatron's cross-entropy, which computes in float32, nothing but the order of sums differs.

    Once clipped, too, by a norm that counts each parameter once: what an optimizer then makes of them knows no shards.
    """
    whole, shards = whole_model(case).double(), sharded_model(case).double()
    tokens, _ = batch(case.config)
    weights = torch.randn(3, 12, case.config.vocab_size or 0, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected, found = whole.logits(tokens), shards.logits(tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    compare(gathered(shards, gradient), whole, gradient, rtol=1e-9, atol=1e-11)
    norm = float(nn.utils.clip_grad_norm_(whole.parameters(), CLIP))
    assert norm > 2 * CLIP
    assert clipped(shards) == pytest.approx(norm, rel=1e-9)
    compare(gathered(shards, gradient), whole, gradient, rtol=1e-5, atol=1e-11)


def clipped(shards: DecoderLM) -> float:
    """The norm of the gradients, which are clipped."""
    from megatron.core import parallel_state

    counted = counted_once(partition_specs(shards), dist.get_rank())
    parameters = [parameter for name, parameter in shards.named_parameters() if name in counted]
    groups = [parallel_state.get_tensor_model_parallel_group()]
    return clip_gradients(shards.parameters(), parameters, groups, CLIP, torch.device("cpu"))


def check_training(case: Case) -> None:
    """Three steps of AdamW with clipping; the losses are in float32."""
    whole, shards = whole_model(case).double(), sharded_model(case).double()
    optimizers = [torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE) for model in (whole, shards)]
    for step in range(3):
        tokens, labels = batch(case.config, step)
        expected, found = losses_of(whole, tokens, labels), losses_of(shards, tokens, labels)
        torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=5e-6)
        expected.mean().backward()
        found.mean().backward()
        if step == 0:
            compare(gathered(shards, gradient), whole, gradient, rtol=2e-6, atol=1e-7)
        norm = nn.utils.clip_grad_norm_(whole.parameters(), CLIP)
        assert clipped(shards) == pytest.approx(float(norm), rel=1e-5)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    # Gradients that are zero but for rounding, as those of biases of keys, move a parameter by a share of the learning rate.
    compare(gathered(shards, lambda p: p.detach()), whole, lambda p: p.detach(), rtol=0, atol=5e-3 * LEARNING_RATE)


def check_storage(case: Case) -> None:
    """MHE: each rank stores 1/t of the shared projection, of the MLP and of the vocabulary; head embeddings whole."""
    size = dist.get_world_size()
    shapes = {name: tuple(p.shape) for name, p in sharded_model(case).named_parameters()}
    assert shapes["blocks.0.attention.qkv.weight"] == (12 // size, 32)
    assert shapes["blocks.0.attention.qkv.bias"] == (12 // size,)
    assert shapes["blocks.0.attention.query_embedding"] == (8, 4)
    assert shapes["blocks.0.attention.out.weight"] == (32, 32 // size)
    assert shapes["blocks.0.mlp.up.weight"] == (48 // size, 32)
    assert shapes["token_embedding.weight"] == (-(-37 // size), 32)


def check_kept(case: Case) -> None:
    """No copy of a weight waits for the backward pass beside the weight itself."""
    shards = sharded_model(case)
    shapes = {p.shape for p in shards.parameters() if p.ndim == 2} | {p.t().shape for p in shards.parameters() if p.ndim == 2}
    parameters = {p.untyped_storage().data_ptr() for p in shards.parameters()}
    copies = []

    def pack(kept: Tensor) -> Tensor:
        if kept.shape in shapes and kept.untyped_storage().data_ptr() not in parameters:
            copies.append(tuple(kept.shape))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        losses_of(shards, *batch(case.config))
    assert copies == []


def check_alone(case: Case) -> None:
    """Layers called one by one give what `project` gives for all."""
    attention: Any = sharded_model(case).blocks[0].attention
    x_SBH = torch.randn(12 // (dist.get_world_size() if case.sequence else 1), 3, 32)
    together = attention.layers.project(x_SBH, attention.query, attention.key_value)
    torch.testing.assert_close((attention.query(x_SBH), attention.key_value(x_SBH)), together)


def check_bf16(case: Case) -> None:
    """Rounding may hurt the shards no more than it hurts one rank."""
    exact, whole, shards = whole_model(case).double(), whole_model(case).bfloat16(), sharded_model(case).bfloat16()
    tokens, labels = batch(case.config)
    for model in (exact, whole, shards):
        losses = losses_of(model, tokens, labels)
        assert losses.dtype == torch.float32 or model is exact
        losses.mean().backward()
    found = gathered(shards, gradient)

    def error(gradients: dict[str, Tensor]) -> float:
        pairs = [(gradients[name].double(), p.grad) for name, p in exact.named_parameters() if p.grad is not None]
        return float(torch.stack([(g - e).norm() for g, e in pairs]).norm())

    alone = error({name: p.grad for name, p in whole.named_parameters() if p.grad is not None})
    assert 0 < error(found) < 1.5 * alone


def check_dropout(case: Case) -> None:
    """The masks of all ranks side by side, applied to the whole model, give its losses and gradients."""
    config = case.config
    masks: list[Tensor] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        masks.append((output / inputs[0]).detach().nan_to_num())

    whole, shards = whole_model(case).double(), sharded_model(case).double()
    for module in shards.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(record)
    torch.manual_seed(100 + (dist.get_rank() if case.sequence else 0))
    tokens, labels = batch(config)
    found = losses_of(shards, tokens, labels)
    calls = len(masks)
    found.mean().backward()
    assert calls == 1 + 2 * config.num_layers
    assert (len(masks) > calls) == case.recompute
    whole_masks = []
    for own in masks[:calls]:
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own)
        same = torch.equal(parts[0], parts[1])
        assert same != case.sequence, "ranks with the same tokens need the same masks, those with others other ones"
        whole_masks.append(torch.cat(parts) if case.sequence else own)
        assert 0.05 < float((whole_masks[-1] == 0).double().mean()) < 0.5
    remaining = iter(whole_masks)
    for module in whole.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
            module.register_forward_hook(lambda module, inputs, output: output * next(remaining))
    expected = losses_of(whole, tokens, labels)
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=5e-6)
    expected.mean().backward()
    compare(gathered(shards, gradient), whole, gradient, rtol=2e-6, atol=1e-7)


CHECKS: dict[str, Callable[[Case], None]] = {
    "exact gradients": check_exact_gradients,
    "training": check_training,
    "storage": check_storage,
    "kept": check_kept,
    "alone": check_alone,
    "bf16": check_bf16,
    "dropout": check_dropout,
}
DROPOUT = (("dropout", 0.2),)
TASKS = [
    *[(check, case) for case in cases() for check in ("exact gradients", "training")],
    *[
        ("storage", Case("mhe_add", "learned", sequence, gather))
        for sequence, gather in ((False, "weights"), (True, "activations"))
    ],
    *[
        ("kept", Case(name, "rope", sequence, changes=(("ffn_hidden_size", 64),)))
        for name in ("mha", "el", "mhe_mul")
        for sequence in (False, True)
    ],
    *[("alone", Case(name, "learned", sequence)) for name in ("mha", "mqa") for sequence in (False, True)],
    *[("bf16", Case(name, "learned", sequence)) for name in ("mha", "mhe_add", "mhe_mul") for sequence in (False, True)],
    *[
        ("dropout", Case(name, "learned", sequence, changes=DROPOUT, recompute=recompute))
        for name in ("mha", "mhe_add")
        for sequence in (False, True)
        for recompute in (False, True)
    ],
]


def tasks(ranks: int) -> list[tuple[str, Case]]:
    """On 2 ranks gradients in float64 of each variant in one of the styles, with every gathering and with and without sequence
    parallelism, and of all special cases; `make thorough` takes all gradients. Training of a variant with each kind of
    projection, and with few words: what it adds, losses over shards of the vocabulary, knows no variant.

    On 4, which two cores run slowly, gradients of a variant with each kind of projection and of what 4 ranks shard otherwise
    than 2, few groups of keys and few words, and training of a few; on 1, where nothing is split, training.
    """
    if ranks == 2:
        return [(check, case) for check, case in TASKS if trains(check, case) and (case not in PRODUCT or has_its_style(case))]
    pairs = [(check, case) for check, case in TASKS if is_of_pairs(case) and trains(check, case)]
    training = [(check, case) for check, case in pairs if check == "training" and case.style == "learned"]
    if ranks == 1:
        return training
    few = [(check, case) for check, case in training if case.attention in ("gqa", "mhe_add", "mqa")]
    return [(check, case) for check, case in pairs if check in ("storage", "bf16") or is_in_its_style(check, case)] + few


def is_in_its_style(check: str, case: Case) -> bool:
    """Whether these are gradients of a special case, or of one in the style of one of KINDS."""
    if check != "exact gradients" or kept_on_two(case):
        return False
    return case not in PRODUCT or (case.attention in KINDS and has_its_style(case))


def trains(check: str, case: Case) -> bool:
    """Whether to make this check: training takes a variant of each kind, in turns with sequence parallelism, and few words."""
    if check != "training":
        return True
    kinds = case in PRODUCT and case.attention in KINDS and case.sequence == (len(case.attention) % 2 == 0)
    return kinds or ("vocab_size", 5) in case.changes


def has_its_style(case: Case) -> bool:
    """Whether the case of the product is in the style of its variant; the styles take turns."""
    return case.style == list(STYLES)[causal_names().index(str(case.attention)) % len(STYLES)]


def kept_on_two(case: Case) -> bool:
    """Whether what makes a case special has nothing to do with the number of ranks."""
    return case not in PRODUCT and not {"num_kv_heads", "num_seeds", "num_latents", "vocab_size"} & dict(case.changes).keys()


def is_of_pairs(case: Case) -> bool:
    """Of the product of variant, style, gathering and sequence parallelism, half the cases hold every pair of values."""
    if case not in PRODUCT:
        return True
    numbers = causal_names().index(str(case.attention)), list(STYLES).index(case.style), case.gather == "weights"
    return (sum(numbers) + case.sequence) % 2 == 0


def work(rank: int, ranks: int, folder: Path, chosen: list[tuple[str, Case]]) -> None:
    from megatron.core import parallel_state

    failures, number = {}, -1
    registry._KINDS[BIDIRECTIONAL] = KIND
    with joined(rank, ranks, folder) as layout:
        parallel_state.initialize_model_parallel(ranks, create_gloo_process_groups=False)  # a layout leaves one rank without
        layout.at_close(parallel_state.destroy_model_parallel)
        for number, (check, case) in enumerate(chosen):
            try:
                CHECKS[check](case)
            except Exception:
                failures[number] = traceback.format_exc()
            # A rank that failed before the others leaves them in a collective: stop all, with what is known so far.
            everyone: list[Any] = [None] * ranks
            dist.all_gather_object(everyone, number in failures)
            if any(everyone):
                failures.setdefault(number, "failed on another rank")
                if not all(everyone):
                    break
    (folder / f"failures{rank}.json").write_text(json.dumps({"failures": failures, "reached": number}))


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[int, str]]:
    """What went wrong on that many ranks, by number of the task."""

    @functools.cache
    def run(ranks: int) -> dict[int, str]:
        folder = tmp_path_factory.mktemp("ranks")
        found: dict[int, str] = {}
        try:
            run_ranks(work, ranks, ranks, folder, tasks(ranks), seconds=300)
        except Exception:
            found[-1] = traceback.format_exc()  # kept, so that it is not tried again for each case
            return found
        for rank in range(ranks):
            result = json.loads((folder / f"failures{rank}.json").read_text())
            for number, text in result["failures"].items():
                found[int(number)] = f"{found.get(int(number), '')}\nrank {rank}: {text}"
            for number in range(result["reached"] + 1, len(tasks(ranks))):
                found[number] = "not run: an earlier case left ranks waiting"
        return found

    return run


NUMBERED = [(ranks, number, task) for ranks in (1, 2, 4) for number, task in enumerate(tasks(ranks))]
GRADIENTS = [("exact gradients", case) for case in PRODUCT]


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("ranks", "number"),
    [(ranks, number) for ranks, number, _ in NUMBERED],
    ids=[f"{ranks}-{check}-{case}".replace(" ", "_") for ranks, _, (check, case) in NUMBERED],
)
def test_shards_equal_the_whole_model(ranks: int, number: int, failures: Callable[[int], dict[int, str]]) -> None:
    found = failures(ranks)
    assert -1 not in found, found[-1]
    assert number not in found, found[number]


@pytest.mark.thorough
def test_gradients_of_the_whole_product(tmp_path: Path) -> None:
    run_ranks(work, 2, 2, tmp_path, GRADIENTS, seconds=300)
    for rank in (0, 1):
        found = json.loads((tmp_path / f"failures{rank}.json").read_text())
        assert (found["failures"], found["reached"]) == ({}, len(GRADIENTS) - 1)
