"""The rows after whole blocks, in lengths that have some: the first and the last of 16, and of 32."""

import pytest
import torch
from hopper_cases import assert_short_attention_obeys
from samples import normal

LENGTHS_AND_WIDTHS = [(tokens, 64) for tokens in (65, 80, 81, 129, 145, 160, 193, 196, 208)] + [(96, 32), (197, 48), (145, 80)]


@pytest.mark.parametrize(("tokens", "head_dim"), LENGTHS_AND_WIDTHS)
def test_rows_after_blocks_are_as_exact_as_those_in_them(tokens, head_dim):
    qkv, grad = normal(2, tokens, 3, 2, head_dim), normal(2, tokens, 2, head_dim, seed=9)
    assert_short_attention_obeys(qkv.to(torch.bfloat16), grad.to(torch.bfloat16))
