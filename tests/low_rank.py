"""An adapter around a linear layer, as LoRA puts it in the layer's position."""

from torch import nn


class LowRank(nn.Module):
    """The layer plus a product of rank 2; weight and bias are the layer's."""

    def __init__(self, base):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))
