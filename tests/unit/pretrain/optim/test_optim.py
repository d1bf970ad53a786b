"""Learning rates against values worked out by hand; which parameters decay."""

from pathlib import Path

import pytest
from torch.nn import Parameter

from configs.load import load_config
from configs.schema import Config
from model.decoder import DecoderLM
from pretrain.optim.optim import build_optimizer, learning_rate
from tests.helpers import write_run


def config(folder: Path, *overrides: str) -> Config:
    path = write_run(folder, folder / "data")
    return load_config(path, ["--optimizer.lr=1.0", "--schedule.min_lr_ratio=0.2", *overrides]).resolved(300)


def test_cosine_with_warmup(tmp_path: Path) -> None:
    run = config(tmp_path, "--training.steps=9", "--schedule.warmup_steps=4")
    rates = [learning_rate(step, run) for step in range(9)]
    # 0.2 + 0.8 · (1 + cos(π·k/4)) / 2 for k = 0 … 4
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.882843, 0.6, 0.317157, 0.2], abs=1e-6)


def test_wsd_is_flat_until_its_linear_decay(tmp_path: Path) -> None:
    run = config(tmp_path, "--training.steps=8", "--schedule.warmup_steps=2", "--schedule.kind=wsd", "--schedule.decay_steps=4")
    rates = [learning_rate(step, run) for step in range(8)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_one_step_without_warmup(tmp_path: Path) -> None:
    assert learning_rate(0, config(tmp_path, "--training.steps=1", "--schedule.warmup_steps=0")) == 1.0


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
