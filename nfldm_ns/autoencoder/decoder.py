"""The image decoder of stage 1: rendered feature maps to images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nfldm_ns.autoencoder.blocks import ResBlock, faint_convolution, group_norm

UPSAMPLING = 2  # image pixels per pixel that an `ImageUpsampler` is given
UPSAMPLING_BLOCKS = 2  # residual blocks of an `ImageUpsampler` per size


class ImageUpsampler(nn.Module):
    """Images twice as large, with detail that a network adds (EG3D's super-resolution, Chan et al., CVPR 2022).

    Args:
        in_channels: of the hidden features that images were made of.
        channels: its width.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels + 3, channels, 3, padding=1)
        small, large = ([ResBlock(channels, channels) for _ in range(UPSAMPLING_BLOCKS)] for _ in range(2))
        self.small, self.large = nn.Sequential(*small), nn.Sequential(*large)
        self.norm = group_norm(channels)
        self.out = faint_convolution(channels, 3)

    def forward(
        self, hidden: Float[Tensor, "batch channels h w"], images: Float[Tensor, "batch 3 h w"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """The images at twice their size: interpolated, and the network's detail on top."""
        x = self.small(self.stem(torch.cat([hidden, images], dim=1)))
        x = self.large(F.interpolate(x, scale_factor=float(UPSAMPLING), mode="nearest"))
        detail = self.out(F.silu(self.norm(x)))
        return detail + F.interpolate(images, scale_factor=float(UPSAMPLING), mode="bilinear", align_corners=False)

    @torch.no_grad()
    def scale_detail(self, factor: float) -> None:
        """Has the network's detail count so many times; 0 leaves images interpolated."""
        for parameter in self.out.parameters():
            parameter.mul_(factor)


class ImageDecoder(nn.Module):
    """Feature maps to images, `stride` times larger, or less by `UPSAMPLING` where its upsampler is not asked for.

    The first three channels carry colour and reach the output directly; the network adds detail to them.

    Args:
        feature_channels: C of the voxels.
        stride: image pixels per feature pixel (a power of two), those of the upsampler among them.
        channels: widths from the feature resolution upwards; each further one at twice the size.
        num_blocks: residual blocks per level.
        upsampling_channels: width of an `ImageUpsampler` behind the last of them; 0 for none.
    """

    def __init__(
        self,
        feature_channels: int,
        stride: int,
        channels: tuple[int, ...],
        num_blocks: int,
        upsampling_channels: int = 0,
    ) -> None:
        super().__init__()
        stride //= UPSAMPLING if upsampling_channels else 1
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
        self.out = faint_convolution(previous, 3)
        self.stride = stride
        self.upsampler = ImageUpsampler(channels[-1], upsampling_channels) if upsampling_channels else None

    def forward(
        self,
        features: Float[Tensor, "batch channels h w"],
        accumulation: Float[Tensor, "batch 1 h w"],
        height: int | None = None,
    ) -> Float[Tensor, "batch 3 height width"]:
        """Images with colours around [-1, 1] (not clamped).

        Args:
            height: that will be looked at; an upsampler has no say in images of no more than half of its own.
        """
        x = self.stem(torch.cat([features, accumulation], dim=1))
        for level, blocks in enumerate(self.levels):
            x = blocks(F.interpolate(x, scale_factor=2.0, mode="nearest") if level else x)
        detail = self.out(F.silu(self.norm(x)))
        images = detail + F.interpolate(features[:, :3], size=detail.shape[-2:], mode="bilinear", align_corners=False)
        if self.upsampler is None or (height is not None and height <= images.shape[-2]):
            return images
        return self.upsampler(x, images)
