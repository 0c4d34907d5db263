"""Small convolutional building blocks of stage 1."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def group_norm(channels: int, group_size: int = 8) -> nn.GroupNorm:
    """Group norm with groups of about `group_size` channels."""
    groups = max(1, channels // group_size)
    while channels % groups:
        groups -= 1
    return nn.GroupNorm(groups, channels)


def faint_convolution(in_channels: int, out_channels: int) -> nn.Conv2d:
    """A last 3x3 convolution whose outputs begin near zero."""
    convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1)
    nn.init.normal_(convolution.weight, std=1e-3)
    nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
    return convolution


class ResBlock(nn.Module):
    """Pre-activation residual block of two 3x3 convolutions; the last one starts at zero."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch d h w"]:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))
