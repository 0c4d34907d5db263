"""The image encoder of stage 1: every image by itself to densities along its rays and one feature vector per pixel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nfldm_ns.autoencoder.blocks import ResBlock, faint_convolution, group_norm


class ImageEncoder(nn.Module):
    """A small U-Net from images to the paper's `h x w x (D + C)` tensor.

    The first three feature channels receive the image's colours through a direct linear path: without it the short
    trainings of the small presets lose two decibels.

    Args:
        in_channels: 3 for RGB, 5 for RGB, depth and its validity.
        num_depth_bins: D.
        feature_channels: C.
        extra_channels: further outputs per pixel.
        stride: image pixels per feature pixel (a power of two).
        channels: widths from the feature resolution downwards, each level at half the size of the one before.
        num_blocks: residual blocks per level and direction.
    """

    def __init__(
        self,
        in_channels: int,
        num_depth_bins: int,
        feature_channels: int,
        stride: int,
        channels: tuple[int, ...],
        num_blocks: int,
        extra_channels: int = 0,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.outputs = (num_depth_bins, feature_channels, extra_channels)
        # Space to depth keeps every pixel's colour while the network runs at the feature resolution.
        self.stem = nn.Conv2d(in_channels * stride**2, channels[0], 3, padding=1)
        self.down = nn.ModuleList()
        previous = channels[0]
        for width in channels:
            self.down.append(nn.Sequential(*_blocks(previous, width, num_blocks)))
            previous = width
        self.up = nn.ModuleList()
        for width in reversed(channels[:-1]):
            self.up.append(nn.Sequential(*_blocks(previous + width, width, num_blocks)))
            previous = width
        self.norm = group_norm(previous)
        self.out = faint_convolution(previous, sum(self.outputs))
        self.colours = nn.Conv2d(3, feature_channels, 1)
        nn.init.zeros_(self.colours.weight)
        nn.init.zeros_(self.colours.bias)  # type: ignore[arg-type]
        with torch.no_grad():
            for channel in range(min(3, feature_channels)):
                self.colours.weight[channel, channel] = 1.0

    def forward(
        self, images: Float[Tensor, "batch in_channels height width"]
    ) -> tuple[Float[Tensor, "batch bins h w"], Float[Tensor, "batch channels h w"], Float[Tensor, "batch extra h w"]]:
        """Density logits along the rays, features and extra outputs; images are centred to [-1, 1], colours first."""
        colours = F.avg_pool2d(images[:, :3], self.stride)
        x = self.stem(F.pixel_unshuffle(images, self.stride))
        skips = []
        for level, blocks in enumerate(self.down):
            x = blocks(F.avg_pool2d(x, 2) if level else x)
            skips.append(x)
        for blocks, skip in zip(self.up, reversed(skips[:-1]), strict=True):
            x = F.interpolate(x, size=skip.shape[-2:], mode="nearest")
            x = blocks(torch.cat([x, skip], dim=1))
        logits, features, extra = self.out(F.silu(self.norm(x))).split(self.outputs, dim=1)
        return logits, features + self.colours(colours), extra


def _blocks(in_channels: int, out_channels: int, num_blocks: int) -> list[nn.Module]:
    return [ResBlock(in_channels if i == 0 else out_channels, out_channels) for i in range(num_blocks)]
