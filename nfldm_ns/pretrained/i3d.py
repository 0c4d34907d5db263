"""The video network whose logits the Frechet video distance compares."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

INPUT_SIZE = 224
NUM_CLASSES = 400
MIN_FRAMES = 10
BATCH_NORM_EPS = 1e-3

Axes = tuple[int, int, int]


class InceptionI3D(nn.Module):
    """Inflated Inception-V1 (Carreira and Zisserman, "Quo Vadis, Action Recognition?", CVPR 2017), RGB, for inference.

    Convolutions and poolings pad as TensorFlow's SAME does, which depends on the size of the input and puts the odd
    cell at the end. Layers have the names of the original.
    """

    def __init__(self) -> None:
        super().__init__()
        layers = OrderedDict(
            Conv3d_1a_7x7=ConvUnit(3, 64, 7, stride=2),
            MaxPool3d_2a_3x3=MaxPool((1, 3, 3), (1, 2, 2)),
            Conv3d_2b_1x1=ConvUnit(64, 64, 1),
            Conv3d_2c_3x3=ConvUnit(64, 192, 3),
            MaxPool3d_3a_3x3=MaxPool((1, 3, 3), (1, 2, 2)),
            Mixed_3b=InceptionBlock(192, 64, (96, 128), (16, 32), 32),
            Mixed_3c=InceptionBlock(256, 128, (128, 192), (32, 96), 64),
            MaxPool3d_4a_3x3=MaxPool((3, 3, 3), (2, 2, 2)),
            Mixed_4b=InceptionBlock(480, 192, (96, 208), (16, 48), 64),
            Mixed_4c=InceptionBlock(512, 160, (112, 224), (24, 64), 64),
            Mixed_4d=InceptionBlock(512, 128, (128, 256), (24, 64), 64),
            Mixed_4e=InceptionBlock(512, 112, (144, 288), (32, 64), 64),
            Mixed_4f=InceptionBlock(528, 256, (160, 320), (32, 128), 128),
            MaxPool3d_5a_2x2=MaxPool((2, 2, 2), (2, 2, 2)),
            Mixed_5b=InceptionBlock(832, 256, (160, 320), (32, 128), 128),
            Mixed_5c=InceptionBlock(832, 384, (192, 384), (48, 128), 128),
        )
        self.layers = nn.Sequential(layers)
        self.logits = nn.Linear(1024, NUM_CLASSES)

    def forward(self, videos: Float[Tensor, "batch 3 frames 224 224"]) -> Float[Tensor, "batch 400"]:
        """Logits of the classes of Kinetics-400, mean over time, for values in [-1, 1].

        Raises:
            ValueError: if the frames are not 224 x 224, or there are fewer than 10.
        """
        if videos.shape[-2:] != (INPUT_SIZE, INPUT_SIZE) or videos.shape[2] < MIN_FRAMES:
            raise ValueError(
                f"videos must have {INPUT_SIZE} x {INPUT_SIZE} pixels and at least {MIN_FRAMES} frames, "
                f"not {tuple(videos.shape)}"
            )
        features = F.avg_pool3d(self.layers(videos), (2, 7, 7), stride=1)
        return self.logits(features.mean(dim=(2, 3, 4)))


class ConvUnit(nn.Module):
    """Convolution without bias, batch norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.kernel, self.stride = (kernel,) * 3, (stride,) * 3
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(out_channels, eps=BATCH_NORM_EPS)

    def forward(self, x: Float[Tensor, "batch c t h w"]) -> Float[Tensor, "batch d t2 h2 w2"]:
        return F.relu(self.bn(self.conv(pad_same(x, self.kernel, self.stride))))


class MaxPool(nn.Module):
    """Max pooling of values that are never negative, so that zeros as padding change nothing."""

    def __init__(self, kernel: Axes, stride: Axes) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Float[Tensor, "batch c t h w"]) -> Float[Tensor, "batch c t2 h2 w2"]:
        return F.max_pool3d(pad_same(x, self.kernel, self.stride), self.kernel, self.stride)


class InceptionBlock(nn.Module):
    """Four branches side by side: 1, 1 and 3, 1 and 3, pooling and 1.

    Args:
        branch_0, branch_1, branch_2, branch_3: channels of their convolutions.
    """

    def __init__(
        self, in_channels: int, branch_0: int, branch_1: tuple[int, int], branch_2: tuple[int, int], branch_3: int
    ) -> None:
        super().__init__()
        self.Branch_0 = nn.Sequential(OrderedDict(Conv3d_0a_1x1=ConvUnit(in_channels, branch_0, 1)))
        self.Branch_1 = _reduced(in_channels, *branch_1)
        self.Branch_2 = _reduced(in_channels, *branch_2)
        self.Branch_3 = nn.Sequential(
            OrderedDict(
                MaxPool3d_0a_3x3=MaxPool((3, 3, 3), (1, 1, 1)), Conv3d_0b_1x1=ConvUnit(in_channels, branch_3, 1)
            )
        )

    def forward(self, x: Float[Tensor, "batch c t h w"]) -> Float[Tensor, "batch d t h w"]:
        return torch.cat([self.Branch_0(x), self.Branch_1(x), self.Branch_2(x), self.Branch_3(x)], dim=1)


def _reduced(in_channels: int, narrow: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(Conv3d_0a_1x1=ConvUnit(in_channels, narrow, 1), Conv3d_0b_3x3=ConvUnit(narrow, out_channels, 3))
    )


def pad_same(x: Float[Tensor, "batch c t h w"], kernel: Axes, stride: Axes) -> Float[Tensor, "batch c t2 h2 w2"]:
    """Zeros around `x` so that an unpadded layer gives ceil(size / stride) cells along each axis, as TensorFlow's SAME.

    Along an axis k + (ceil(n / s) - 1) s - n cells are added; of an odd number the larger part comes after.
    """
    padding: list[int] = []
    for size, k, s in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride), strict=True):
        total = max(0, k + (-(-size // s) - 1) * s - size)
        padding += [total // 2, total - total // 2]
    return F.pad(x, padding) if any(padding) else x
