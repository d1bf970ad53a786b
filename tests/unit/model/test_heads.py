"""Heads are views wherever memory allows it."""

import torch

from model.heads import repeat_heads, split_heads


def test_one_key_head_is_repeated_as_a_view_in_the_order_of_groups() -> None:
    qkv_SBH = torch.randn(5, 2, 24)
    one = split_heads(qkv_SBH, 24)[..., 8:16]
    assert repeat_heads(one, 6).data_ptr() == one.data_ptr()
    assert torch.equal(repeat_heads(one, 6), one.repeat_interleave(6, dim=1))
    two = torch.randn(2, 2, 5, 8)
    assert torch.equal(repeat_heads(two, 6), two.repeat_interleave(3, dim=1))
