"""MHE in megatron-core's own GPTModel on two real ranks: TP 2 against TP 1, and against our dense attention.

The ranks do all cases in one start, since importing takes longer than running; each case is then a test.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import ModelConfig
from model.attention.registry import attention_class
from model.layers import UNSHARDED
from model.parallel.sharding import partition_specs
from model.positions.positions import make_positions
from tests.helpers import joined, run_ranks
from tests.megatron import transformer_config

RANKS, STEPS, VOCABULARY, LENGTH = 2, 5, 40, 12
STYLES: dict[str, dict[str, Any]] = {
    "learned_absolute": {"normalization": "LayerNorm", "add_bias_linear": True},
    "rope": {"normalization": "RMSNorm", "add_bias_linear": False, "gated_linear_unit": True, "activation_func": F.silu},
}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@dataclass(frozen=True)
class Training:
    attention: str
    style: str
    sequence: bool = False
    recompute: bool = False
    gather: str = "weights"
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        switches = "-sequence" * self.sequence + "-recompute" * self.recompute
        return f"{self.attention}-{self.style}-{self.gather}{switches}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def on_one_rank(self) -> Training:
        return Training(self.attention, self.style)


@dataclass(frozen=True)
class Comparison:
    """One attention against the dense one. `position`: of ModelConfig."""

    attention: str
    position: str
    embedding_position: str
    sequence: bool
    gather: str
    bias: bool

    def __str__(self) -> str:
        words = (self.attention, self.position, self.embedding_position, self.gather)
        return "-".join(words) + "-sequence" * self.sequence + "-bias" * self.bias


VARIANTS, SWITCH = ("mhe_add", "mhe_mul"), (False, True)
TRAININGS = [
    *(Training(a, s, sequence, again) for a in VARIANTS for s in STYLES for sequence in SWITCH for again in SWITCH),
    *(Training(a, s, sequence, gather="activations") for a, s in zip(VARIANTS, STYLES, strict=True) for sequence in SWITCH),
    *(Training("mhe_mul", s, True, dtype=torch.bfloat16) for s in STYLES),
]
COMPARISONS = [
    Comparison(attention, *place, sequence, gather, bias)
    for attention in VARIANTS
    for place in (("none", "after"), ("rope", "after"), ("rope", "before"))
    for sequence in SWITCH
    for gather, bias in (("weights", True), ("weights", False), ("activations", True))
]


def sequence_parallel_norm() -> type[nn.Module]:
    """Megatron's local norm refuses sequence parallelism. This one has its gradients summed as its other norms have."""

    class Norm(nn.Module):
        def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
            super().__init__()
            kind = nn.RMSNorm if config.normalization == "RMSNorm" else nn.LayerNorm
            self.norm = kind(hidden_size, eps=eps, dtype=config.params_dtype)
            for parameter in self.norm.parameters():
                parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

        def forward(self, x_SBH: Tensor) -> Tensor:
            return self.norm(x_SBH)

    return Norm


def gpt_model(config: Any, style: str, attention: str, **options: Any) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    from model.megatron.spec import with_mhe

    norm = sequence_parallel_norm()
    spec = with_mhe(get_gpt_layer_local_spec(normalization=config.normalization), attention, input_layernorm=norm, **options)
    spec.submodules.pre_mlp_layernorm = norm
    block = TransformerBlockSubmodules(layer_specs=[spec] * config.num_layers, layer_norm=norm)
    return GPTModel(
        config=config,
        transformer_layer_spec=block,
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        position_embedding_type=style,
        share_embeddings_and_output_weights=style == "learned_absolute",
    )


def losses_BS(model: Any) -> Tensor:
    tokens = torch.randint(0, VOCABULARY, (3, LENGTH + 1), generator=torch.Generator().manual_seed(5))
    # The mask hides everything: that nothing changes shows that it is not read.
    mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool)
    return model(tokens[:, :-1], torch.arange(LENGTH).expand(3, LENGTH), mask, labels=tokens[:, 1:])


