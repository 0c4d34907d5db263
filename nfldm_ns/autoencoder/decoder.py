"""The image decoder of stage 1: rendered feature maps to images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nfldm_ns.autoencoder.blocks import ResBlock, group_norm


class ImageDecoder(nn.Module):
    """Feature maps to images, `stride` times larger.

    The first three channels carry colour and reach the output directly; the network adds detail to them.

    Args:
        feature_channels: C of the voxels.
        stride: image pixels per feature pixel (a power of two).
        channels: widths from the feature resolution upwards; each further one at twice the size.
        num_blocks: residual blocks per level.
    """

    def __init__(self, feature_channels: int, stride: int, channels: tuple[int, ...], num_blocks: int) -> None:
        super().__init__()
        if 2 ** (len(channels) - 1) != stride:
            raise ValueError(f"a decoder of stride {stride} needs {stride.bit_length()} widths, not {len(channels)}")
        self.stem = nn.Conv2d(feature_channels + 1, channels[0], 3, padding=1)
        self.levels = nn.ModuleList()
        previous = channels[0]
        for width in channels:
            blocks = [ResBlock(previous if i == 0 else width, width) for i in range(num_blocks)]
            self.levels.append(nn.Sequential(*blocks))
            previous = width
        self.norm = group_norm(previous)
        self.out = nn.Conv2d(previous, 3, 3, padding=1)
        nn.init.normal_(self.out.weight, std=1e-3)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(
        self, features: Float[Tensor, "batch channels h w"], accumulation: Float[Tensor, "batch 1 h w"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Images with colours around [-1, 1] (not clamped)."""
        x = self.stem(torch.cat([features, accumulation], dim=1))
        for level, blocks in enumerate(self.levels):
            x = blocks(F.interpolate(x, scale_factor=2.0, mode="nearest") if level else x)
        detail = self.out(F.silu(self.norm(x)))
        return detail + F.interpolate(features[:, :3], size=detail.shape[-2:], mode="bilinear", align_corners=False)
