from dataclasses import dataclass, replace

import pytest
import torch
from grids import PAPER, SMALL, Picture
from torch.nn import functional

from polyvit_fast.config import Model
from polyvit_fast.model.tokenizer import Tokenizer

MODEL = Model(dim=32, depth=3, num_heads=4, mlp_dim=64)


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def tokenizer(modality, model=MODEL):
    torch.manual_seed(0)
    made = Tokenizer(modality, model)
    for parameter in (made.weight, made.bias, made.cls_token, made.pos_embed):
        parameter.data.normal_(std=0.1)
    return made


@pytest.mark.parametrize(("name", "num_tokens"), [("picture", 577), ("clip", 1569), ("sound", 401)])
def test_token_counts_of_the_paper(name, num_tokens):
    with torch.device("meta"):
        tokens = Tokenizer(PAPER[name], MODEL)(torch.empty(2, *PAPER[name].grid))
    assert tokens.shape == (2, num_tokens, 32)


@pytest.mark.parametrize("name", SMALL)
def test_tokens_are_a_convolution_of_the_normalised_grid(name):
    modality, made = SMALL[name], tokenizer(SMALL[name])
    grid = torch.randint(0, 256, (2, *modality.grid), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values) for values in modality.normalisation)
    channels_first = ((grid - mean) / std).permute(0, 4, 1, 2, 3)
    embedded = functional.conv3d(channels_first, made.weight.permute(0, 4, 1, 2, 3), made.bias, stride=modality.tubelet)
    expected = torch.cat([made.cls_token.expand(2, 1, -1), embedded.flatten(2).transpose(1, 2)], 1) + made.pos_embed
    torch.testing.assert_close(made(grid), expected, rtol=1e-4, atol=1e-4)


def test_one_channel_three_times_needs_no_copy():
    made, grid = tokenizer(SMALL["sound"]), normal(2, 1, 48, 32, 1)
    torch.testing.assert_close(made(grid.expand(-1, -1, -1, -1, 3)), made(grid.repeat(1, 1, 1, 1, 3)))


def test_adaptors_follow_the_embedding():
    with_adaptors = tokenizer(SMALL["clip"], replace(MODEL, num_adaptor_layers=2))
    without, grid = tokenizer(SMALL["clip"]), normal(2, *SMALL["clip"].grid)
    without.load_state_dict({name: value for name, value in with_adaptors.state_dict().items() if not name.startswith("blocks")})
    expected = without(grid)
    for block in with_adaptors.blocks:
        expected = block(expected)
    assert len(with_adaptors.blocks) == 2
    assert torch.equal(with_adaptors(grid), expected)


def test_adaptors_ramp_to_the_full_rate():
    made, rates = tokenizer(SMALL["picture"], replace(MODEL, num_adaptor_layers=3)), []
    for block in made.blocks:
        block.register_forward_pre_hook(lambda module, arguments: rates.append(arguments[1]))
    made(normal(2, *SMALL["picture"].grid), 0.4)
    assert rates == pytest.approx([0.0, 0.2, 0.4])


def test_dropout_after_the_positions():
    torch.manual_seed(0)
    made = tokenizer(SMALL["picture"], replace(MODEL, dropout=0.25))
    grid = normal(400, *SMALL["picture"].grid)
    exact, drawn = made.eval()(grid), made.train()(grid)
    zero = drawn == 0
    assert zero.double().mean() == pytest.approx(0.25, abs=0.01)
    assert zero[:, 0].double().mean() == pytest.approx(0.25, abs=0.03)
    torch.testing.assert_close(drawn[~zero], exact[~zero] / 0.75)


def test_checkpoints_hold_parameters_alone():
    assert set(tokenizer(SMALL["clip"]).state_dict()) == {"weight", "bias", "cls_token", "pos_embed"}


def test_a_grid_of_another_size_is_named():
    with pytest.raises(ValueError, match=r"\[1, 16, 24\] in tubelets of \[1, 8, 8\] makes 7 tokens, but there are 5 positions"):
        tokenizer(SMALL["picture"])(normal(2, 1, 16, 24, 3))


@dataclass(frozen=True, kw_only=True)
class Grey(Picture):
    """Its normalisation was written for colours."""

    @property
    def grid(self) -> tuple[int, int, int, int]:
        return (1, 16, 16, 1)

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return (0.0,) * 3, (1.0,) * 3


def test_a_normalisation_for_other_channels_is_refused():
    with pytest.raises(ValueError, match="picture: the mean has 3 numbers for 1 channels"):
        Tokenizer(Grey(), MODEL)
