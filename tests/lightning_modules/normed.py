"""A network of a class of its own, which cannot have other widths once it is stored: norms name theirs in the graph."""

import torch
from torch import Tensor, nn


class Normed(nn.Module):
    """Residual blocks with layer norms, on images of one size."""

    def __init__(self, depth: int, width: int, side: int = 8) -> None:
        super().__init__()
        self.stem = nn.Linear(side * side, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 5), nn.ReLU(), nn.Linear(5, width))
            for _ in range(depth)
        )
        self.head = nn.Linear(width, 10)
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[N, 1, side, side]` to logits `[N, 10]`."""
        x = self.stem(torch.reshape(x, (-1, self.side * self.side)))
        for block in self.blocks:
            x = x + block(x)
        logits: Tensor = self.head(x)
        return logits
