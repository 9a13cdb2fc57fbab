"""Networks with room for other numbers of neurons: what is tied stays tied."""

import torch
from torch import Tensor, nn

from clafusion import FusionOptions, fuse


class Tied(nn.Module):
    """A layer that is applied twice, under two names, and another one whose bias is also a scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(6, width)
        self.again = nn.Linear(width, width)
        self.same = self.again
        self.other = nn.Linear(width, width)
        self.scale = self.other.bias
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.first(x).relu()).relu()
        x = self.same(x).relu()
        return self.head((self.other(x) * self.scale).relu())


def test_tied_parameters_have_one_tensor_at_other_widths():
    torch.manual_seed(0)
    wide, narrow, samples = Tied(9), Tied(5), torch.randn(200, 6)
    fused = fuse([narrow, wide], [samples], FusionOptions(correction="none")).model
    assert fused.again is fused.same and fused.again.weight.shape == (5, 5)
    assert fused.scale is fused.other.bias and fused.scale.shape == (5,)
    assert torch.isfinite(fused(samples)).all()


def test_a_tied_network_fused_with_itself_is_itself():
    torch.manual_seed(0)
    network, samples = Tied(7), torch.randn(200, 6)
    fused = fuse([network, network], [samples], FusionOptions(correction="none")).model
    torch.testing.assert_close(fused(samples), network(samples))
