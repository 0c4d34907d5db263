"""The convolutions that the generators of the baselines share: a style to a map."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nfldm_ns.baselines.scene_generator import first_size
from nfldm_ns.latents.blocks import ConditionalGroupNorm, ResBlock, Upsample


class MapSynthesis(nn.Module):
    """A style vector to a map: a first map of it, then residual blocks that it modulates, each level twice as fine.

    Modulation is conditional group norm, as in stage 2: HoloGAN's and GIRAFFE's adaptive instance norm with groups.

    Args:
        style_dim: of the style.
        size: (rows, columns) of the map; both can be halved as often as there are levels but one.
        channels: widths by level, coarsest first.
        out_channels: of the map.

    Raises:
        ValueError: if the size cannot be halved so often.
    """

    def __init__(self, style_dim: int, size: tuple[int, int], channels: tuple[int, ...], out_channels: int) -> None:
        super().__init__()
        rows, columns = (first_size(side, len(channels)) for side in size)
        self.first_shape = (channels[0], rows, columns)
        self.first = nn.Linear(style_dim, channels[0] * rows * columns)
        self.levels = nn.ModuleList(ResBlock(width, width, style_dim) for width in channels)
        self.upsamples = nn.ModuleList(Upsample(before, after) for before, after in pairwise(channels))
        self.norm = ConditionalGroupNorm(channels[-1], style_dim)
        self.out = nn.Conv2d(channels[-1], out_channels, 3, padding=1)

    def forward(self, style: Float[Tensor, "batch width"]) -> Float[Tensor, "batch channels y x"]:
        x = self.first(style).unflatten(1, self.first_shape)
        for i, level in enumerate(self.levels):
            x = level(self.upsamples[i - 1](x) if i else x, style)
        return self.out(F.silu(self.norm(x, style)))
