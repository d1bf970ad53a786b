"""Models of equal cost: every pair of variants, counted on real models and by the costs' own formulas."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
import torch

from configs.errors import UserError
from configs.schema import ModelConfig
from model.attention.registry import attention_variant
from model.costs.flops import flops_per_token
from model.costs.memory import kv_cache_bytes_per_token
from model.costs.solve import Matched, What, cost, match
from model.decoder import DecoderLM
from model.faults import model_faults
from tests.needs import causal_names
from tests.unit.model.costs.models import model_config

LENGTH = 32
NAMES = causal_names()
ROUND = (64, 32, 16, 8, 4, 2, 1)
QUICKSTART: dict[str, Any] = {"hidden_size": 256, "num_heads": 64, "head_dim": 16, "vocab_size": 4096}


def small(attention: str | tuple[str, ...], **changes: Any) -> ModelConfig:
    """Large enough that a column of the MLP is a small part of it, and as wide as its heads, which some variants need."""
    return model_config(attention, **{"hidden_size": 24, "vocab_size": 2003} | changes)


def matched(config: ModelConfig, target: ModelConfig, what: What, **options: Any) -> Matched:
    """The result, which is one that a run accepts and that costs what it says, whoever counts."""
    found = match(config, target, what, LENGTH, **options)
    assert not [*found.config.faults(), *model_faults({"model": found.config})]
    assert found.config == config.model_copy(update=found.changes)
    assert (found.cost, found.wanted) == (counted(found.config, what), counted(target, what))
    assert abs(found.cost - found.wanted) <= 0.005 * found.wanted
    return found


@cache
def counted(config: ModelConfig, what: What) -> int:
    """On a real model where that can be counted."""
    if what == "parameters":
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in DecoderLM(config).parameters())
    return flops_per_token(config, LENGTH) if what == "flops" else kv_cache_bytes_per_token(config)


@pytest.mark.parametrize("what", ["parameters", "flops"])
@pytest.mark.parametrize("name", NAMES)
def test_every_pair_of_variants_by_the_width_of_the_mlp(name: str, what: What) -> None:
    for other in NAMES:
        found = matched(small(name), small(other), what)
        assert set(found.changes) <= {"ffn_hidden_size"}
        if found.changes:
            assert_round(found)


def assert_round(found: Matched) -> None:
    """The width is as round as it can be: of any rounder number the nearest multiples are too far off."""
    width = found.config.ffn_width
    for step in ROUND[: next(index for index, step in enumerate(ROUND) if width % step == 0)]:
        for near in {width // step * step, (width // step + 1) * step} - {0}:
            beside = found.config.model_copy(update={"ffn_hidden_size": near})
            assert abs(cost(beside, found.what, LENGTH) - found.wanted) > 0.005 * found.wanted


@pytest.mark.parametrize("by", ["layers", "heads"])
@pytest.mark.parametrize(("name", "other"), [("mhe_add", "mha"), ("mha", "mhe_add"), ("gqa", "skv"), ("sha", "mqa")])
def test_other_ways_leave_the_rest_to_the_mlp(name: str, other: str, by: Any) -> None:
    config, target = small(name), small(other, num_layers=5)
    field = {"layers": "num_layers", "heads": "num_heads"}[by]
    found = matched(config, target, "parameters", by=by)
    assert field in found.changes
    off = abs(counted(config.model_copy(update={field: found.changes[field]}), "parameters") - found.wanted)
    for neighbour in (found.changes[field] - 1, found.changes[field] + 1):
        beside = config.model_copy(update={field: neighbour})
        if neighbour and not model_faults({"model": beside}):
            assert off <= abs(counted(beside, "parameters") - found.wanted)
    assert found.config.head_width == config.head_width


def test_heads_keep_their_width() -> None:
    """`head_dim: null` would follow the number of heads."""
    config = small("mha", hidden_size=48, num_heads=6, head_dim=None)
    found = matched(config, small("mha", hidden_size=48, num_heads=12, head_dim=8), "kv_bytes")
    assert found.changes == {"num_heads": 12, "head_dim": 8}
    assert found.words().startswith("model.num_heads 6 → 12; 1")


@pytest.mark.parametrize("name", NAMES)
def test_the_cache_of_every_pair_or_why_not(name: str) -> None:
    (field,) = {"num_seeds", "num_kv_heads", "latent_dim"} & set(attention_variant(name).options) or {"num_heads"}
    for other in NAMES:
        config, target = small(name, num_heads=12, hidden_size=48), small(other, num_heads=12, hidden_size=48)
        try:
            found = matched(config, target, "kv_bytes")
        except UserError as error:
            reason = str(error)
        else:
            assert set(found.changes) - {"head_dim"} <= {field}
            continue
        assert re.search(r"; change model\.(head|rope)_dim, or take --match-by layers$", reason)
        for value in range(1, 25):  # none would have done
            one = config.model_copy(update={field: value})
            assert counted(one, "kv_bytes") != counted(target, "kv_bytes") or model_faults({"model": one})


@pytest.mark.parametrize(
    ("name", "field", "other", "value"),
    [
        ("gqa", "num_kv_heads", "mha", 12),
        ("gqa", "num_kv_heads", "mqa", 1),
        ("mhe_add", "num_seeds", "mha", 12),
        ("sha", "num_seeds", "skv", 6),
        ("mhe_mul", "num_seeds", "gqa:num_kv_heads=4", 4),
        ("mha", "num_heads", "mqa", 1),
        ("skv", "num_heads", "mha", 24),
    ],
)
def test_what_the_cache_is_matched_by(name: str, field: str, other: str, value: int) -> None:
    other, _, kv_heads = other.partition(":num_kv_heads=")
    fields = {"num_kv_heads": int(kv_heads)} if kv_heads else {}
    found = matched(small(name, num_heads=12), small(other, num_heads=12, **fields), "kv_bytes")
    assert getattr(found.config, field) == value
    assert set(found.changes) <= {field, "head_dim"}


def test_depth_for_the_cache() -> None:
    assert matched(small("mqa"), small("mha"), "kv_bytes", by="layers").changes == {"num_layers": 18}


@pytest.mark.parametrize("what", ["parameters", "flops"])
@pytest.mark.parametrize("name", NAMES)
def test_patterns_of_layers(name: str, what: What) -> None:
    mixed = small(("mhe_add", name), num_layers=4)
    assert set(matched(mixed, small("mha"), what).changes) == {"ffn_hidden_size"}
    assert set(matched(small("mha"), mixed, what).changes) == {"ffn_hidden_size"}


def test_depth_of_a_pattern_that_repeats_evenly_goes_on_doing_so() -> None:
    mixed = small(("mhe_add", "mhe_add", "mha"), num_layers=6)
    found = matched(mixed, small("mha", num_layers=10), "parameters", by="layers")
    assert found.config.num_layers == 12
    seeds = matched(mixed, small(("mhe_add", "mhe_add", "mha"), num_layers=6, num_seeds=3), "kv_bytes")
    assert seeds.changes == {"num_seeds": 3}


def test_the_quickstart_against_mha_by_hand() -> None:
    """MHE-ADD has 48 columns and three embeddings of 1,024 where MHA has 3,072 columns; one of the MLP is 256 · 2 + 1."""
    mha, mhe = (model_config(name, **QUICKSTART) for name in ("mha", "mhe_add"))
    saved = (3072 - 48) * (256 + 1) - 3 * 1024
    assert 1024 + saved / 513 == pytest.approx(2533, abs=0.1)  # of 64 the nearest multiple is 0.7 % off
    found = matched(mhe, mha, "parameters")
    assert found.changes == {"ffn_hidden_size": 2528}
    assert found.words() == "model.ffn_hidden_size 1024 → 2528; 5.78 M vs 5.78 M (−0.13 %)"


def test_what_costs_the_same_stays_as_it_is() -> None:
    config = small("mha", ffn_hidden_size=97)
    found = matched(config, small("mha", ffn_hidden_size=96), "parameters")
    assert found.config == config
    assert found.words().startswith("nothing to change; 69,939 vs 69,792 (+0.21 %)")


@pytest.mark.parametrize("what", ["parameters", "flops", "kv_bytes"])
def test_a_matched_model_is_matched(what: What) -> None:
    """A run's own config.yaml, which holds the result, gives it again."""
    target = small("mha")
    first = matched(small("mhe_add"), target, what)
    assert first.changes
    again = matched(first.config, target, what)
    assert again.config == first.config
    assert again.changes == {}


