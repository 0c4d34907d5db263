"""Building blocks of the bird's-eye-view networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def num_groups(channels: int, most: int = 32) -> int:
    """The largest number of groups up to `most` that divides `channels` into groups of at least 4."""
    return next(groups for groups in range(min(most, max(channels // 4, 1)), 0, -1) if channels % groups == 0)


def start_at_zero(layer: nn.Module) -> None:
    """Zeroes a layer's weights and bias, so that what it adds begins as nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


class ConditionalGroupNorm(nn.Module):
    """Group norm whose scale and shift come from the global latent g (the paper's CGN).

    With `condition_dim` None it is plain group norm with learned scale and shift.
    """

    def __init__(self, channels: int, condition_dim: int | None = None) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(num_groups(channels), channels, affine=condition_dim is None)
        self.modulation = None
        if condition_dim is not None:
            self.modulation = nn.Linear(condition_dim, 2 * channels)
            start_at_zero(self.modulation)

    def forward(
        self, x: Float[Tensor, "batch channels y x"], condition: Float[Tensor, "batch dim"] | None = None
    ) -> Float[Tensor, "batch channels y x"]:
        x = self.norm(x)
        if self.modulation is None:
            return x
        scale, shift = self.modulation(condition)[:, :, None, None].chunk(2, dim=1)
        return x * (1 + scale) + shift


class ResBlock(nn.Module):
    """Two 3x3 convolutions with a skip connection; ResBlock-CGN where `condition_dim` is given."""

    def __init__(self, in_channels: int, out_channels: int, condition_dim: int | None = None) -> None:
        super().__init__()
        self.norm1 = ConditionalGroupNorm(in_channels, condition_dim)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = ConditionalGroupNorm(out_channels, condition_dim)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        start_at_zero(self.conv2)

    def forward(
        self, x: Float[Tensor, "batch channels y x"], condition: Float[Tensor, "batch dim"] | None = None
    ) -> Float[Tensor, "batch out_channels y x"]:
        h = self.conv1(F.silu(self.norm1(x, condition)))
        h = self.conv2(F.silu(self.norm2(h, condition)))
        return self.skip(x) + h


class SelfAttention(nn.Module):
    """Single-head self-attention over the cells of a map, with a skip connection."""

    def __init__(self, channels: int, condition_dim: int | None = None) -> None:
        super().__init__()
        self.norm = ConditionalGroupNorm(channels, condition_dim)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.to_out = nn.Conv2d(channels, channels, 1)
        start_at_zero(self.to_out)

    def forward(
        self, x: Float[Tensor, "batch channels y x"], condition: Float[Tensor, "batch dim"] | None = None
    ) -> Float[Tensor, "batch channels y x"]:
        q, k, v = self.to_qkv(self.norm(x, condition)).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).unflatten(2, x.shape[-2:])
        return x + self.to_out(attended)


class MidBlock(nn.Module):
    """ResBlock, self-attention, ResBlock at the lowest resolution; MidBlock-CGN where `condition_dim` is given."""

    def __init__(self, channels: int, condition_dim: int | None = None) -> None:
        super().__init__()
        self.before = ResBlock(channels, channels, condition_dim)
        self.attention = SelfAttention(channels, condition_dim)
        self.after = ResBlock(channels, channels, condition_dim)

    def forward(
        self, x: Float[Tensor, "batch channels y x"], condition: Float[Tensor, "batch dim"] | None = None
    ) -> Float[Tensor, "batch channels y x"]:
        x = self.attention(self.before(x, condition), condition)
        return self.after(x, condition)


class Upsample(nn.Module):
    """Nearest-neighbour 2x and a 3x3 convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "batch channels y x"]) -> Float[Tensor, "batch out_channels y2 x2"]:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class DownsamplingEncoder(nn.Module):
    """A convolutional encoder from the folded voxels to a map `2 ** (len(channels) - 1)` times coarser.

    Args:
        in_channels: folded channels.
        channels: width at each resolution, finest first.
        out_channels: channels of the result.
        blocks: ResBlocks at each resolution.
    """

    def __init__(self, in_channels: int, channels: tuple[int, ...], out_channels: int, blocks: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        layers: list[nn.Module] = []
        for level, width in enumerate(channels):
            if level > 0:
                layers.append(nn.Conv2d(channels[level - 1], width, 3, stride=2, padding=1))
            layers.extend(ResBlock(width, width) for _ in range(blocks))
        self.body = nn.Sequential(*layers)
        self.norm_out = ConditionalGroupNorm(channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], out_channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "batch channels y x"]) -> Float[Tensor, "batch out_channels y2 x2"]:
        return self.conv_out(F.silu(self.norm_out(self.body(self.conv_in(x)))))


def pack_channels_last(x: Tensor) -> Tensor:
    """`x` in the memory format that convolutions run fastest in."""
    return x.contiguous(memory_format=torch.channels_last)
