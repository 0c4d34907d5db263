"""The perceptual network of the image losses: its features, and the distance LPIPS defines on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

if TYPE_CHECKING:
    import lpips

PERCEPTUAL_CHANNELS = (64, 128, 256, 512, 512)  # of VGG16, by level, finest first
Features = list[Float[Tensor, "batch channels h w"]]


def convolution_dtype(device: torch.device | str) -> torch.dtype:
    """In what a frozen network convolves on a device.

    bfloat16 on CPUs that multiply it in tiles (AMX), where the network takes half the time, and what is optimised by it
    ends no worse (docs/performance.md); float32 elsewhere.
    """
    tiles = torch.device(device).type == "cpu" and torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if tiles else torch.float32


class PerceptualNetwork(nn.Module):
    """LPIPS (Zhang et al. 2018) in two steps, so that a discriminator can look at the same features.

    Args:
        metric: the frozen metric, from `nfldm_ns.pretrained.weights.load_lpips`.
        dtype: of its convolutions; features are float32 all the same.
    """

    def __init__(self, metric: lpips.LPIPS, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.metric = metric
        self.dtype = dtype

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each level of features, finest first."""
        return tuple(self.metric.chns)

    def features(self, images: Float[Tensor, "batch 3 height width"], num_levels: int | None = None) -> Features:
        """Activations of all levels, or of the first ones, for images in [-1, 1]."""
        count = len(self.channels) if num_levels is None else num_levels
        hidden = self.metric.scaling_layer(images).contiguous(memory_format=torch.channels_last)
        levels = []
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            for level in range(1, count + 1):
                hidden = getattr(self.metric.net, f"slice{level}")(hidden)
                levels.append(hidden)
        return [level.float() for level in levels]

    def distance(self, first: Features, second: Features) -> Float[Tensor, " batch"]:
        """The LPIPS of images with these features."""
        from lpips import normalize_tensor  # nothing that only views or renders needs the package

        levels = []
        for a, b, head in zip(first, second, self.metric.lins, strict=True):
            difference = (normalize_tensor(a) - normalize_tensor(b)).square()
            levels.append(head(difference).mean(dim=(1, 2, 3)))
        return torch.stack(levels).sum(0)