def test_only_models_that_the_run_can_have() -> None:
    asked: list[int] = []

    def by_three(model: ModelConfig) -> bool:
        asked.append(model.ffn_width)
        return model.ffn_width % 3 == 0

    plain, found = (matched(small("mhe_add"), small("mha"), "parameters", **options) for options in ({}, {"fits": by_three}))
    assert plain.config.ffn_width % 3
    assert found.config.ffn_width % 3 == 0
    assert found.config.ffn_width in asked


def test_heads_are_those_that_the_run_can_have() -> None:
    found = matched(small("mhe_add"), small("mha"), "parameters", by="heads", fits=lambda model: model.num_heads % 4 == 0)
    assert found.config.num_heads % 4 == 0


@pytest.mark.parametrize(
    ("config", "target", "what", "options", "message"),
    [
        (
            small("mha", num_layers=9),
            small("mha", num_layers=2),
            "parameters",
            {},
            "with an MLP of width 1 the model has 71,241, more than 62,568; change .*, or take --match-by layers or heads$",
        ),
        (
            small("mha", num_layers=40),
            small("mha", num_heads=1, num_layers=1),
            "flops",
            {"by": "heads"},
            r"with an MLP of width 1 the model has .* FLOPs a token, more than .*, or take --match-by ffn or layers",
        ),
        (
            small("mhe_add"),
            small("mha"),
            "parameters",
            {"fits": lambda model: model.ffn_width % 1000 == 0},
            "model.ffn_hidden_size 1000 comes nearest, with 198,396 for 69,792",
        ),
        (small("mhe_add"), small("mha"), "parameters", {"fits": lambda model: False}, "no model.ffn_hidden_size is one that"),
        (
            small("mhe_add"),
            small("mha"),
            "flops",
            {"by": "layers", "fits": lambda model: False},
            "no model.num_layers is one that the run can have; take --match-by ffn or heads",
        ),
        (
            small("mqa"),
            small("mha"),
            "kv_bytes",
            {},
            "the cache of mqa does not depend on model.num_heads; wanted: 288 bytes a token; .*, or take --match-by layers$",
        ),
        (
            small("gqa"),
            small("mha", num_layers=4),
            "kv_bytes",
            {},
            "model.num_kv_heads 6 comes nearest, with 288 bytes a token; wanted: 384 bytes a token; change",
        ),
        (
            small("gqa"),
            small("mha"),
            "kv_bytes",
            {"fits": lambda model: False},
            "no model.num_kv_heads is one that the run can have; wanted: 288 bytes a token; ",
        ),
        (small("gqa"), small("mha"), "kv_bytes", {"by": "ffn"}, "the cache does not depend on model.ffn_hidden_size; take --m"),
        (small("mha"), small("mqa"), "kv_bytes", {"by": "layers"}, "model.num_layers 1 comes nearest, .*--match-by heads$"),
    ],
)
def test_what_cannot_be(config: ModelConfig, target: ModelConfig, what: What, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}") as error:
        match(config, target, what, LENGTH, **options)
    assert len(str(error.value).splitlines()) == 1
