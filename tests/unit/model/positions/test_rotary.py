"""Rotary tables, and the rotation against complex numbers."""

from __future__ import annotations

import torch
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb

from configs.schema import ModelConfig
from model.positions.positions import make_positions
from model.positions.rotary import rotate
from tests import reference


def config_of(position: str) -> ModelConfig:
    return ModelConfig.model_validate(
        {"hidden_size": 20, "num_layers": 1, "num_heads": 6, "head_dim": 8, "position": position, "rope_theta": 50.0}
    )


def test_rotates_as_complex_numbers_do() -> None:
    x_BNSD = torch.randn(2, 3, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    positions = make_positions(config_of("rope"), 7, 0, torch.float64, torch.device("cpu"))
    expected = torch.stack([torch.stack([reference.rope(x_SD, 50.0, range(1000)) for x_SD in x_NSD]) for x_NSD in x_BNSD])
    torch.testing.assert_close(rotate(x_BNSD, positions), expected, rtol=0, atol=1e-12)
    later = make_positions(config_of("rope"), 2, 5, torch.float64, torch.device("cpu"))
    torch.testing.assert_close(rotate(x_BNSD[:, :, 5:], later), expected[:, :, 5:], rtol=0, atol=1e-12)
    rows = torch.tensor([1, 4])
    torch.testing.assert_close(rotate(x_BNSD[:, :, rows], positions.of_rows(rows)), expected[:, :, rows], rtol=0, atol=1e-12)


def test_a_fraction_of_the_channels_is_that_of_gpt_neox() -> None:
    """Which rotates the first r channels, paired c and c + r/2: our pairs c and c + D/2 in another order."""
    positions = make_positions(
        config_of("rope").model_copy(update={"rope_fraction": 0.5}), 7, 0, torch.float64, torch.device("cpu")
    )
    x_BNSD = torch.randn(2, 3, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    angles = torch.outer(torch.arange(7.0, dtype=torch.float64), 50.0 ** -(torch.arange(0, 4, 2, dtype=torch.float64) / 4))
    order = [0, 1, 4, 5, 2, 3, 6, 7]  # ours, of theirs
    cos, sin = (torch.cat([table, table], dim=-1)[None] for table in (angles.cos(), angles.sin()))
    expected, _ = apply_rotary_pos_emb(x_BNSD[..., order], x_BNSD[..., order], cos, sin)
    torch.testing.assert_close(rotate(x_BNSD, positions)[..., order], expected, rtol=0, atol=1e-12)


def test_other_positions_rotate_nothing() -> None:
    x_BNSD = torch.randn(2, 3, 7, 8)
    assert rotate(x_BNSD, make_positions(config_of("alibi"), 7, 0, x_BNSD.dtype, x_BNSD.device)) is x_BNSD


def test_bf16_rotates_by_float32_angles() -> None:
    config = config_of("rope")
    rotary = make_positions(config, 3000, 0, torch.bfloat16, torch.device("cpu")).rotary_of(config.head_width)
    assert rotary is not None
    assert rotary[0].dtype == torch.float32
    torch.testing.assert_close(rotary[0][:, 0].double(), torch.arange(3000.0, dtype=torch.float64).cos(), rtol=0, atol=1e-6)
