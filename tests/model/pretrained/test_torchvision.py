"""Weights of torchvision's models against torchvision's own logits."""

import pytest
import torch
from foreign_models import randomised

from polyvit_fast.model import pretrained
from polyvit_fast.model.pretrained.torchvision import MEAN, STD


@pytest.mark.parametrize("representation_size", [None, 20])
def test_logits_are_torchvisions(representation_size, tmp_path):
    from torchvision.models import VisionTransformer

    theirs = randomised(VisionTransformer(48, 16, 2, 1, 64, 96, num_classes=3, representation_size=representation_size)).eval()
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    found = pretrained.read(str(tmp_path / "vit.pth"))
    x = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, std = (torch.tensor(values, dtype=torch.float32).double() for values in (MEAN, STD))
    grid = x.movedim(1, -1)[:, None] * std + mean
    if representation_size:
        assert sorted(found.left_out) == [f"heads.{name}.{key}" for name in ("head", "pre_logits") for key in ("bias", "weight")]
        assert not found.heads
        with torch.no_grad():
            class_tokens = theirs.double().encoder(torch.cat([theirs.class_token.expand(2, -1, -1), theirs._process_input(x)], 1))[:, 0]
            torch.testing.assert_close(found.build().double().embed(grid, "image"), class_tokens, rtol=0, atol=1e-12)
        return
    with torch.no_grad():
        torch.testing.assert_close(found.build().double()(grid, "classes"), theirs.double()(x), rtol=0, atol=1e-12)
