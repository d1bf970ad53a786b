"""Which parameters decay, in which order they enter, and what the registry says of each optimizer."""

from pathlib import Path

import pytest
import torch
from torch.nn import Parameter

from configs.errors import UserError
from configs.load import load_config
from configs.schema import Config
from model.decoder import DecoderLM
from pretrain.optim.groups import build_optimizer, set_learning_rate
from pretrain.optim.registry import optimizer_faults, optimizer_kind
from tests.helpers import write_run


def config(folder: Path, *overrides: str) -> Config:
    return load_config(write_run(folder, folder / "data"), overrides, checks=[optimizer_faults]).resolved(300)


@pytest.mark.parametrize("attention", ["mha", "mhe_add", "mhe_mul"])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_norms_biases_and_head_embeddings_do_not_decay(tmp_path: Path, attention: str, norm: str) -> None:
    run = config(tmp_path, f"--model.attention={attention}", f"--model.norm={norm}")
    module = DecoderLM(run.model)
    optimizer = build_optimizer(module.named_parameters(), run.optimizer)
    decay = {id(parameter): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    names = dict(module.named_parameters())
    spared = {name for name, parameter in names.items() if decay[id(parameter)] == 0}
    assert spared == {name for name in names if "norm" in name or name.endswith(("bias", "_embedding"))}
    assert {"token_embedding.weight", "position_embedding.weight"}.isdisjoint(spared)
    assert any("query_embedding" in name for name in spared) == attention.startswith("mhe")


def test_state_does_not_depend_on_the_order_of_parameters(tmp_path: Path) -> None:
    run = config(tmp_path)
    pairs = list(DecoderLM(run.model).named_parameters())

    def order(items: list[tuple[str, Parameter]]) -> list[int]:
        return [id(p) for group in build_optimizer(items, run.optimizer).param_groups for p in group["params"]]

    assert order(pairs) == order(pairs[::-1])


def test_adamw_keeps_the_states_that_the_registry_declares(tmp_path: Path) -> None:
    run = config(tmp_path)
    weight = Parameter(torch.ones(3, 2))
    optimizer = build_optimizer([("weight", weight)], run.optimizer)
    weight.square().sum().backward()
    optimizer.step()
    kept = optimizer.state[weight]
    declared = optimizer_kind("adamw").groups["decayed"]
    assert set(kept) == {*declared.scalars, *declared.states}
    tensors = [kept[name] for name in declared.states]
    assert all(tensor.shape == weight.shape and tensor.dtype == torch.float32 for tensor in tensors)
    assert sum(tensor.nbytes for tensor in tensors) == weight.numel() * declared.state_bytes


def test_head_embeddings_learn_at_their_own_rate(tmp_path: Path) -> None:
    run = config(tmp_path, "--model.attention=mhe_mul", "--optimizer.head_embedding_lr_scale=5")
    module = DecoderLM(run.model)
    optimizer = build_optimizer(module.named_parameters(), run.optimizer)
    set_learning_rate(optimizer.param_groups, 0.01)
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in module.named_parameters():
        assert rates[id(parameter)] == (0.05 if "attention" in name and name.endswith("_embedding") else 0.01), name


def test_output_projections_of_attention_learn_at_their_own_rate_and_decay(tmp_path: Path) -> None:
    run = config(tmp_path, "--optimizer.attention_output_lr_scale=0.5", "--optimizer.head_embedding_lr_scale=5")
    module = DecoderLM(run.model)
    optimizer = build_optimizer(module.named_parameters(), run.optimizer)
    set_learning_rate(optimizer.param_groups, 0.01)
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    slow = {name for name, parameter in module.named_parameters() if groups[id(parameter)]["lr"] == 0.005}
    assert slow == {f"blocks.{number}.attention.out.weight" for number in range(run.model.num_layers)}
    assert all(groups[id(module.get_parameter(name))]["weight_decay"] == run.optimizer.weight_decay for name in slow)


@pytest.mark.parametrize("model", ["--model.attention=mha", "--model.head_embeddings=false"])
def test_a_rate_for_embeddings_that_are_not_there_is_refused(tmp_path: Path, model: str) -> None:
    with pytest.raises(UserError, match=r"head_embedding_lr_scale=2: the model has no head embeddings; set it to 1"):
        config(tmp_path, model, "--optimizer.head_embedding_lr_scale=2")


def test_an_unknown_optimizer_is_named_with_those_that_are_known(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--optimizer\.kind=adam: known: adamw"):
        config(tmp_path, "--optimizer.kind=adam")


def test_stages_without_head_embeddings_would_lack_a_group(tmp_path: Path) -> None:
    path, scaled = write_run(tmp_path, tmp_path / "data"), "--optimizer.head_embedding_lr_scale=2"
    run = ["--model.attention=[mha, mhe_add]", "--parallel.pipeline=2"]
    load_config(path, run, checks=[optimizer_faults], world_size=2)
    load_config(path, [*run, scaled, "--model.attention=mhe_add"], checks=[optimizer_faults], world_size=2)
    with pytest.raises(UserError, match=r"head_embedding_lr_scale=2: with parallel.pipeline the layers of every stage need"):
        load_config(path, [*run, scaled], checks=[optimizer_faults], world_size=2)
