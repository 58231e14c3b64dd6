import math
from dataclasses import dataclass, replace

import pytest
import torch
from grids import PAPER, SMALL, Picture
from torch.nn import functional

from polyvit_fast.config import Model
from polyvit_fast.model.tokenizer import Tokenizer, sinusoids, spread_overlaps

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


@dataclass(frozen=True, kw_only=True)
class Overlapping(Picture):
    """Patches of 8 every 5 pixels, with 3 pixels at two sides that none reaches."""

    @property
    def grid(self) -> tuple[int, int, int, int]:
        return (1, 21, 16, 3)

    @property
    def token_stride(self) -> tuple[int, int, int]:
        return (1, 5, 5)


@pytest.mark.parametrize("num_class_tokens", [0, 1, 2])
@pytest.mark.parametrize("modality", [SMALL["clip"], Overlapping(patch=8)], ids=["clip", "overlapping"])
def test_class_tokens_come_first_and_tokens_may_overlap(modality, num_class_tokens):
    modality = replace(modality, num_class_tokens=num_class_tokens, pool="mean")
    made = Tokenizer(modality, MODEL)
    for number, parameter in enumerate(made.parameters()):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) / 4
    grid = normal(2, *modality.grid)
    pixels = ((grid - 127.5) / 127.5).permute(0, 4, 1, 2, 3)
    kernel = made.weight.permute(0, 4, 1, 2, 3)
    embedded = functional.conv3d(pixels, kernel, made.bias, stride=modality.token_stride).flatten(2).transpose(1, 2)
    expected = embedded if made.cls_token is None else torch.cat([made.cls_token.expand(2, -1, -1), embedded], 1)
    assert embedded.shape[1] == modality.num_tokens - num_class_tokens
    expected = expected + made.pos_embed
    torch.testing.assert_close(made(grid), expected)
    weights = normal(*expected.shape)
    parameters = list(made.parameters())
    ours = torch.autograd.grad((made(grid) * weights).sum(), parameters)
    for value, truth in zip(ours, torch.autograd.grad((expected * weights).sum(), parameters), strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-4, atol=1e-4)


def test_an_overlapping_grid_is_spread_without_a_change_of_its_bytes():
    grid = torch.arange(2 * 21 * 16 * 3, dtype=torch.int32).to(torch.uint8).view(2, 1, 21, 16, 3)
    spread = spread_overlaps(grid, (1, 8, 8), (1, 5, 5))
    assert spread.shape == (2, 1, 24, 16, 3)
    for row in range(3):
        for column in range(2):
            there = grid[:, :, 5 * row : 5 * row + 8, 5 * column : 5 * column + 8]
            assert torch.equal(spread[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8], there)


def test_sinusoidal_positions_are_fixed_and_no_part_of_a_checkpoint():
    modality = replace(SMALL["clip"], positions="sinusoidal")
    made = Tokenizer(modality, MODEL)
    assert "pos_embed" not in made.state_dict()
    assert "pos_embed" not in dict(made.named_parameters())
    assert not made.pos_embed[0, 0].any()  # a class token is nowhere in the grid
    assert torch.equal(made.pos_embed[0, 1:], sinusoids(8, 32))


def test_sinusoids_are_those_of_the_formula():
    expected = [
        [math.sin(n / 10_000 ** (i / 6)) if i % 2 == 0 else math.cos(n / 10_000 ** ((i - 1) / 6)) for i in range(6)] for n in range(9)
    ]
    torch.testing.assert_close(sinusoids(9, 6), torch.tensor(expected))