def backward(model: Any) -> float:
    """The mean loss; gradients as Megatron's finalize_model_grads leaves them."""
    from megatron.core import parallel_state

    loss = losses_BS(model).mean()
    loss.backward()
    for name, parameter in model.named_parameters():
        if getattr(parameter, "sequence_parallel", False):
            assert "self_attention" not in name
            dist.all_reduce(parameter.grad, group=parallel_state.get_tensor_model_parallel_group())
    return loss.item()


def seed_all(seed: int) -> None:
    from megatron.core import tensor_parallel

    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def replicas_differ(model: Any) -> list[str]:
    """Names of parameters that all ranks hold whole and that are not the same to the bit."""
    names = []
    for name, parameter in model.named_parameters():
        if not getattr(parameter, "tensor_model_parallel", False):
            others = [torch.empty_like(parameter) for _ in range(RANKS)]
            dist.all_gather(others, parameter.detach())
            if not all(torch.equal(other, parameter) for other in others):
                names.append(name)
    return names


def train(case: Training, ranks: int) -> dict[str, Any]:
    changes = {**STYLES[case.style], **(RECOMPUTE if case.recompute else {})}
    if case.dtype == torch.bfloat16:
        changes.update(params_dtype=torch.bfloat16, bf16=True, pipeline_dtype=torch.bfloat16)
    seed_all(3)
    config = transformer_config(ranks, sequence_parallel=case.sequence, **changes)
    # Megatron makes position embeddings in float32 and casts the model, too.
    model = gpt_model(config, case.style, case.attention, mhe_gather=case.gather).to(case.dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        losses.append(backward(model))
        optimizer.step()
    return {
        "losses": losses,
        "differ": replicas_differ(model) if ranks > 1 else [],
        "types": {parameter.dtype for parameter in model.parameters()},
    }


def compare(case: Comparison, ranks: int) -> dict[str, float]:
    """Largest differences of output and gradients to the dense attention, in float64."""
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.spec_utils import build_module

    from model.megatron.spec import mhe_self_attention_spec

    sequence = case.sequence and ranks > 1
    config = transformer_config(ranks, params_dtype=torch.float64, sequence_parallel=sequence, add_bias_linear=case.bias)
    options: dict[str, Any] = {"attention": case.attention, "embedding_position": case.embedding_position}
    spec = mhe_self_attention_spec(mhe_gather=case.gather, **options)  # type: ignore[arg-type]
    groups = ProcessGroupCollection.use_mpu_process_groups()
    ours = build_module(spec, config=config, layer_number=1, pg_collection=groups)
    whole_config = ModelConfig(
        hidden_size=config.hidden_size,
        num_layers=2,
        num_heads=config.num_attention_heads,
        head_dim=config.kv_channels,
        position=case.position,  # type: ignore[arg-type]
        bias=case.bias,
        **options,
    )
    dense = attention_class(whole_config)(whole_config, UNSHARDED).double()
    rank, specs = parallel_state.get_tensor_model_parallel_rank(), partition_specs(ours.attention)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            parameter.normal_(std=0.3, generator=generator)
            ours.attention.get_parameter(name).copy_(specs[name].shard(parameter, rank))
    x_SBH, d_out_SBH = torch.randn(2, LENGTH, 3, config.hidden_size, dtype=torch.float64, generator=generator)
    tokens = LENGTH // ranks if sequence else LENGTH
    mine = slice(rank * tokens, (rank + 1) * tokens) if sequence else slice(None)
    x_SBH.requires_grad_()
    expected_SBH = dense(x_SBH, make_positions(whole_config, LENGTH, 0, x_SBH.dtype, x_SBH.device))
    expected_SBH.backward(d_out_SBH)
    own_SBH = x_SBH.detach()[mine].clone().requires_grad_()
    angles = RotaryEmbedding(config.kv_channels, 1.0, use_cpu_initialization=True)(LENGTH) if case.position == "rope" else None
    out_SBH, bias = ours(own_SBH, attention_mask=None, rotary_pos_emb=angles)
    assert bias is None
    out_SBH.backward(d_out_SBH[mine])
    assert x_SBH.grad is not None
    assert own_SBH.grad is not None
    results = {
        "output": float((out_SBH - expected_SBH[mine]).abs().max()),
        "input": float((own_SBH.grad - x_SBH.grad[mine]).abs().max()),
    }
    for name, parameter in ours.attention.named_parameters():
        unsharded = dense.get_parameter(name).grad
        error = parameter.grad - specs[name].shard(unsharded, rank)
        results[name] = float(error.abs().max() / (1 + unsharded.abs().max()))
    return results


def drop(sequence: bool, ranks: int) -> dict[str, Any]:
    """Losses and gradients with dropout, with and without recomputation, and what another seed gives."""
    results: dict[str, Any] = {}
    for name, changes, seed in (("kept", {}, 3), ("recomputed", RECOMPUTE, 3), ("other", RECOMPUTE, 4)):
        seed_all(3)
        # Not initialised on the CPU: parameters come from the tracker's states as on a GPU.
        own = {**changes, "hidden_dropout": 0.3, "use_cpu_initialization": False, "sequence_parallel": sequence}
        model = gpt_model(transformer_config(ranks, **own), "learned_absolute", "mhe_add")
        seed_all(seed)
        loss = backward(model)
        results[name] = {"loss": loss, "gradients": {n: p.grad for n, p in model.named_parameters()}, "after": torch.rand(1)}
        results[name]["differ"] = replicas_differ(model)
    return results


def describe(folder: Path) -> dict[str, Any]:
    """What Megatron writes of a model on two ranks, and that model's losses."""
    from megatron.core import dist_checkpointing

    seed_all(6)
    model = gpt_model(transformer_config(RANKS, **STYLES["learned_absolute"]), "learned_absolute", "mhe_add")
    described = model.sharded_state_dict()
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    dist_checkpointing.save(described, str(folder))
    names = dict(model.named_parameters())
    return {
        "losses": losses_BS(model).detach(),
        "tensors": {
            name: (described[name].key, described[name].global_shape, described[name].axis_fragmentations) for name in names
        },
    }


def restore(folder: Path) -> dict[str, Any]:
    """The same on one rank, from what two ranks wrote."""
    from megatron.core import dist_checkpointing

    seed_all(7)
    model = gpt_model(transformer_config(1, **STYLES["learned_absolute"]), "learned_absolute", "mhe_add")
    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), str(folder)))
    return {
        "losses": losses_BS(model).detach(),
        "shapes": {name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
    }


def initial() -> dict[str, Tensor]:
    """The head embeddings of a new model, and of one that is not initialised."""
    seed_all(8)
    style = STYLES["learned_absolute"]
    model = gpt_model(transformer_config(RANKS, num_attention_heads=64, **style), "learned_absolute", "mhe_mul")
    empty = gpt_model(transformer_config(RANKS, perform_initialization=False, **style), "learned_absolute", "mhe_mul")
    found = {name: parameter.detach() for name, parameter in model.named_parameters() if name.endswith("_embedding")}
    found.update({f"empty.{name}": p.detach() for name, p in empty.named_parameters() if name.endswith("_embedding")})
    return found


def work(rank: int, folder: Path) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    from megatron.core import parallel_state

    import model.megatron.spec  # noqa: F401

    results: dict[str, Any] = {}

    def attempt(name: str, run: Callable[[], Any]) -> None:
        try:
            results[name] = run()
        except Exception:
            results[name] = traceback.format_exc()

    with joined(rank, RANKS, folder) as layout:
        layout.at_close(parallel_state.destroy_model_parallel)
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=RANKS)
        for case in TRAININGS:
            attempt(f"{case} 2", partial(train, case, RANKS))
        for comparison in COMPARISONS:
            attempt(f"{comparison} 2", partial(compare, comparison, RANKS))
        for sequence in SWITCH:
            attempt(f"drop {sequence}", partial(drop, sequence, RANKS))
        attempt("initial", initial)
        attempt("describe", partial(describe, folder / "checkpoint"))
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=1)
        # On one rank nobody waits for anybody: the ranks share the cases.
        alone: list[tuple[str, Callable[[], Any]]] = [
            *((f"{case} 1", partial(train, case, 1)) for case in dict.fromkeys(case.on_one_rank for case in TRAININGS)),
            *((f"{case} 1", partial(compare, case, 1)) for case in COMPARISONS if not case.sequence),
        ]
        for name, run in alone[rank::RANKS]:
            attempt(name, run)
        attempt("restore", partial(restore, folder / "checkpoint"))
        dist.barrier()
    torch.save(results, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found; a case that failed has its traceback."""
    folder = tmp_path_factory.mktemp("megatron")
    run_ranks(work, RANKS, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


def of_all(found: list[dict[str, Any]], name: str) -> list[Any]:
    """What the ranks that have `name` found, at least one."""
    results = [rank[name] for rank in found if name in rank]
    assert results
    for result in results:
        assert not isinstance(result, str), result
    return results


@pytest.mark.parametrize("case", TRAININGS, ids=str)
def test_trains_as_on_one_rank(found: list[dict[str, Any]], case: Training) -> None:
    (alone,) = of_all(found, f"{case.on_one_rank} 1")
    for result in of_all(found, f"{case} 2"):
        assert result["differ"] == []
        assert result["types"] == {case.dtype}
        assert result["losses"][-1] < result["losses"][0] - 0.1
        tolerance = 0.05 if case.dtype == torch.bfloat16 else 2e-5
        assert result["losses"] == pytest.approx(alone["losses"], rel=tolerance)


@pytest.mark.parametrize(
    ("case", "ranks"), [pair for pair in product(COMPARISONS, (1, 2)) if not (pair[0].sequence and pair[1] == 1)], ids=str
)
def test_equals_the_dense_attention(found: list[dict[str, Any]], case: Comparison, ranks: int) -> None:
    tolerance = 1e-5 if case.position == "rope" else 1e-12  # Megatron's angles are float32
    for differences in of_all(found, f"{case} {ranks}"):
        assert {name: value for name, value in differences.items() if value > tolerance} == {}


@pytest.mark.parametrize("sequence", SWITCH)
def test_recomputes_the_same_dropout(found: list[dict[str, Any]], sequence: bool) -> None:
    for result in of_all(found, f"drop {sequence}"):
        kept, recomputed, other = (result[name] for name in ("kept", "recomputed", "other"))
        assert kept["loss"] == recomputed["loss"] != other["loss"]
        assert kept["after"] == recomputed["after"]
        assert kept["differ"] == recomputed["differ"] == []
        for name, gradient in kept["gradients"].items():
            torch.testing.assert_close(recomputed["gradients"][name], gradient, msg=name)


def test_checkpoint_names_whole_parameters(found: list[dict[str, Any]]) -> None:
    for written, read in zip(of_all(found, "describe"), of_all(found, "restore"), strict=True):
        torch.testing.assert_close(read["losses"], written["losses"])
        assert written["tensors"].keys() == read["shapes"].keys()
        for name, (key, shape, pieces) in written["tensors"].items():
            inside = name.startswith("decoder.layers.")
            rest = name.removeprefix("decoder.layers.").partition(".")[2]
            if "mlp" not in name:  # Megatron renames the norm before the MLP
                assert key == (f"decoder.layers.{rest}" if inside else name)
            assert shape == ((2,) if inside else ()) + read["shapes"][name]
            own = pieces[1:] if inside else pieces
            if "self_attention" in name:
                cuts = {"qkv.weight": (2, 1), "qkv.bias": (2,), "out.weight": (1, 2), "out.bias": (1,)}
                assert own == cuts.get(rest.removeprefix("self_attention.attention."), (1, 1)), name


def test_head_embeddings_start_normal_equal_on_ranks_and_different_in_layers(found: list[dict[str, Any]]) -> None:
    first, second = of_all(found, "initial")
    new = {name: e_ND for name, e_ND in first.items() if not name.startswith("empty.")}
    assert len(new) == 6
    for name, e_ND in first.items():
        assert torch.equal(e_ND, second[name])
        if name in new:
            assert e_ND.std() == pytest.approx(0.1, rel=0.15)
            assert sum(torch.equal(e_ND, other) for other in new.values()) == 1
        else:
            assert not e_ND.any()
