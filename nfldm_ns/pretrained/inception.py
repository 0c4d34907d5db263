"""The Inception network whose features FID and KID compare."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch_fidelity import feature_extractor_inceptionv3 as blocks

INPUT_SIZE = 299
NUM_FEATURES = 2048


def resize_clean(
    pixels: Float[Tensor, "batch 3 height width"], height: int, width: int
) -> Float[Tensor, "batch 3 new_height new_width"]:
    """Antialiased bicubic interpolation of values in [0, 255], clamped to that range and not rounded.

    The same as PIL's `Image.resize(..., Image.BICUBIC)` of each channel in floating point, which clean-fid asks for
    (Parmar et al. 2022).
    """
    resized = F.interpolate(pixels, (height, width), mode="bicubic", align_corners=False, antialias=True)
    return resized.clamp(0, 255)


class InceptionFeatures(nn.Module):
    """The 2015 TensorFlow Inception-v3 up to its last average pooling, as FID is defined on.

    Images are rounded to 8 bits, so that renders and stored images are treated alike, and brought to 299 x 299 by
    `resize_clean` (numbers are comparable with each other and with clean-fid's way, not digit by digit with those of
    other resizers).
    """

    def __init__(self) -> None:
        super().__init__()
        conv = blocks.BasicConv2d
        layers = OrderedDict(
            Conv2d_1a_3x3=conv(3, 32, kernel_size=3, stride=2),
            Conv2d_2a_3x3=conv(32, 32, kernel_size=3),
            Conv2d_2b_3x3=conv(32, 64, kernel_size=3, padding=1),
            MaxPool_1=nn.MaxPool2d(kernel_size=3, stride=2),
            Conv2d_3b_1x1=conv(64, 80, kernel_size=1),
            Conv2d_4a_3x3=conv(80, 192, kernel_size=3),
            MaxPool_2=nn.MaxPool2d(kernel_size=3, stride=2),
            Mixed_5b=blocks.InceptionA(192, pool_features=32),
            Mixed_5c=blocks.InceptionA(256, pool_features=64),
            Mixed_5d=blocks.InceptionA(288, pool_features=64),
            Mixed_6a=blocks.InceptionB(288),
            Mixed_6b=blocks.InceptionC(768, channels_7x7=128),
            Mixed_6c=blocks.InceptionC(768, channels_7x7=160),
            Mixed_6d=blocks.InceptionC(768, channels_7x7=160),
            Mixed_6e=blocks.InceptionC(768, channels_7x7=192),
            Mixed_7a=blocks.InceptionD(768),
            Mixed_7b=blocks.InceptionE_1(1280),
            Mixed_7c=blocks.InceptionE_2(2048),
            AvgPool=nn.AdaptiveAvgPool2d((1, 1)),
        )
        self.layers = nn.Sequential(layers)

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 2048"]:
        """Pooled features of images in [0, 1] of any size."""
        pixels = images.float().clamp(0, 1).mul(255).round()
        if pixels.shape[-2:] != (INPUT_SIZE, INPUT_SIZE):
            pixels = resize_clean(pixels, INPUT_SIZE, INPUT_SIZE)
        return self.layers(((pixels - 128) / 128).contiguous(memory_format=torch.channels_last)).flatten(1)
