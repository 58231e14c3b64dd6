"""The tail of a sequence, the at most 16 rows after the last full block of 64, at lengths that have one."""

import pytest
import torch
from hopper_cases import assert_short_attention_obeys
from samples import normal

LONG = [*((tokens, 64) for tokens in (80, 81, 129, 145, 160, 193, 208)), (96, 32), (197, 48)]


@pytest.mark.parametrize(
    ("tokens", "head_dim"), [(65, 64), (80, 32), (145, 80), (196, 64), *(pytest.param(*sizes, marks=pytest.mark.long) for sizes in LONG)]
)
def test_the_tail_is_as_exact_as_the_blocks(tokens, head_dim):
    qkv, grad = normal(2, tokens, 3, 2, head_dim), normal(2, tokens, 2, head_dim, seed=9)
    assert_short_attention_obeys(qkv.to(torch.bfloat16), grad.to(torch.bfloat16))
